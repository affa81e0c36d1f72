"""What episodes say about acting: returns-to-go, and which of their actions are worth imitating.

Axis letters: S chunks of all episodes end to end.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

NEGLIGIBLE = 0.1
"""Where an episode was cut, a return-to-go is known if what lies behind the cut weighs less than this."""


def returns_to_go(
    rewards: Tensor, terminated: Tensor, lengths: np.ndarray, discount: float
) -> tuple[Tensor, Tensor]:
    """Monte-Carlo returns (S,) float32 of what comes *after* each chunk, and whether they are known (S,) bool.

    The chunk after counts in full, each one behind it ``discount`` times less. Rewards (S,), terminated (S,) bool;
    lengths (episodes,) in chunks.
    """
    values, known = torch.zeros(len(rewards)), torch.zeros(len(rewards), dtype=torch.bool)
    for end, length in zip(np.cumsum(lengths), lengths, strict=True):
        ahead = 0.0
        for left, at in enumerate(range(int(end) - 1, int(end - length) - 1, -1)):
            values[at] = ahead
            known[at] = bool(terminated[end - 1]) or discount**left <= NEGLIGIBLE
            ahead = float(rewards[at]) + discount * ahead
    return values, known


def worth_imitating(rewards: Tensor, lengths: np.ndarray) -> Tensor:
    """(S,) bool: chunks that another one follows, in the half of the episodes with the higher total reward."""
    totals = torch.stack([part.sum() for part in rewards.split(lengths.tolist())])
    chosen = totals >= totals.quantile(0.5)
    last = torch.zeros(len(rewards), dtype=torch.bool)
    last[torch.from_numpy(np.cumsum(lengths) - 1)] = True
    return chosen.repeat_interleave(torch.from_numpy(lengths)) & ~last
