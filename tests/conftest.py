"""Settings every test shares: quiet threads, no display, no window."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
os.environ.setdefault("MPLBACKEND", "Agg")

import torch  # noqa: E402  (OpenMP reads its settings when torch loads)

torch.set_num_threads(min(2, torch.get_num_threads()))
