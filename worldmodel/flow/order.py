"""Token order: latents to tokens and back, and which blocks read a frame backwards.

Spelt out in torch, since every step does this several times: einops takes three times as long.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

FEW = 4096
"""Numbers of a frame up to which they are moved one by one: torch moves short runs of many axes more slowly."""


@torch.compiler.assume_constant_result
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _places(channels: int, grid: tuple[int, int], patch: int, device: torch.device) -> Tensor:
    """(2, C * h * w): where the numbers of a frame's tokens are to be found in its latent, and where its own in those."""
    size = channels * grid[0] * grid[1] * patch**2
    there = _patchified(torch.arange(size).view(1, 1, channels, grid[0] * patch, -1), patch).flatten()
    return torch.stack((there, there.argsort())).to(device)


def patchify(x: Tensor, patch: int) -> Tensor:
    """Latents (B, T, C, h, w) to tokens (B, T, N, p*p*C): raster order of the grid, channel order ``(p1 p2 c)``."""
    batch, frames, channels, height, width = x.shape
    if channels * height * width > FEW:
        return _patchified(x, patch)
    there = _places(channels, (height // patch, width // patch), patch, x.device)[0]
    return x.flatten(0, 1).flatten(1).index_select(1, there).view(batch, frames, -1, patch * patch * channels)


def _patchified(x: Tensor, patch: int) -> Tensor:
    batch, frames, channels, height, width = x.shape
    cells = x.reshape(batch, frames, channels, height // patch, patch, width // patch, patch)
    return cells.permute(0, 1, 3, 5, 4, 6, 2).reshape(batch, frames, -1, patch * patch * channels)


def unpatchify(tokens: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """Tokens (B, T, N, p*p*C) back to latents (B, T, C, h, w); ``grid`` is (h / p, w / p) in tokens."""
    batch, frames, count, size = tokens.shape
    height, width = grid[0] * patch, grid[1] * patch
    if count * size <= FEW:
        back = _places(size // patch**2, grid, patch, tokens.device)[1]
        return tokens.flatten(0, 1).flatten(1).index_select(1, back).view(batch, frames, -1, height, width)
    cells = tokens.reshape(batch, frames, *grid, patch, patch, -1)
    return cells.permute(0, 1, 6, 2, 4, 3, 5).reshape(batch, frames, -1, height, width)


def flips(num_blocks: int) -> tuple[bool, ...]:
    """Which blocks read the tokens of a frame backwards (``seq_order: L2R``).

    Shallow block i by the parity of i + 1, the deep block by that of K.

    For K = 6: flip, id, flip, id, flip, id. Frames are never reordered.
    """
    return tuple((i + 1) % 2 == 1 for i in range(num_blocks - 1)) + (num_blocks % 2 == 1,)


def reorder(tokens: Tensor, flip: bool) -> Tensor:
    """Raster order to a block's own order (..., N, D) and back: flipping is its own inverse."""
    return tokens.flip(-2) if flip else tokens
