"""Small random worlds: the real classes at a size that tests can afford."""

from __future__ import annotations

import string
from pathlib import Path

import numpy as np
import torch
from gymnasium import spaces
from torch import nn

from worldmodel.checkpoint import WorldSpec, half_precision, narrowed, write_world
from worldmodel.codec.conv import ConvCodec, ConvCodecConfig
from worldmodel.codec.kl import KLCodec, KLCodecConfig
from worldmodel.codec.wan import WanCodec, WanCodecConfig
from worldmodel.condition.actions import ActionEncoder, ActionEncoderConfig
from worldmodel.condition.spaces import packed_size, prompt_key, space_to_json
from worldmodel.condition.text import TextConfig
from worldmodel.flow.flow import Flow, FlowConfig
from worldmodel.heads import EyeConfig, Heads, HeadsConfig
from worldmodel.world import WorldModel

FRAME = (32, 32)
BOX = spaces.Box(-2.0, 2.0, (1,), np.float32)
TEXT = spaces.Text(64, min_length=0, charset=string.printable)
TOLD = spaces.Dict({"prompt": TEXT, "action": BOX})
WORDS = (
    "a",
    "the",
    "corgi",
    "cat",
    "dog",
    "looks",
    "runs",
    "sleeps",
    "red",
    "blue",
    "camera",
    "at",
    "video",
    "fps",
)
WORDS += (
    "image",
    "noise",
    "level",
    "aspect",
    "ratio",
    "with",
    "an",
    "in",
    "extend",
    "v2v",
    ":",
    "(",
    ")",
    ".",
)
TEXT_TOKENS, TEXT_DIM = 40, 16


def randomise(module: nn.Module, seed: int, scale: float = 0.3) -> None:
    """Give zero-initialised parameters values, so that nothing is the identity."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if not parameter.any():
            parameter.data = (
                scale * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
            )


def toy_flow(seed: int = 0, **overrides: object) -> Flow:
    """A flow with random weights, float32."""
    values = {
        "in_channels": 3,
        "channels": 32,
        "top_channels": 64,
        "layers_per_block": (1, 1, 2),
        "patch_size": 1,
        "head_dim": 32,
        "position_scale": 4.0,
        "action_features": 8,
        "noise_std": 0.3,
        "window": 6,
        "context": 3,
        "denoiser_layers": 2,
        "denoiser_window": 1,
        "denoiser_look_ahead": 1,
    }
    torch.manual_seed(seed)
    flow = Flow(FlowConfig(**{**values, **overrides}))
    randomise(flow, seed)
    return flow.eval().requires_grad_(False)


def write_toy(
    path: Path,
    space: spaces.Space = BOX,
    seed: int = 0,
    frame: tuple[int, int] = FRAME,
    discount: float | None = None,
    eye: EyeConfig | None = None,
    **overrides: object,
) -> Path:
    """A toy world directory with the given action space and frame size; one with prompts brings a tiny T5."""
    text, overrides = write_text(path, space, seed, overrides)
    flow = toy_flow(seed, **overrides)
    codec = ConvCodec(
        ConvCodecConfig(
            height=frame[0],
            width=frame[1],
            latent_channels=flow.config.in_channels,
            widths=(8, 16, 16),
            encoder_blocks=(1, 0, 0),
            decoder_blocks=(1, 0, 0),
        )
    )
    codec.background.fill_(128.0)
    randomise(codec, seed, 1.0)
    cells = frame[0] // codec.spatial_stride, frame[1] // codec.spatial_stride
    packed = packed_size(space)
    actions = ActionEncoder(ActionEncoderConfig(packed, flow.config.action_features or 8)) if packed else None
    size = flow.config.in_channels * cells[0] * cells[1]
    heads = Heads(HeadsConfig(size, packed, 16, discount, eye))
    spec = WorldSpec(
        name="toy",
        frame_size=frame,
        fps=20.0,
        action_space_json=space_to_json(space),
        flow=flow.config,
        codec=codec.config,
        actions=ActionEncoderConfig(0) if actions is None else actions.config,
        heads=heads.config,
        text=text,
    )
    rng = np.random.default_rng(seed)
    space.seed(seed)
    sampled = [[space.sample() for _ in range(2)] for _ in range(5)]
    keys = {f"actions/{k}": k for k in space} if isinstance(space, spaces.Dict) else {"actions": None}
    starts = {
        "frames": rng.integers(0, 256, (5, 2, 4, *frame, 3), dtype=np.uint8),
        **{
            name: np.array([[a if key is None else a[key] for a in clip] for clip in sampled])
            for name, key in keys.items()
        },
    }
    parts = nn.ModuleDict({"flow": flow} if actions is None else {"flow": flow, "actions": actions})
    tensors = {"flow": narrowed(parts), "codec": half_precision(codec), "heads": half_precision(heads)}
    write_world(path, spec, tensors, starts, "# toy\n")
    return path


def write_text(
    path: Path, space: spaces.Space, seed: int, overrides: dict[str, object]
) -> tuple[TextConfig | None, dict[str, object]]:
    """What a world with this action space needs for prompts, and the flow's sizes with it."""
    if prompt_key(space) is None and not overrides.get("text_tokens"):
        return None, overrides
    sizes: dict[str, object] = {"text_tokens": TEXT_TOKENS, "text_dim": TEXT_DIM}
    write_t5(path / "text", seed, int(str(overrides.get("text_dim", TEXT_DIM))))
    if not packed_size(space):
        sizes["action_features"] = 0
    return TextConfig("text"), {**sizes, **overrides}


def write_t5(path: Path, seed: int = 0, dim: int = TEXT_DIM) -> Path:
    """A random T5 encoder and a tokenizer of a few words, as transformers writes them."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    vocabulary = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS, *map(str, range(10))))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Whitespace(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(path)
    torch.manual_seed(seed)
    sizes = {"d_model": dim, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    model = T5EncoderModel(T5Config(vocab_size=len(vocabulary), **sizes))
    randomise(model, seed)
    model.save_pretrained(path, safe_serialization=True)
    return path


def wan_config(**overrides: object) -> WanCodecConfig:
    """The Wan2.2 architecture at a few channels: 16 x fewer rows and columns, 4 x fewer frames."""
    values = {
        "latents_mean": (0.1, -0.2, 0.3),
        "latents_std": (0.5, 1.5, 1.0),
        "height": 32,
        "width": 32,
        "base_dim": 8,
        "decoder_base_dim": 8,
        "z_dim": 3,
        "dim_mult": (1, 2, 2, 2),
        "num_res_blocks": 1,
        "decode_dtype": "float32",
    }
    return WanCodecConfig(**{**values, **overrides})


def write_wan_toy(
    path: Path,
    seed: int = 0,
    dtype: str = "float32",
    space: spaces.Space = BOX,
    fps: float = 16.0,
    **overrides: object,
) -> Path:
    """A toy world with the Wan2.2 codec, no heads and no bank, as a published model is."""
    torch.manual_seed(seed)
    return _write_as_published(path, WanCodec(wan_config()), seed, dtype, space, fps, **overrides)


def kl_config(**overrides: object) -> KLCodecConfig:
    """Stable Diffusion's architecture at a few channels: 8 x fewer rows and columns."""
    values = {
        "height": 32,
        "width": 32,
        "block_out_channels": (8, 8, 16, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 3,
    }
    return KLCodecConfig(**{**values, **overrides})


def write_picture_toy(path: Path, seed: int = 0, dtype: str = "float32", **overrides: object) -> Path:
    """A toy world of pictures, as STARFlow 3B: prompts, the KL codec, no denoiser, windows of one frame."""
    torch.manual_seed(seed)
    codec = KLCodec(kl_config())
    randomise(codec, seed)
    still = {"window": 1, "context": 1, "denoiser_layers": 0}
    return _write_as_published(path, codec, seed, dtype, TEXT, 0.0, **{**still, **overrides})


def _write_as_published(
    path: Path,
    codec: WanCodec | KLCodec,
    seed: int,
    dtype: str,
    space: spaces.Space,
    fps: float,
    **overrides: object,
) -> Path:
    text, overrides = write_text(path, space, seed, overrides)
    flow = toy_flow(seed, **overrides)
    packed = packed_size(space)
    actions = ActionEncoder(ActionEncoderConfig(packed, flow.config.action_features)) if packed else None
    spec = WorldSpec(
        name=f"{codec.config.kind}-toy",
        frame_size=FRAME,
        fps=fps,
        action_space_json=space_to_json(space),
        flow=flow.config,
        codec=codec.config,
        actions=ActionEncoderConfig(0) if actions is None else actions.config,
        heads=None,
        text=text,
        dtype=dtype,
        bank=False,
    )
    parts = nn.ModuleDict({"flow": flow} if actions is None else {"flow": flow, "actions": actions})
    write_world(path, spec, {"flow": half_precision(parts), "codec": codec.state_dict()}, {}, "# toy\n")
    return path


def toy_world(path: Path, space: spaces.Space = BOX, seed: int = 0, **overrides: object) -> WorldModel:
    """A loaded toy world."""
    return WorldModel.load(write_toy(path, space, seed, **overrides))
