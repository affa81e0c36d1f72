"""Flows small enough for an explicit Jacobian, in float64, and the Jacobian itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.toy import toy_flow
from worldmodel.flow.flow import Flow

GRID = (2, 2)


def flow64(seed: int = 0, **overrides: object) -> Flow:
    """A random flow in float64: 2 channels, tokens on a 2x2 grid, windows of 4 frames."""
    values = {
        "in_channels": 2,
        "channels": 16,
        "top_channels": 32,
        "head_dim": 16,
        "layers_per_block": (1, 1, 2),
        "action_features": 3,
        "window": 4,
        "context": 2,
        "denoiser_layers": 1,
    }
    return toy_flow(seed, **{**values, **overrides}).double()


def draw(*shape: int, seed: int = 1) -> Tensor:
    """Standard normal float64 numbers."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def jacobian(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """(outputs, inputs) matrix of a function of one row (1, ...) at ``at``."""
    out = torch.autograd.functional.jacobian(function, at, vectorize=True)
    return out.reshape(-1, at.numel())


def lower_triangular(matrix: Tensor, block: int) -> bool:
    """Whether all above the diagonal blocks of size ``block`` is exactly zero, and the diagonal is
    positive.
    """
    n = matrix.shape[0] // block
    blocks = matrix.reshape(n, block, n, block).transpose(1, 2)
    above = torch.ones(n, n, dtype=torch.bool).triu(1)
    return bool((blocks[above] == 0).all() and (matrix.diagonal() > 0).all())
