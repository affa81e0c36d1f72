"""The small convolutional codec's encoder and decoder, each as one native call: packed weights, see native/encoder.c and
decoder.c.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_int32, c_void_p
from functools import cached_property
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
        ("slices", c_int32),
    ]


class _Residual(Structure):
    _fields_ = [("gain", c_void_p), ("offset", c_void_p), ("first", _Convolution), ("second", _Convolution)]


class _Level(Structure):
    """Of the decoder with ``point`` to the next level, of the encoder with it from the one before."""

    _fields_ = [
        ("blocks", POINTER(_Residual)),
        ("count", c_int32),
        ("channels", c_int32),
        ("point", native.Linear),
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


class _Encoder(Structure):
    _fields_ = [
        ("enter", _Convolution),
        ("leave", _Convolution),
        ("levels", POINTER(_Level)),
        ("background", c_void_p),
        ("mean", c_void_p),
        ("deviation", c_void_p),
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


DECODED_SLICES, ENCODED_SLICES = 2, native.SLICES
"""bfloat16 numbers of an activation, where the matrix unit multiplies: 2 for what becomes bytes, 3, which are all of a
float32, for what the flow reads."""


def frame_order(channels: int, patch: int) -> Tensor:
    """From (F c i j), as pixel shuffles read and write them, to (F i j c), as they lie in frames."""
    return rearrange(torch.arange(channels), "(F c i j) -> (F i j c)", c=3, i=patch, j=patch)


class ResidualParts(NamedTuple):
    """A residual block: x + second(silu(first(silu(norm(x)))))."""

    norm: nn.GroupNorm
    first: nn.Conv2d
    second: nn.Conv2d


class HalfParts(NamedTuple):
    """A codec's encoder or decoder: its first and last convolution, and of each level, in the order of the pass, the width
    and the residual blocks; the 1x1 convolutions between levels.
    """

    enter: nn.Conv2d
    leave: nn.Conv2d
    widths: Sequence[int]
    blocks: Sequence[Sequence[ResidualParts]]
    points: Sequence[PointConv2d]


class CodecParts(NamedTuple):
    """A codec. latent_shape: (C, h, w). frames, patch: F and a cell's side in pixels. background: (3, height, width). mean
    (C, h, w) and deviation (C, 1, 1) of the encoder's latents.
    """

    encoder: HalfParts
    decoder: HalfParts
    latent_shape: tuple[int, int, int]
    frames: int
    patch: int
    background: Tensor
    mean: Tensor
    deviation: Tensor


class NativeCodec:
    """A frozen codec in float32 on the CPU, `ConvCodec.to_input` and `ConvCodec.to_pixels` with it. ``ConvCodec.native``
    makes it; weights are laid out when they are used first.

    A picture's latents and frames are the same, bit for bit, whatever pictures are beside it.
    """

    def __init__(self, kernels: ctypes.CDLL, parts: CodecParts) -> None:
        self._kernels, self._parts = kernels, parts

    @cached_property
    def decode(self) -> NativeDecoder:
        """Standardised latents to frames."""
        return NativeDecoder(self._kernels, self._parts)

    @cached_property
    def encode(self) -> NativeEncoder:
        """Frames to standardised latents."""
        return NativeEncoder(self._kernels, self._parts)


def patches(codec: CodecParts) -> Tensor:
    """The background as (pixels of the finest level, patch * patch * 3)."""
    size = codec.patch
    return rearrange(codec.background, "c (h i) (w j) -> (h w) (i j c)", i=size, j=size)


class _NativeHalf:
    def __init__(self, kernels: ctypes.CDLL, slices: int) -> None:
        self._kernels, self._weights, self._slices = kernels, native.Weights(kernels), slices

    def _convolution(
        self, conv: nn.Conv2d, pixels: int, outputs: Tensor | None = None, inputs: Tensor | None = None
    ) -> _Convolution:
        """With its outputs or inputs in another order; ``pixels``: of a picture."""
        w, weight, bias = self._weights, conv.weight.detach(), conv.get_parameter("bias").detach()
        if outputs is not None:
            weight, bias = weight[outputs], bias[outputs]
        if inputs is not None:
            weight = weight[:, inputs]
        if w.tiles_fit(weight):
            side, laid_out = 0, native.tiles(rearrange(weight, "o k i j -> (i j) o k")).transpose(0, 1)
        else:
            side = 4 if pixels >= LARGE else 2
            laid_out = w.panels(winograd_weights(weight, side))
        shape = conv.in_channels, conv.out_channels, side, self._slices
        return _Convolution(w.pointer(laid_out), w.pointer(w.padded(bias)), *shape)

    def _residuals(self, blocks: Sequence[ResidualParts], pixels: int) -> ctypes.Array[_Residual]:
        w = self._weights
        return w.array(
            _Residual,
            [
                _Residual(
                    *(w.pointer(w.padded(block.norm.get_parameter(name))) for name in ("weight", "bias")),
                    *(self._convolution(conv, pixels) for conv in (block.first, block.second)),
                )
                for block in blocks
            ],
        )


class NativeDecoder(_NativeHalf):
    """See `NativeCodec`."""

    def __init__(self, kernels: ctypes.CDLL, codec: CodecParts) -> None:
        super().__init__(kernels, DECODED_SLICES)
        parts, patch = codec.decoder, codec.patch
        channels, h, w = codec.latent_shape
        self._frames_shape = (codec.frames, *codec.background.shape[1:], 3)
        levels, cells = [], h * w
        ups = [self._up(conv, finer) for conv, finer in zip(parts.points, parts.widths[1:], strict=True)]
        for width, blocks, up in zip(parts.widths, parts.blocks, [*ups, native.Linear()], strict=True):
            levels.append(_Level(self._residuals(blocks, cells), len(blocks), width, up))
            cells *= 4
        order = frame_order(parts.leave.out_channels, patch)
        background = patches(codec)
        period, lanes = background.shape[1], self._weights.panel // 2
        self._decoder = _Decoder(
            self._convolution(parts.enter, h * w),
            self._convolution(parts.leave, cells // 4, outputs=order),
            self._weights.array(_Level, levels),
            self._weights.pointer(background[:, torch.arange(period + lanes) % period]),
            len(levels),
            channels,
            h,
            w,
            codec.frames,
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

    def _up(self, conv: PointConv2d, channels: int) -> native.Linear:
        """The 1x1 convolution with its outputs from (c i j), as pixel shuffles read them, to (i j padded c)."""
        weight = self._weights.padded(rearrange(conv.weight, "(c q) k 1 1 -> q k c", c=channels))
        bias = self._weights.padded(rearrange(conv.get_parameter("bias"), "(c q) -> q c", c=channels))
        return self._weights.linear(rearrange(weight, "q k c -> (q c) k"), bias.flatten())


class NativeEncoder(_NativeHalf):
    """See `NativeCodec`."""

    def __init__(self, kernels: ctypes.CDLL, codec: CodecParts) -> None:
        super().__init__(kernels, ENCODED_SLICES)
        parts, patch, w = codec.encoder, codec.patch, self._weights
        self._latent_shape = codec.latent_shape
        levels, cells = [], codec.background[0].numel() // patch**2
        downs = [self._down(conv, finer) for conv, finer in zip(parts.points, parts.widths[:-1], strict=True)]
        for width, blocks, down in zip(parts.widths, parts.blocks, [native.Linear(), *downs], strict=True):
            levels.append(_Level(self._residuals(blocks, cells), len(blocks), width, down))
            cells //= 4
        self._encoder = _Encoder(
            self._convolution(
                parts.enter,
                codec.background[0].numel() // patch**2,
                inputs=frame_order(parts.enter.in_channels, patch),
            ),
            self._convolution(parts.leave, cells * 4),
            w.array(_Level, levels),
            w.pointer(patches(codec)),
            w.pointer(codec.mean),
            w.pointer(codec.deviation),
            len(levels),
            *codec.latent_shape,
            codec.frames,
            patch,
        )

    def __call__(self, chunks: Tensor) -> Tensor:
        """Chunks (B, F, height, width, 3) uint8 to standardised latents (B, C, h, w) float32."""
        chunks, rows = chunks.contiguous(), len(chunks)
        latents = torch.empty(rows, *self._latent_shape)
        job = ctypes.byref(self._encoder), c_void_p(chunks.data_ptr()), c_void_p(latents.data_ptr())
        if self._kernels.worldmodel_encode(*job, rows, torch.get_num_threads()):
            raise MemoryError("not enough memory to encode frames")
        return latents

    def _down(self, conv: PointConv2d, channels: int) -> native.Linear:
        """The 1x1 convolution with its inputs from (c i j), as pixel shuffles write them, to (i j padded c)."""
        weight = self._weights.padded(rearrange(conv.weight, "o (c q) 1 1 -> o q c", c=channels))
        return self._weights.linear(weight.flatten(1), conv.get_parameter("bias"))
