"""Token order: latents to tokens and back, and which blocks read a frame backwards."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor


def patchify(x: Tensor, patch: int) -> Tensor:
    """Latents (B, T, C, h, w) to tokens (B, T, N, p*p*C): raster order of the grid, channel order ``(p1 p2 c)``."""
    return rearrange(x, "b t c (h p1) (w p2) -> b t (h w) (p1 p2 c)", p1=patch, p2=patch)


def unpatchify(tokens: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """Tokens (B, T, N, p*p*C) back to latents (B, T, C, h, w); ``grid`` is (h / p, w / p) in tokens."""
    return rearrange(
        tokens, "b t (h w) (p1 p2 c) -> b t c (h p1) (w p2)", p1=patch, p2=patch, h=grid[0], w=grid[1]
    )


def flips(num_blocks: int) -> tuple[bool, ...]:
    """Which blocks read the tokens of a frame backwards (``seq_order: L2R``).

    Shallow block i by the parity of i + 1, the deep block by that of K.

    For K = 6: flip, id, flip, id, flip, id. Frames are never reordered.
    """
    return tuple((i + 1) % 2 == 1 for i in range(num_blocks - 1)) + (num_blocks % 2 == 1,)


def reorder(tokens: Tensor, flip: bool) -> Tensor:
    """Raster order to a block's own order (..., N, D) and back: flipping is its own inverse."""
    return tokens.flip(-2) if flip else tokens
