"""A small convolutional codec: a chunk of F frames, less the background, to one latent frame and back.

Axis letters: B batch, T latent frames (chunks), F pixel frames of a chunk, C latent channels; h, w latent
grid; height, width pixels. Inside, a chunk is one picture of 3 F channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from worldmodel.codec.base import CodecState
from worldmodel.codec.native import LEVELS, CodecParts, HalfParts, NativeCodec, ResidualParts
from worldmodel.errors import CheckpointError, ConfigError, InputError
from worldmodel.files import load_tensors, require_at_least, save_tensors
from worldmodel.invariance import PICTURES, with_rows
from worldmodel.native import library
from worldmodel.packed import Packable, PointConv2d, is_packed, narrow

PIXEL_SCALE = 128.0


@dataclass(frozen=True)
class ConvCodecConfig:
    """Shape of the codec.

    height, width: pixels of the background, multiples of the stride. frames: F. latent_channels: C. patch:
    pixels of a cell's side at the finest level. widths: channels of each level, at half the size of the last.
    encoder_blocks, decoder_blocks: residual blocks of each level.
    """

    height: int = 64
    width: int = 64
    frames: int = 4
    latent_channels: int = 8
    patch: int = 4
    widths: tuple[int, ...] = (64, 96, 160)
    encoder_blocks: tuple[int, ...] = (1, 1, 1)
    decoder_blocks: tuple[int, ...] = (2, 2, 1)
    kind: Literal["conv"] = "conv"

    def __post_init__(self) -> None:
        """Raises ConfigError if the parts do not fit each other, or for sizes that no model has."""
        require_at_least(1, self, "height", "width", "frames", "latent_channels", "patch", "widths")
        require_at_least(0, self, "encoder_blocks", "decoder_blocks")
        if not len(self.widths) == len(self.encoder_blocks) == len(self.decoder_blocks) >= 1:
            raise ConfigError("codec widths, encoder_blocks and decoder_blocks must have one entry a level")
        if self.height % self.stride or self.width % self.stride:
            raise ConfigError(
                f"frames of {self.height}x{self.width} are not multiples of stride {self.stride}"
            )

    @property
    def first_frames(self) -> int:
        """Pixel frames of the first latent frame: F, as of any other."""
        return self.frames

    @property
    def stride(self) -> int:
        """Pixels of a latent cell's side."""
        return self.patch * 2 ** (len(self.widths) - 1)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        return self.latent_channels, self.height // self.stride, self.width // self.stride


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around the identity; starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) to the same."""
        return x + self.second(F.silu(self.first(F.silu(self.norm(x)))))


def _conv(inputs: int, outputs: int, kernel: int) -> nn.Conv2d:
    return PointConv2d(inputs, outputs) if kernel == 1 else nn.Conv2d(inputs, outputs, kernel, padding=1)


def _blocks(channels: int, count: int) -> list[nn.Module]:
    return [ResidualBlock(channels) for _ in range(count)]


def encoder(config: ConvCodecConfig) -> nn.Sequential:
    """(B, 3F, height, width) to (B, C, h, w), not standardised."""
    channels, size = 3 * config.frames, config.patch
    layers: list[nn.Module] = []
    for level, (width, blocks) in enumerate(zip(config.widths, config.encoder_blocks, strict=True)):
        layers += [nn.PixelUnshuffle(size), _conv(channels * size**2, width, 1 if level else 3)]
        layers += _blocks(width, blocks)
        channels, size = width, 2
    return nn.Sequential(*layers, nn.SiLU(), nn.Conv2d(channels, config.latent_channels, 3, padding=1))


def decoder(config: ConvCodecConfig) -> nn.Sequential:
    """(B, C, h, w), standardised, to (B, 3F, height, width)."""
    layers: list[nn.Module] = [nn.Conv2d(config.latent_channels, config.widths[-1], 3, padding=1)]
    for level in reversed(range(len(config.widths))):
        layers += _blocks(config.widths[level], config.decoder_blocks[level])
        channels, size = (config.widths[level - 1], 2) if level else (3 * config.frames, config.patch)
        last = _conv(config.widths[level], channels * size**2, 1 if level else 3)
        layers += [*([] if level else [nn.SiLU()]), last, nn.PixelShuffle(size)]
    nn.init.normal_(last.weight, std=1e-3)
    nn.init.zeros_(last.get_parameter("bias"))
    return nn.Sequential(*layers)


class ConvCodec(Packable):
    """See the module's docstring. Chunks are coded alone: the streaming state is empty.

    Buffers, fitted on the training data: ``background`` (3, height, width) in pixels, ``latent_mean`` (C,
    h, w), and ``latent_std`` (C, 1, 1), the root mean square of what is left when the mean is taken off.
    """

    background: Tensor
    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: ConvCodecConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder(config)
        self.decoder = decoder(config)
        self.register_buffer("background", torch.zeros(3, config.height, config.width))
        self.register_buffer("latent_mean", torch.zeros(config.latent_shape))
        self.register_buffer("latent_std", torch.ones(config.latent_channels, 1, 1))

    @property
    def temporal_stride(self) -> int:
        """F: pixel frames of a latent frame."""
        return self.config.frames

    @property
    def first_frames(self) -> int:
        """Pixel frames of the first latent frame: F, as of any other."""
        return self.config.frames

    @property
    def spatial_stride(self) -> int:
        """Pixels of a latent cell's side."""
        return self.config.stride

    @property
    def latent_channels(self) -> int:
        """C."""
        return self.config.latent_channels

    def initial_state(self, batch: int) -> CodecState:
        """An empty state: nothing is remembered between chunks."""
        return {}

    @property
    def native(self) -> NativeCodec | None:
        """The codec for the kernels of `worldmodel.native`, where they serve; laid out at first use."""
        if self._waiting:
            kernels = library() if len(self.config.widths) <= LEVELS else None
            self._kernel = NativeCodec(kernels, self._parts()) if kernels else None
            self._waiting = False
        return cast("NativeCodec | None", self._kernel)

    def _parts(self) -> CodecParts:
        c = self.config

        def half(module: nn.Module, widths: Sequence[int], counts: Sequence[int]) -> HalfParts:
            layers = list(module.children())
            blocks = [
                ResidualParts(m.norm, m.first, m.second) for m in layers if isinstance(m, ResidualBlock)
            ]
            ends = list(accumulate(counts))
            first, *points, last = (m for m in layers if isinstance(m, nn.Conv2d))
            return HalfParts(
                first,
                last,
                widths,
                [blocks[end - count : end] for count, end in zip(counts, ends, strict=True)],
                [cast(PointConv2d, point) for point in points],
            )

        return CodecParts(
            half(self.encoder, c.widths, c.encoder_blocks),
            half(self.decoder, c.widths[::-1], c.decoder_blocks[::-1]),
            c.latent_shape,
            c.frames,
            c.patch,
            self.background,
            self.latent_mean,
            self.latent_std,
        )

    def _pictures(self, layers: nn.Module) -> int:
        return 1 if is_packed(layers) else PICTURES

    def to_input(self, chunks: Tensor) -> Tensor:
        """Chunks (B, F, height, width, 3) uint8, less the background, as (B, 3F, height, width)."""
        pixels = rearrange(chunks.float(), "B F height width c -> B F c height width")
        difference = (pixels - self.background) / PIXEL_SCALE
        channels = rearrange(difference, "B F c height width -> B (F c) height width")
        return channels.contiguous(memory_format=torch.channels_last)

    def to_pixels(self, output: Tensor) -> Tensor:
        """What the decoder gives (B, 3F, height, width) to chunks (B, F, height, width, 3) uint8."""
        difference = rearrange(output.float(), "B (F c) height width -> B F c height width", c=3)
        pixels = (difference * PIXEL_SCALE + self.background).round().clamp(0, 255)
        return rearrange(pixels, "B F c height width -> B F height width c").to(torch.uint8)

    def begun(self, state: CodecState) -> Tensor | None:
        """None: all chunks have as many frames."""
        return None

    def encode(self, frames: Tensor, state: CodecState) -> tuple[Tensor, CodecState]:
        """Frames (B, F T, height, width, 3) uint8 RGB to standardised latents (B, T, C, h, w) float32.

        Raises:
            InputError: frames of another shape or dtype.
        """
        size = (self.config.height, self.config.width, 3)
        if frames.ndim != 5 or tuple(frames.shape[2:]) != size or frames.shape[1] % self.config.frames:
            raise InputError(
                f"frames have shape {tuple(frames.shape)}, expected (batch, {self.config.frames} n, "
                f"{size[0]}, {size[1]}, 3)"
            )
        if frames.dtype != torch.uint8:
            raise InputError(f"frames have dtype {frames.dtype}, expected uint8 RGB from 0 to 255")
        batch = len(frames)
        chunks = rearrange(frames, "B (T F) height width c -> (B T) F height width c", F=self.config.frames)
        if self.native is not None and chunks.device.type == "cpu":
            return self.native.encode(chunks).unflatten(0, (batch, -1)), state
        latents = with_rows(self._pictures(self.encoder), lambda x: self.encoder(self.to_input(x)), chunks)
        latents = (latents - self.latent_mean) / self.latent_std
        return rearrange(latents.contiguous(), "(B T) C h w -> B T C h w", B=batch), state

    def decode(self, latents: Tensor, state: CodecState) -> tuple[Tensor, CodecState]:
        """Standardised latents (B, T, C, h, w) to frames (B, F T, height, width, 3) uint8 RGB.

        Raises:
            InputError: latents of another shape or not floating point.
        """
        config = self.config
        size = config.latent_shape
        if latents.ndim != 5 or tuple(latents.shape[2:]) != size or not latents.is_floating_point():
            raise InputError(
                f"latents have shape {tuple(latents.shape)} and dtype {latents.dtype}, "
                f"expected floating point (batch, time, {', '.join(map(str, size))})"
            )
        batch = len(latents)
        if self.native is not None and latents.dtype == torch.float32:
            frames = self.native.decode(latents.flatten(0, 1))
            return frames.view(batch, -1, *frames.shape[2:]), state
        rows = rearrange(latents, "B T C h w -> (B T) C h w").contiguous(memory_format=torch.channels_last)
        chunks = with_rows(self._pictures(self.decoder), lambda x: self.to_pixels(self.decoder(x)), rows)
        return rearrange(chunks, "(B T) F height width c -> B (T F) height width c", B=batch), state


def save_codec(path: Path, codec: ConvCodec) -> None:
    """Weights as float16, which must represent them exactly (see `round_weights`), and buffers as float32.

    Raises:
        CheckpointError: the file cannot be written.
    """
    weights = {name: weight.half() for name, weight in codec.named_parameters()}
    save_tensors(path, weights | dict(codec.named_buffers()))


def load_codec(path: Path, config: ConvCodecConfig) -> ConvCodec:
    """The codec that `save_codec` wrote, frozen, in float32.

    Raises:
        CheckpointError: the file is missing, corrupt, or does not fit the configuration.
    """
    codec = ConvCodec(config)
    tensors = {name: tensor.float() for name, tensor in load_tensors(path).items()}
    expected = codec.state_dict()
    missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    misfits = [n for n in expected if n in tensors and tensors[n].shape != expected[n].shape]
    if missing or extra or misfits:
        raise CheckpointError(
            f"{path} does not fit its configuration: missing {missing}, unknown {extra}, misshapen {misfits}"
        )
    codec.load_state_dict(tensors)
    return channels_last(codec).requires_grad_(False).eval()


def channels_last(codec: ConvCodec) -> ConvCodec:
    """The codec with its kernels laid out as convolutions on CPUs like them best, in place."""
    for weight in codec.parameters():
        if weight.ndim == 4:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return codec


@torch.no_grad()
def round_weights(module: nn.Module) -> None:
    """Round every parameter, in place, to what float16 represents, kernels as in `narrow`."""
    for weight in module.parameters():
        weight.copy_(narrow(weight) if weight.ndim > 1 else weight.half())
