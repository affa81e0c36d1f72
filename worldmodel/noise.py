"""Counter-based noise: a function of (seed, branch, step, stream), the same on every device and in every batch."""

from __future__ import annotations

import operator
import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from worldmodel.errors import InputError

SAMPLE, OBSERVE, SCORE = 0, 1, 2
"""Streams: noise of an imagined chunk, noise added to a real one, noise of extra scoring draws."""

_MASK = (1 << 64) - 1


def seed_tensor(seeds: Sequence[int]) -> Tensor:
    """Seeds (B,) int64 of sessions.

    Raises:
        InputError: one that is no integer in [0, 2^63).
    """
    try:
        values = [operator.index(s) for s in seeds]
    except TypeError as error:
        given = " ".join(repr(seeds).split())
        raise InputError(f"seeds {given:.80}: expected integers, one for each session") from error
    if not values:
        raise InputError("no seeds, expected one for each session")
    bad = [s for s in values if not 0 <= s < 1 << 63]
    if bad:
        raise InputError(f"seed {bad[0]} is out of range; expected an integer in [0, 2^63)")
    return torch.tensor(values, dtype=torch.int64)


def child_branch(branch: int, forks: int, child: int) -> int:
    """Branch id of a child of a session that was forked ``forks`` times before; child 0 keeps its parent's."""
    if child == 0:
        return branch
    x = (branch * 0x9E3779B97F4A7C15 + child * 0xBF58476D1CE4E5B9 + (forks + 1) * 0x94D049BB133111EB) & _MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ (x >> shift)) * factor) & _MASK
    return (x ^ (x >> 31)) & (_MASK >> 1)


class _Philox(threading.local):
    """A thread's generator, and what its state is set to."""

    def __init__(self) -> None:
        bits = np.random.Philox(key=np.zeros(2, dtype=np.uint64))
        self.generator, self.state = np.random.Generator(bits), bits.state


_PHILOX = _Philox()


def normal(
    seeds: Tensor, branches: Tensor, steps: Tensor, stream: int, shape: tuple[int, ...], draw: int = 0
) -> Tensor:
    """Standard normal noise (B, *shape) float32 on the CPU; row b depends on its own (seed, branch, step) alone.

    Philox 4x64 (Salmon et al., SC 2011) keyed by (seed, branch); the counter holds step, stream and draw.
    """
    noise = np.empty((len(seeds), *shape), dtype=np.float32)
    generator, state = _PHILOX.generator, _PHILOX.state  # one, set anew for each row: a third of the time
    bits, key, counter = generator.bit_generator, state["state"]["key"], state["state"]["counter"]
    counter[:] = 0, 0, stream, draw
    for row, (seed, branch, step) in enumerate(
        zip(seeds.tolist(), branches.tolist(), steps.tolist(), strict=True)
    ):
        key[:], counter[1] = (seed & _MASK, branch & _MASK), step
        bits.state = state
        generator.standard_normal(dtype=np.float32, out=noise[row])
    return torch.from_numpy(noise)
