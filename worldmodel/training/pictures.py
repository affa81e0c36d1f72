"""The pictures that heads with an eye learn from: chunks of real and of decoded frames, some before another episode's
scenery.

Axis letters: B batch, F pixel frames of a chunk; height, width pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from worldmodel.codec.base import Codec
from worldmodel.errors import DataError
from worldmodel.training.episodes import Episode, EpisodeDataset

if TYPE_CHECKING:
    from worldmodel.training.flow import Latents

MOVED = 8  # grey levels by which a pixel must differ from its episode's scenery to be in front of it
SCENERY_FRAMES = 15


class Pictures:
    """Chunks by their place in episodes that lie end to end, as in `worldmodel.training.flow.Latents`.

    observations: (S, D) float32, the simulator's own at the end of each chunk; D may be 0.
    """

    def __init__(
        self, episodes: Sequence[Episode], frame_skip: int, decoded: Sequence[np.ndarray] = ()
    ) -> None:
        """Keeps all frames in memory. ``decoded``: of each episode what its codec makes of frames 1 to F K, as uint8; where
        given, half of the chunks are drawn from them, since that is what an eye sees in imagination.

        Raises:
            DataError: no episodes.
        """
        if not episodes:
            raise DataError("there are no episodes to learn from")
        self.frame_skip = frame_skip
        self.frames = [e.frames[1:] for e in episodes], list(decoded)
        counts = [len(e.rewards) for e in episodes]
        self.episode = np.repeat(np.arange(len(counts)), counts)
        self.chunk = np.concatenate([np.arange(n) for n in counts])
        self.scenery = [
            np.stack([scenery(f) for f in tqdm(kind, desc="scenery", leave=False, delay=2, unit="episode")])
            for kind in self.frames
            if kind
        ]
        ends = [e.observations[frame_skip::frame_skip].reshape(len(e.rewards), -1) for e in episodes]
        self.observations = torch.from_numpy(np.concatenate(ends).astype(np.float32))

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        datasets: Sequence[EpisodeDataset],
        codec: Codec,
        latents: Latents,
        device: torch.device | str = "cpu",
    ) -> Pictures:
        """The training episodes of all datasets, in their order, whose ``latents`` the codec, on ``device``, made.

        Raises:
            DataError: as `EpisodeDataset.split`.
        """
        splits = [dataset.split("train") for dataset in datasets]
        episodes = [s.episode(i) for s in splits for i in s.indices]
        parts = torch.split(latents.latents, latents.lengths.tolist())
        bar = tqdm(parts, desc="decode", unit="episode", leave=False, delay=2)
        state = codec.initial_state(1)
        decoded = [codec.decode(part[None].to(device), state)[0][0].cpu().numpy() for part in bar]
        return cls(episodes, splits[0].frame_skip, decoded)

    def windows(self, at: np.ndarray, length: int, swap: float, rng: np.random.Generator) -> Tensor:
        """``length`` chunks (B, T, F, height, width, 3) uint8 from places (B,) on; a share ``swap`` of the windows before
        another episode's scenery.
        """
        drawn = []
        for place in at:
            kind = int(rng.integers(len(self.scenery)))
            every, still = self.frames[kind], self.scenery[kind]
            index, first = int(self.episode[place]), self.frame_skip * int(self.chunk[place])
            frames = every[index][first : first + length * self.frame_skip]
            if rng.random() < swap:
                other = still[rng.integers(len(still))]
                frames = np.where(in_front(frames, still[index])[..., None], frames, other)
            drawn.append(frames.reshape(length, self.frame_skip, *frames.shape[1:]))
        return torch.from_numpy(np.stack(drawn))


def scenery(frames: np.ndarray) -> np.ndarray:
    """(height, width, 3) uint8: what stands still in an episode's frames (n, height, width, 3), their median."""
    chosen = np.linspace(0, len(frames) - 1, min(SCENERY_FRAMES, len(frames))).astype(int)
    return np.median(frames[chosen], axis=0).astype(np.uint8)


def in_front(frames: np.ndarray, still: np.ndarray) -> np.ndarray:
    """(F, height, width) bool: the pixels of frames (F, height, width, 3) that differ from the scenery."""
    return np.asarray(np.abs(frames.astype(np.int16) - still).max(axis=-1) > MOVED)
