"""Stable Diffusion's picture codec, through diffusers' `AutoencoderKL`: one picture, one latent frame, nothing remembered.

Latents are the posterior's mean times ``scaling_factor``, which brings them to about unit variance (Rombach et al.,
arXiv 2112.10752, app. G). STARFlow (arXiv 2506.06276) models those of ``stabilityai/sd-vae-ft-ema``.

Axis letters: B batch, T latent frames, F pixel frames (as many), C latent channels; h, w latent grid; height, width pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from worldmodel.codec.base import CodecState
from worldmodel.errors import ConfigError, InputError
from worldmodel.files import config_from_dict, require_at_least

OURS = {"height", "width", "kind"}
"""Fields of `KLCodecConfig` that are not arguments of `AutoencoderKL`."""

_OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What diffusers called the attention's maps when Stable Diffusion's codecs were published, and what it calls them now."""


@dataclass(frozen=True)
class KLCodecConfig:
    """`AutoencoderKL`'s own arguments under their own names.

    height, width: pixels of a picture, multiples of the stride. block_out_channels: channels of each level, finest first;
    every further one halves the picture. layers_per_block: residual blocks of a level. latent_channels: C.
    """

    height: int = 256
    width: int = 256
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    latent_channels: int = 4
    scaling_factor: float = 0.18215
    kind: Literal["kl"] = "kl"

    def __post_init__(self) -> None:
        """Raises ConfigError for sizes that no codec has."""
        require_at_least(1, self, "height", "width", "block_out_channels", "layers_per_block")
        require_at_least(1, self, "norm_num_groups", "latent_channels")
        if not self.block_out_channels or any(n % self.norm_num_groups for n in self.block_out_channels):
            raise ConfigError(
                f"kl codec: block_out_channels is {self.block_out_channels}, expected multiples of norm_num_groups "
                f"{self.norm_num_groups}"
            )
        if self.height % self.stride or self.width % self.stride:
            raise ConfigError(
                f"frames of {self.height}x{self.width} are not multiples of stride {self.stride}"
            )
        if self.scaling_factor <= 0:
            raise ConfigError(f"kl codec: scaling_factor is {self.scaling_factor}, expected above 0")

    @property
    def frames(self) -> int:
        """Pixel frames of a latent frame."""
        return 1

    @property
    def first_frames(self) -> int:
        """Pixel frames of the first latent frame."""
        return 1

    @property
    def stride(self) -> int:
        """Pixels of a latent cell's side."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        return self.latent_channels, self.height // self.stride, self.width // self.stride

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `AutoencoderKL`."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in OURS}
        levels = len(self.block_out_channels)
        return values | {
            "block_out_channels": list(self.block_out_channels),
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "in_channels": 3,
            "out_channels": 3,
            "act_fn": "silu",
        }

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any], frame_size: tuple[int, int]) -> KLCodecConfig:
        """From the ``config.json`` of a diffusers ``vae`` folder; ``scaling_factor`` may be absent, as in old ones.

        Raises:
            ConfigError: another class, or an architecture that is not Stable Diffusion's.
        """
        if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
            raise ConfigError(
                f"codec is a {config['_class_name']}, expected AutoencoderKL (Stable Diffusion's)"
            )
        names = {f.name for f in fields(cls)} - OURS
        if missing := sorted(names - set(config) - {"scaling_factor"}):
            raise ConfigError(f"codec config lacks {', '.join(missing)}; is it Stable Diffusion's?")
        values = {k: v for k, v in config.items() if k in names}
        made = config_from_dict(
            cls, {**values, "height": frame_size[0], "width": frame_size[1]}, "codec config"
        )
        plain = {"shift_factor": None, "latents_mean": None, "latents_std": None} | dict.fromkeys(
            ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"), True
        )
        for name, value in (made.arguments() | plain).items():
            if config.get(name, value) != value:
                raise ConfigError(f"codec config: {name} is {config[name]!r}, expected {value!r}")
        return made


def present_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a published file under the names that diffusers uses now."""
    renamed = {}
    for key, value in tensors.items():
        parts = key.split(".")
        if "attentions" in parts:
            parts = [_OLDER.get(part, part) for part in parts]
        renamed[".".join(parts)] = value
    return renamed


def autoencoder(config: KLCodecConfig) -> Any:
    """A diffusers `AutoencoderKL` with random weights.

    Raises:
        ConfigError: diffusers is not installed.
    """
    try:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    except ImportError as error:
        raise ConfigError("this picture codec needs diffusers: pip install 'worldmodel[hub]'") from error
    return AutoencoderKL(**config.arguments()).eval()


class KLCodec(nn.Module):
    """See the module's text. ``vae`` is a diffusers `AutoencoderKL`; keys are those of its file, after ``vae.``."""

    def __init__(self, config: KLCodecConfig, vae: Any = None) -> None:
        super().__init__()
        self.config = config
        self.vae = autoencoder(config) if vae is None else vae

    def at(self, frame_size: tuple[int, int]) -> KLCodec:
        """The same weights for pictures of another size (height, width)."""
        return KLCodec(replace(self.config, height=frame_size[0], width=frame_size[1]), self.vae)

    @property
    def temporal_stride(self) -> int:
        """Pixel frames of a latent frame."""
        return self.config.frames

    @property
    def first_frames(self) -> int:
        """Pixel frames of the first latent frame."""
        return self.config.first_frames

    @property
    def spatial_stride(self) -> int:
        """Pixels of a latent cell's side."""
        return self.config.stride

    @property
    def latent_channels(self) -> int:
        """C."""
        return self.config.latent_channels

    def initial_state(self, batch: int) -> CodecState:
        """Nothing: pictures are coded alone."""
        return {}

    def begun(self, state: CodecState) -> Tensor | None:
        """None: all latent frames are alike."""
        return None

    def encode(self, frames: Tensor, state: CodecState) -> tuple[Tensor, CodecState]:
        """Frames (B, F, height, width, 3) uint8 RGB to latents (B, F, C, h, w) float32, the posterior's means.

        Raises:
            InputError: frames of another shape or dtype.
        """
        size = (self.config.height, self.config.width, 3)
        if frames.ndim != 5 or tuple(frames.shape[2:]) != size or not frames.shape[1]:
            raise InputError(
                f"frames have shape {tuple(frames.shape)}, expected (batch, time, {size[0]}, {size[1]}, 3)"
            )
        if frames.dtype != torch.uint8:
            raise InputError(f"frames have dtype {frames.dtype}, expected uint8 RGB from 0 to 255")
        pixels = rearrange(frames, "B F height width c -> (B F) c height width").float() / 127.5 - 1.0
        mean = self.vae.encode(pixels).latent_dist.mean
        return rearrange(mean * self.config.scaling_factor, "(B F) C h w -> B F C h w", B=len(frames)), state

    def decode(self, latents: Tensor, state: CodecState) -> tuple[Tensor, CodecState]:
        """Latents (B, T, C, h, w) to frames (B, T, height, width, 3) uint8 RGB.

        Raises:
            InputError: latents of another shape or dtype.
        """
        shape = self.config.latent_shape
        if latents.ndim != 5 or tuple(latents.shape[2:]) != shape or not latents.is_floating_point():
            raise InputError(
                f"latents have shape {tuple(latents.shape)} and dtype {latents.dtype}, "
                f"expected floating point (batch, time, {', '.join(map(str, shape))})"
            )
        z = rearrange(latents.float() / self.config.scaling_factor, "B T C h w -> (B T) C h w")
        pixels = self.vae.decode(z).sample.clamp(-1.0, 1.0)
        frames = ((pixels + 1.0) * 127.5).round().to(torch.uint8)
        return rearrange(frames, "(B T) c height width -> B T height width c", B=len(latents)), state
