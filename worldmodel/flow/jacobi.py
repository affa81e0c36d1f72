"""Inverting an autoregressive affine map. The solvers know no network: they are given ``v -> Affine``.

Jacobi (Song et al., arXiv 2002.03629; STARFlow-V sec. 3.3): ``v <- mu(v) + sigma(v) * w`` for a whole run of tokens
at once. After k sweeps the first k tokens are exact, so N sweeps are the exact inverse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from worldmodel.flow.affine import Affine

Parameters = Callable[[Tensor], Affine]


class Solution(NamedTuple):
    """``v`` (B, N, D); ``sweeps`` (B,) int64, evaluations spent on each row; ``residual`` (B,) of its last update."""

    v: Tensor
    sweeps: Tensor
    residual: Tensor


def jacobi(parameters: Parameters, w: Tensor, start: Tensor, tolerance: float) -> Solution:
    """Solve ``v = mu(v) + sigma(v) * w`` from ``start``; w, start: (B, N, D), tokens in the block's own order.

    A row stops when ``mean((v' - v)^2) / mean(v'^2) < tolerance`` or after N sweeps, each row for itself: a
    neighbour never changes a sample. ``tolerance = 0`` runs all N sweeps and is exact.
    """
    rows, tokens = w.shape[:2]
    v = start
    active = torch.ones(rows, dtype=torch.bool, device=w.device)
    sweeps = torch.zeros(rows, dtype=torch.int64, device=w.device)
    residual = torch.zeros(rows, dtype=torch.float32, device=w.device)
    for _ in range(tokens):
        update = parameters(v).inverse(w)
        change = (update - v).square().mean((1, 2)) / update.square().mean((1, 2)).clamp_min(1e-30)
        v = torch.where(active[:, None, None], update, v)
        residual = torch.where(active, change.float(), residual)
        sweeps += active
        active = active & (change >= tolerance)
        if not active.any():
            break
    return Solution(v, sweeps, residual)


def sequential(parameters: Parameters, w: Tensor) -> Tensor:
    """The exact inverse, token by token (TarFlow eq. 4): the oracle that Jacobi is measured against."""
    v = torch.zeros_like(w)
    for i in range(w.shape[1]):
        v[:, i] = parameters(v).inverse(w)[:, i]
    return v
