"""How sessions begin: with clips of the bank, cut into chunks, and with captions. Pure functions of the world's parts.

``starts``: a world's bank, "frames" (S, T, F, height, width, 3) or (S, n, height, width, 3) uint8, and "actions" or,
where they are named, "actions/<name>" (S, T, ...).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from worldmodel.errors import InputError
from worldmodel.noise import seed_tensor


def chunks_of(clip: np.ndarray | Tensor, first_frames: int, chunk_frames: int) -> list[Any]:
    """A clip (B, n, height, width, 3) cut into a first chunk of ``first_frames`` and others of ``chunk_frames``.

    Raises:
        InputError: n is not ``first_frames + k chunk_frames``.
    """
    rest = clip.shape[1] - first_frames
    if rest < 0 or rest % chunk_frames:
        raise InputError(f"a clip of {clip.shape[1]} frames, expected {first_frames} + {chunk_frames} k")
    ends = range(first_frames, clip.shape[1] + 1, chunk_frames)
    return [clip[:, max(0, end - chunk_frames) if i else 0 : end] for i, end in enumerate(ends)]


def bank_index(
    starts: Mapping[str, np.ndarray], seeds: Sequence[int], chosen: Sequence[int] | None
) -> np.ndarray:
    """(B,) int64: which clips of the bank sessions begin with, the ``chosen`` ones or, by default, their seeds' own.

    Raises:
        InputError: no bank, or an index outside it.
    """
    if "frames" not in starts:
        raise InputError(
            "this world has no bank of clips; observe a picture or a clip, or begin from nothing"
        )
    size = len(starts["frames"])
    if chosen is None:
        chosen = [int(np.random.default_rng(int(s)).integers(size)) for s in seed_tensor(seeds)]
    index = np.asarray(chosen)
    if (
        index.dtype.kind not in "iu"
        or index.shape != (len(seeds),)
        or not ((index >= 0) & (index < size)).all()
    ):
        raise InputError(f"starts {list(chosen)!r:.80}: expected {len(seeds)} indices into a bank of {size}")
    return index.astype(np.int64)


def bank_chunks(starts: Mapping[str, np.ndarray], first_frames: int, chunk_frames: int) -> int:
    """Chunks of a clip of the bank, 1 for a world without one."""
    if "frames" not in starts:
        return 1
    bank = starts["frames"]
    return bank.shape[1] if bank.ndim == 6 else 1 + (bank.shape[1] - first_frames) // chunk_frames


def bank_actions(starts: Mapping[str, np.ndarray], index: np.ndarray) -> Any:
    """Actions (B, T, ...) of clips of the bank, a dict of such where they are named, or None where there are none."""
    if "actions" in starts:
        return starts["actions"][index]
    named = {k.removeprefix("actions/"): v for k, v in starts.items() if k.startswith("actions/")}
    return {k: v[index] for k, v in named.items()} or None


def captioned(actions: Any, key: str | None, prompts: Sequence[str] | None) -> Any:
    """Actions (B, T, ...) with the captions (B,) under the prompts' ``key``; as they are where there are none."""
    if prompts is None or key is None or actions is None:
        return actions
    if not key:
        return None  # the sessions' own captions
    return {**actions, key: np.repeat(np.asarray(prompts)[:, None], np.shape(actions[key])[1], axis=1)}
