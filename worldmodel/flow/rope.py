"""Rotary positions over (row, column, frame), as STARFlow-V lays them out (arXiv 2511.20462, app. A).

Per head of size K, K / 2 angles: ``(K/2 - 8) / 2`` for the row, as many for the column, 8 for the third axis
(frame index, or text position). Channel pairs are adjacent: (2i, 2i + 1).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

TEMPORAL_FREQUENCIES = 8
THETA = 10000.0


class Rotary(NamedTuple):
    """Cosine and sine per position and channel, (..., S, K), float32: positions are never rounded to bf16."""

    cos: Tensor
    sin: Tensor


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate (B, H, S, K) by the tables (S, K) or (B, 1, S, K), in at least float32; the dtype of ``x`` is kept."""
    y = x if x.dtype == torch.float64 else x.float()
    pairs = y.unflatten(-1, (-1, 2))
    half = torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)
    return (y * rotary.cos + half * rotary.sin).to(x.dtype)


def rotate_halves(x: Tensor, rotary: Rotary) -> Tensor:
    """As `rotate`, of channels of which the first of all pairs come first, then the second of all: that vectorises."""
    y = x if x.dtype == torch.float64 else x.float()
    a, b = y.chunk(2, dim=-1)
    cos, sin = rotary.cos[..., ::2], rotary.sin[..., ::2]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def _angles(positions: Tensor, head_dim: int) -> Tensor:
    spatial = head_dim // 2 - TEMPORAL_FREQUENCIES
    powers = torch.arange(spatial // 2, dtype=torch.float64) * (2.0 / max(spatial, 1))
    f_space = THETA**-powers
    f_third = THETA ** -(torch.arange(TEMPORAL_FREQUENCIES, dtype=torch.float64) / TEMPORAL_FREQUENCIES)
    row, column, third = positions.unbind(-1)
    return torch.cat(
        (row[..., None] * f_space, column[..., None] * f_space, third[..., None] * f_third), dim=-1
    )


def _tables(positions: Tensor, head_dim: int, device: torch.device) -> Tensor:
    angles = _angles(positions, head_dim).repeat_interleave(2, dim=-1)
    return torch.stack((angles.cos(), angles.sin())).float().to(device)


def frame_rotary(
    grid: tuple[int, int], first: int, frames: int, scale: float, head_dim: int, device: torch.device
) -> Rotary:
    """Tables (frames * N, K) for frames ``first .. first + frames - 1`` of a token grid (h, w) in raster order.

    ``scale`` is ``pt_seq_len``: the row position is ``i / sqrt(h w) * scale``, the third axis the frame index.
    """
    return Rotary(*_frame_tables(grid, first, frames, scale, head_dim, device).unbind())


@torch.compiler.assume_constant_result  # else a compiled training step computes them anew in every layer
@lru_cache(maxsize=256)
@torch.inference_mode(False)  # whoever asks first, others may differentiate through them
def _frame_tables(
    grid: tuple[int, int], first: int, frames: int, scale: float, head_dim: int, device: torch.device
) -> Tensor:
    height, width = grid
    unit = scale / (height * width) ** 0.5
    third, row, column = torch.meshgrid(
        torch.arange(first, first + frames, dtype=torch.float64),
        torch.arange(height, dtype=torch.float64) * unit,
        torch.arange(width, dtype=torch.float64) * unit,
        indexing="ij",
    )
    return _tables(torch.stack((row, column, third), dim=-1).reshape(-1, 3), head_dim, device)


def turns(rotary: Rotary) -> Tensor:
    """The same tables as unit complex numbers (..., S, K / 2): one multiplication rotates all channel pairs."""
    return torch.complex(rotary.cos[..., ::2], rotary.sin[..., ::2])


@lru_cache(maxsize=256)
def frame_turns(
    grid: tuple[int, int], first: int, frames: int, scale: float, head_dim: int, device: torch.device
) -> Tensor:
    """`turns` of `frame_rotary`."""
    return turns(frame_rotary(grid, first, frames, scale, head_dim, device))


def text_rotary(length: int, first: int, scale: float, head_dim: int, device: torch.device) -> Rotary:
    """Tables (L, K) for condition tokens: token j of L sits at (0, 0, first + j / L * scale).

    ``first`` is the position of the window's oldest frame: 0 unless a rolling window has moved on.
    """
    return Rotary(*_text_tables(length, first, scale, head_dim, device).unbind())


@torch.compiler.assume_constant_result
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _text_tables(length: int, first: int, scale: float, head_dim: int, device: torch.device) -> Tensor:
    third = first + torch.arange(length, dtype=torch.float64) / length * scale
    zero = torch.zeros_like(third)
    return _tables(torch.stack((zero, zero, third), dim=-1), head_dim, device)


def concat_rotary(*tables: Rotary) -> Rotary:
    """Tables one after the other along the sequence axis."""
    return Rotary(torch.cat([t.cos for t in tables], dim=-2), torch.cat([t.sin for t in tables], dim=-2))
