"""The small convolutional codec's decoder as one native call: its packed weights, see native/convolution.c."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_int32, c_void_p
from math import prod
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from worldmodel import native
from worldmodel.packed import PointConv2d

LEVELS = 8
"""The most that the kernel takes."""

LARGE = 256  # pixels of a picture from which on tiles of 4x4 are faster than of 2x2


class _Convolution(Structure):
    _fields_ = [
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("inputs", c_int32),
        ("outputs", c_int32),
        ("side", c_int32),
    ]


class _Residual(Structure):
    _fields_ = [("gain", c_void_p), ("offset", c_void_p), ("first", _Convolution), ("second", _Convolution)]


class _Level(Structure):
    _fields_ = [
        ("blocks", POINTER(_Residual)),
        ("count", c_int32),
        ("channels", c_int32),
        ("up", native.Linear),
    ]


class _Decoder(Structure):
    _fields_ = [
        ("enter", _Convolution),
        ("leave", _Convolution),
        ("levels", POINTER(_Level)),
        ("background", c_void_p),
        ("count", c_int32),
        ("latent_channels", c_int32),
        ("height", c_int32),
        ("width", c_int32),
        ("frames", c_int32),
        ("patch", c_int32),
    ]


def winograd_weights(weight: Tensor, side: int) -> Tensor:
    """Kernels (outputs, inputs, 3, 3) as F(side x side, 3x3) multiplies by them, ((side + 2)^2, outputs, inputs)."""
    points = [0.0, 1.0, -1.0] if side == 2 else [0.0, 0.75, -0.75, 1.5, -1.5]
    rows = [[x**power / prod(x - y for y in points if y != x) for power in range(3)] for x in points]
    g = torch.tensor([*rows, [0, 0, 1]], dtype=torch.float64)
    return torch.einsum("ik,jl,onkl->ijon", g, g, weight.double()).flatten(0, 1).float()


class ResidualParts(NamedTuple):
    """A residual block: x + second(silu(first(silu(norm(x)))))."""

    norm: nn.GroupNorm
    first: nn.Conv2d
    second: nn.Conv2d


class DecoderParts(NamedTuple):
    """A decoder: its first and last convolution, and of each level, coarsest first, the width, the residual blocks, and the
    1x1 convolution to the next (None for the last). latent_shape: (C, h, w). frames, patch: F and a cell's side in pixels.
    background: (3, height, width).
    """

    enter: nn.Conv2d
    leave: nn.Conv2d
    widths: Sequence[int]
    blocks: Sequence[Sequence[ResidualParts]]
    ups: Sequence[PointConv2d | None]
    latent_shape: tuple[int, int, int]
    frames: int
    patch: int
    background: Tensor


class NativeDecoder:
    """A frozen codec's decoder and `ConvCodec.to_pixels`, in float32 on the CPU. ``ConvCodec.native`` makes it.

    A picture's frames are the same, bit for bit, whatever pictures are decoded beside it.
    """

    def __init__(self, kernels: ctypes.CDLL, parts: DecoderParts) -> None:
        channels, h, w = parts.latent_shape
        self._kernels, self._weights = kernels, native.Weights(kernels)
        self._frames_shape = (parts.frames, *parts.background.shape[1:], 3)
        levels, cells = [], h * w
        for width, blocks, conv, finer in zip(
            parts.widths, parts.blocks, parts.ups, [*parts.widths[1:], 0], strict=True
        ):
            residuals = self._weights.array(_Residual, [self._residual(block, cells) for block in blocks])
            up = native.Linear() if conv is None else self._up(conv, finer)
            levels.append(_Level(residuals, len(blocks), width, up))
            cells *= 4
        patch, leave = parts.patch, parts.leave
        # from (F c i j), as pixel shuffles read them, to (F i j c), as they lie in frames
        order = rearrange(torch.arange(leave.out_channels), "(F c i j) -> (F i j c)", c=3, i=patch, j=patch)
        background = rearrange(parts.background, "c (h i) (w j) -> (h w) (i j c)", i=patch, j=patch)
        period, lanes = background.shape[1], self._weights.panel // 2
        self._decoder = _Decoder(
            self._convolution(parts.enter, h * w),
            self._convolution(leave, cells // 4, order),
            self._weights.array(_Level, levels),
            self._weights.pointer(background[:, torch.arange(period + lanes) % period]),
            len(levels),
            channels,
            h,
            w,
            parts.frames,
            patch,
        )

    def __call__(self, latents: Tensor) -> Tensor:
        """Standardised latents (B, C, h, w) float32 to frames (B, F, height, width, 3) uint8."""
        latents, rows = latents.contiguous(), len(latents)
        frames = torch.empty(rows, *self._frames_shape, dtype=torch.uint8)
        job = ctypes.byref(self._decoder), c_void_p(latents.data_ptr()), c_void_p(frames.data_ptr())
        if self._kernels.worldmodel_decode(*job, rows, torch.get_num_threads()):
            raise MemoryError("not enough memory to decode latents")
        return frames

    def _convolution(self, conv: nn.Conv2d, pixels: int, order: Tensor | slice = slice(None)) -> _Convolution:
        """With its outputs in another order; ``pixels``: of a picture."""
        w, weight = self._weights, conv.weight[order]
        bias = w.pointer(w.padded(conv.get_parameter("bias")[order]))
        if w.tiles_fit(weight):
            side, laid_out = 0, native.tiles(rearrange(weight, "o k i j -> (i j) o k")).transpose(0, 1)
        else:
            side = 4 if pixels >= LARGE else 2
            laid_out = w.panels(winograd_weights(weight, side))
        return _Convolution(w.pointer(laid_out), bias, conv.in_channels, conv.out_channels, side)

    def _residual(self, block: ResidualParts, pixels: int) -> _Residual:
        w = self._weights
        return _Residual(
            *(w.pointer(w.padded(block.norm.get_parameter(name))) for name in ("weight", "bias")),
            *(self._convolution(conv, pixels) for conv in (block.first, block.second)),
        )

    def _up(self, conv: PointConv2d, channels: int) -> native.Linear:
        """The 1x1 convolution with its outputs from (c i j), as pixel shuffles read them, to (i j padded c)."""
        weight = self._weights.padded(rearrange(conv.weight, "(c q) k 1 1 -> q k c", c=channels))
        bias = self._weights.padded(rearrange(conv.get_parameter("bias"), "(c q) -> q c", c=channels))
        return self._weights.linear(rearrange(weight, "q k c -> (q c) k"), bias.flatten())
