"""Wan2.2's causal video codec, through diffusers' `AutoencoderKLWan`, streamed with explicit caches.

The first latent frame is one pixel frame, every later one four: 1 + 4 k frames make 1 + k latents. Latents are
standardised by the published mean and deviation; those after the first are multiplied by ``later_scale`` (STARFlow-V's
0.6) before the flow and divided by it before decoding.

diffusers keeps, for each causal convolution, the last frames of its input in a list whose entries are None, a marker or
a tensor. Here they are tensors of one shape throughout, zeros before the first frame (what the padding would be), and
one flag a row, ``started``. The two resamplings in time are what the first frame skips; rows before and after their
first frame therefore run apart.

Axis letters: B batch, T latent frames, F pixel frames, C latent channels; h, w latent grid; height, width pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from worldmodel.codec.base import CodecState
from worldmodel.codec.taehv import FastDecoder
from worldmodel.errors import ConfigError, InputError
from worldmodel.files import config_from_dict, require_at_least

OURS = {"height", "width", "later_scale", "decode_dtype", "kind"}
"""Fields of `WanCodecConfig` that are not arguments of `AutoencoderKLWan`."""


@dataclass(frozen=True)
class WanCodecConfig:
    """`AutoencoderKLWan`'s own arguments under their own names, and what STARFlow-V adds.

    height, width: pixels of a frame, multiples of the stride. base_dim, decoder_base_dim: channels of encoder and
    decoder. z_dim: C. dim_mult: one factor a level. temperal_downsample: (as diffusers spells it) which of the halvings
    in space also halve time. latents_mean, latents_std: (C,). patch_size: pixels of a cell's side at the finest level.
    later_scale: see the module's text.
    decode_dtype: what the decoder computes in; the encoder always uses float32.
    """

    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    height: int = 480
    width: int = 848
    base_dim: int = 160
    decoder_base_dim: int = 256
    z_dim: int = 48
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    patch_size: int = 2
    later_scale: float = 0.6
    decode_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    kind: Literal["wan"] = "wan"

    def __post_init__(self) -> None:
        """Raises ConfigError for sizes that no codec has."""
        require_at_least(1, self, "base_dim", "decoder_base_dim", "z_dim", "dim_mult", "num_res_blocks")
        require_at_least(1, self, "patch_size")
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise ConfigError("wan codec: temperal_downsample must have one entry fewer than dim_mult")
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.z_dim:
                raise ConfigError(
                    f"wan codec: {name} must have one entry for each of the {self.z_dim} channels"
                )
        if self.height % self.stride or self.width % self.stride or min(self.height, self.width) < 1:
            raise ConfigError(
                f"frames of {self.height}x{self.width} are not multiples of stride {self.stride}"
            )
        if self.later_scale <= 0 or min(self.latents_std) <= 0:
            raise ConfigError("wan codec: later_scale and latents_std must be positive")

    @property
    def frames(self) -> int:
        """Pixel frames of every latent frame after the first."""
        return 2 ** sum(self.temperal_downsample)

    @property
    def first_frames(self) -> int:
        """Pixel frames of the first latent frame."""
        return 1

    @property
    def stride(self) -> int:
        """Pixels of a latent cell's side."""
        return self.patch_size * 2 ** len(self.temperal_downsample)

    @property
    def latent_channels(self) -> int:
        """C."""
        return self.z_dim

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        return self.z_dim, self.height // self.stride, self.width // self.stride

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `AutoencoderKLWan`."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in OURS}
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        channels = 3 * self.patch_size**2
        return values | {
            "is_residual": True,
            "in_channels": channels,
            "out_channels": channels,
            "scale_factor_temporal": self.frames,
            "scale_factor_spatial": self.stride,
        }

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any], frame_size: tuple[int, int]) -> WanCodecConfig:
        """From the ``config.json`` of a diffusers ``vae`` folder.

        Raises:
            ConfigError: another class, or an architecture that is not Wan2.2's.
        """
        if config.get("_class_name", "AutoencoderKLWan") != "AutoencoderKLWan":
            raise ConfigError(f"codec is a {config['_class_name']}, expected AutoencoderKLWan (Wan2.2)")
        names = {f.name for f in fields(cls)} - OURS
        if missing := sorted(names - set(config)):
            raise ConfigError(f"codec config lacks {', '.join(missing)}; is it Wan2.2's (48 channels)?")
        values = {k: v for k, v in config.items() if k in names}
        made = config_from_dict(
            cls, {**values, "height": frame_size[0], "width": frame_size[1]}, "codec config"
        )
        for name, value in made.arguments().items():
            if config.get(name, value) != value:
                raise ConfigError(f"codec config: {name} is {config[name]!r}, expected {value!r} (Wan2.2)")
        if config.get("attn_scales"):
            raise ConfigError("codec config: attn_scales must be empty (Wan2.2)")
        return made


class CacheLayout(NamedTuple):
    """What the causal convolutions of an encoder or decoder remember of one row.

    shapes: (channels, frames, h', w') each, in the order in which they run. resampling: those that resample time, which
    the first frame goes past.
    """

    shapes: tuple[tuple[int, ...], ...]
    resampling: frozenset[int]


@lru_cache(maxsize=16)
def cache_layouts(config: WanCodecConfig) -> dict[str, CacheLayout]:
    """The layouts of "encoder" and "decoder", found by running both on the meta device."""
    with torch.device("meta"):
        vae = autoencoder(config)
        size, (channels, h, w) = config.patch_size, config.latent_shape
        pictures = torch.empty(1, 3 * size**2, 1, config.height // size, config.width // size)
        latent = torch.empty(1, channels, 1, h, w, dtype=getattr(torch, config.decode_dtype))
    return {
        "encoder": _layout(vae.encoder, pictures, pictures.repeat(1, 1, config.frames, 1, 1), {}),
        "decoder": _layout(vae.decoder, latent, latent, {"first_chunk": True}),
    }


def _layout(part: nn.Module, first: Tensor, later: Tensor, at_first: dict[str, bool]) -> CacheLayout:
    cache: list[Any] = [None] * len(list(part.modules()))
    index = [0]
    part(first, feat_cache=cache, feat_idx=index, **at_first)
    skipped = {i for i in range(index[0]) if not isinstance(cache[i], Tensor)}
    part(later, feat_cache=cache, feat_idx=[0])
    shapes = tuple(tuple(x.shape[1:]) for x in cache[: index[0]])
    return CacheLayout(shapes, frozenset(skipped | {i for i, x in enumerate(shapes) if x[1] == 1}))


def autoencoder(config: WanCodecConfig) -> Any:
    """A diffusers `AutoencoderKLWan` with random weights, the decoder in ``decode_dtype``.

    Raises:
        ConfigError: diffusers is not installed.
    """
    try:
        from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    except ImportError as error:
        raise ConfigError("the Wan2.2 codec needs diffusers: pip install 'worldmodel[hub]'") from error
    vae = AutoencoderKLWan(**config.arguments())
    dtype = getattr(torch, config.decode_dtype)
    vae.decoder.to(dtype)
    vae.post_quant_conv.to(dtype)
    return vae.eval()


class WanCodec(nn.Module):
    """See the module's text. ``vae`` is a diffusers `AutoencoderKLWan`; keys are those of its file, after ``vae.``.

    ``fast``, where it is given, decodes in place of the vae's own decoder.

    State: ``encoder.started`` and ``decoder.started`` (B,) bool, and one tensor (B, channels, frames, h', w') for each
    causal convolution, ``encoder.0`` and so on (for ``fast``: the last input of each of its memory blocks).
    """

    def __init__(self, config: WanCodecConfig, vae: Any = None, fast: FastDecoder | None = None) -> None:
        super().__init__()
        self.config = config
        self.vae = autoencoder(config) if vae is None else vae
        self.fast = fast

    def with_fast_decoder(self, fast: FastDecoder) -> WanCodec:
        """The same encoder with another decoder."""
        example = next(self.vae.decoder.parameters())
        return WanCodec(self.config, self.vae, fast.to(example.device, example.dtype))

    def at(self, frame_size: tuple[int, int]) -> WanCodec:
        """The same weights for frames of another size (height, width)."""
        return WanCodec(replace(self.config, height=frame_size[0], width=frame_size[1]), self.vae, self.fast)

    @property
    def temporal_stride(self) -> int:
        """Pixel frames of every latent frame after the first."""
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
        return self.config.z_dim

    def initial_state(self, batch: int) -> CodecState:
        """Zeros, which are what the convolutions are padded with; expanded, so that they take no memory."""
        state = {}
        for side, layout in cache_layouts(self.config).items():
            example = next(getattr(self.vae, side).parameters())
            state[f"{side}.started"] = torch.zeros(batch, dtype=torch.bool, device=example.device)
            shapes: Sequence[tuple[int, ...]] = layout.shapes
            if side == "decoder" and self.fast is not None:
                shapes = self.fast.memory_shapes(*self.config.latent_shape[1:])
            for i, shape in enumerate(shapes):
                state[f"{side}.{i}"] = example.new_zeros(()).expand(batch, *shape)
        return state

    def begun(self, state: CodecState) -> Tensor | None:
        """(B,) bool: clips whose first latent frame, of one picture, has passed."""
        return state["decoder.started"]

    def encode(self, frames: Tensor, state: CodecState) -> tuple[Tensor, CodecState]:
        """Frames (B, F, height, width, 3) uint8 RGB to latents (B, T, C, h, w) float32.

        F is 1 + 4 (T - 1) for clips that begin, 4 T for clips that go on.

        Raises:
            InputError: frames of another shape or dtype, or rows of which some begin and some go on.
        """
        size = (self.config.height, self.config.width, 3)
        going = self._started(state, "encoder")
        first = 0 if going else 1
        many = frames.shape[1] - first if frames.ndim == 5 else -1
        if many < 0 or many % self.config.frames or tuple(frames.shape[2:]) != size or not frames.shape[1]:
            raise InputError(
                f"frames have shape {tuple(frames.shape)}, expected (batch, {'' if going else '1 + '}"
                f"{self.config.frames} n, {size[0]}, {size[1]}, 3)"
            )
        if frames.dtype != torch.uint8:
            raise InputError(f"frames have dtype {frames.dtype}, expected uint8 RGB from 0 to 255")
        p = self.config.patch_size
        pixels = rearrange(frames, "B F (h p) (w q) c -> B (c q p) F h w", p=p, q=p).float() / 127.5 - 1.0
        latents = []
        for piece in pixels.split([1] * first + [self.config.frames] * (many // self.config.frames), dim=2):
            hidden, state = self._run("encoder", piece, state)
            mean = self.vae.quant_conv(hidden).chunk(2, dim=1)[0]
            latents.append((mean - self._column("latents_mean", mean)) / self._column("latents_std", mean))
        return rearrange(
            self._scaled(latents, going, self.config.later_scale), "B C T h w -> B T C h w"
        ), state

    def decode(self, latents: Tensor, state: CodecState) -> tuple[Tensor, CodecState]:
        """Latents (B, T, C, h, w) to frames (B, F, height, width, 3) uint8 RGB; F as in `encode`.

        Raises:
            InputError: latents of another shape or dtype, or rows of which some begin and some go on.
        """
        pixels, state = self.decode_pixels(latents, state)
        frames = ((pixels.float() + 1.0) * 127.5).round().to(torch.uint8)
        return rearrange(frames, "B c F height width -> B F height width c"), state

    def decode_pixels(self, latents: Tensor, state: CodecState) -> tuple[Tensor, CodecState]:
        """As `decode`, before rounding: (B, 3, F, height, width) from -1 to 1 in the decoder's dtype."""
        shape = self.config.latent_shape
        if latents.ndim != 5 or tuple(latents.shape[2:]) != shape or not latents.is_floating_point():
            raise InputError(
                f"latents have shape {tuple(latents.shape)} and dtype {latents.dtype}, "
                f"expected floating point (batch, time, {', '.join(map(str, shape))})"
            )
        going = self._started(state, "decoder")
        each = list(rearrange(latents.float(), "B T C h w -> B C T h w").split(1, dim=2))
        z = self._scaled(each, going, 1.0 / self.config.later_scale)
        if self.fast is not None:
            return self._decode_fast(self.fast, z, state, going)
        z = z * self._column("latents_std", z) + self._column("latents_mean", z)
        z = self.vae.post_quant_conv(z.to(getattr(torch, self.config.decode_dtype)))
        pieces = []
        for piece in z.split(1, dim=2):
            out, state = self._run("decoder", piece, state)
            pieces.append(out)
        p = self.config.patch_size
        pixels = rearrange(torch.cat(pieces, dim=2), "B (c q p) F h w -> B c F (h p) (w q)", p=p, q=p)
        return pixels.clamp(-1.0, 1.0), state

    def _decode_fast(
        self, fast: FastDecoder, z: Tensor, state: CodecState, going: bool
    ) -> tuple[Tensor, CodecState]:
        names = [f"decoder.{i}" for i in range(len(fast.memory_shapes(1, 1)))]
        latents = rearrange(z, "B C T h w -> B T C h w").to(state[names[0]].dtype)
        pixels, memories = fast(latents, [state[name] for name in names])
        memories = [m.contiguous() for m in memories]
        if not going:
            pixels = pixels[:, :, self.config.frames - self.config.first_frames :]
        started = torch.ones_like(state["decoder.started"])
        after = {**state, **dict(zip(names, memories, strict=True)), "decoder.started": started}
        return pixels.clamp(-1.0, 1.0), after

    # ---- parts ------------------------------------------------------------------------------------------------------
    def _started(self, state: CodecState, side: str) -> bool:
        flags = state[f"{side}.started"]
        if bool(flags.any()) and not bool(flags.all()):
            raise InputError(
                "some of these sessions are before their first frame (1 pixel frame) and some after it "
                f"({self.config.frames}); select() them apart and join them when all have begun"
            )
        return bool(flags.all())

    def _scaled(self, latents: list[Tensor], going: bool, scale: float) -> Tensor:
        """Latents (B, C, 1, h, w) each, joined in time; all but a clip's first one scaled."""
        return torch.cat([x if t == 0 and not going else x * scale for t, x in enumerate(latents)], dim=2)

    def _column(self, name: str, like: Tensor) -> Tensor:
        return like.new_tensor(getattr(self.config, name))[:, None, None, None]

    def _run(self, side: str, x: Tensor, state: CodecState) -> tuple[Tensor, CodecState]:
        """One latent frame through the encoder or decoder, and the state after it; ``state`` is unchanged."""
        layout, going = cache_layouts(self.config)[side], self._started(state, side)
        part = getattr(self.vae, side)
        cache: list[Any] = [
            None if i in layout.resampling and not going else state[f"{side}.{i}"]
            for i in range(len(layout.shapes))
        ]
        first = {} if side == "encoder" else {"first_chunk": not going}
        out = part(x, feat_cache=cache, feat_idx=[0], **first)
        after = {
            # in one layout, as a saved state comes back: kernels round by layout
            f"{side}.{i}": new.contiguous() if isinstance(new, Tensor) else state[f"{side}.{i}"]
            for i, new in enumerate(cache)
        }
        return out, {**state, **after, f"{side}.started": torch.ones_like(state[f"{side}.started"])}
