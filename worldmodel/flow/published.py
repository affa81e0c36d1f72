"""The names STARFlow and STARFlow-V are published under: configuration, arguments, state-dict keys; mapped strictly."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from torch import Tensor

from worldmodel.condition.text import TextConfig
from worldmodel.errors import CheckpointError, ConfigError
from worldmodel.files import read_json
from worldmodel.flow.flow import Flow, FlowConfig

DEAD_BUFFERS = ("attn_mask", "var", "freqs_cos", "freqs_sin")
"""Unused buffers that published checkpoints carry; ignored by name, and nothing else is."""

_ARGUMENTS = {
    "in_channels": "in_channels",
    "patch_size": "patch_size",
    "channels": "channels",
    "layers_per_block": "layers_per_block",
    "head_dim": "head_dim",
    "pt_seq_len": "position_scale",
    "txt_size": "text_tokens",
    "txt_dim": "text_dim",
    "soft_clip": "soft_clip",
    "use_final_norm": "final_norm",
    "temporal_causal": "denoiser_look_ahead",
    "denoiser_window": "denoiser_window",
    "conditional_denoiser": "denoiser_conditional",
    "top_block_channels": "top_channels",
}
_FIXED = {
    "rope": True,
    "sos": True,
    "cond_top_only": True,
    "use_softplus": True,
    "seq_order": "L2R",
    "shallow_block_local": True,
}
_OTHERS = ("img_size", "num_blocks", "learnable_self_denoiser")


def config_from_published(arguments: Mapping[str, Any], **overrides: Any) -> FlowConfig:
    """A `FlowConfig` from the reference constructor's arguments; without ``learnable_self_denoiser`` it has no denoiser.

    Raises:
        ConfigError: an unknown or missing argument, or one set to what STARFlow-V does not use.
    """
    unknown = sorted(set(arguments) - set(_ARGUMENTS) - set(_FIXED) - set(_OTHERS))
    if unknown:
        raise ConfigError(
            f"unknown model arguments {unknown}; known: {sorted({*_ARGUMENTS, *_FIXED, *_OTHERS})}"
        )
    for name, value in _FIXED.items():
        if arguments.get(name, value) != value:
            raise ConfigError(f"model argument {name} is {arguments[name]!r}; STARFlow-V needs {value!r}")
    values = {ours: arguments[theirs] for theirs, ours in _ARGUMENTS.items() if theirs in arguments}
    if missing := sorted({"in_channels", "channels", "layers_per_block"} - set(values)):
        raise ConfigError(f"missing model arguments {missing}")
    values["layers_per_block"] = tuple(values["layers_per_block"])
    blocks = arguments.get("num_blocks", len(values["layers_per_block"]))
    if blocks != len(values["layers_per_block"]):
        raise ConfigError(
            f"num_blocks is {blocks} but layers_per_block has {len(values['layers_per_block'])} entries"
        )
    values.setdefault("top_channels", values["channels"])
    if not arguments.get("learnable_self_denoiser", True):
        values["denoiser_layers"] = 0
    return FlowConfig(**{**values, **overrides})


TEXT_WIDTHS = {"google/flan-t5-xl": 2048}
"""Widths of the encoders that published configurations name; a directory's is in its config.json."""

_FLAGS = ("rope", "sos", "cond_top_only", "use_softplus", "use_final_norm", "learnable_self_denoiser") + (
    "conditional_denoiser",
    "shallow_block_local",
)
_RENAMED_ARGUMENTS = {"channel_size": "in_channels", "blocks": "num_blocks"}
_AS_THEY_ARE = ("patch_size", "channels", "top_block_channels", "pt_seq_len", "txt_size", "soft_clip") + (
    "seq_order",
    "temporal_causal",
    "denoiser_window",
    "head_dim",
)
_OTHER = ("img_size", "vid_size", "noise_std", "layers_per_block", "vae", "text") + (
    "fps_cond",
    "cond_noise_level",
    "mix_aspect",
)
_TRAINING = (
    *("no_flip", "fsdp", "fsdp_text_encoder", "secondary_img_size", "batch_size", "secondary_batch_size"),
    *("secondary_ratio", "lr", "min_lr", "wds", "gradient_checkpoint", "gradient_checkpoint_mlp"),
    *("finetuned_vae", "cfg", "drop_label", "drop_image", "loss_scaling", "grad_clip", "grad_skip"),
    *("sample_freq", "latent_norm_regularization"),
)
"""Arguments of the public configuration that only concern training."""
_SETTLED = {"nvp": 1, "adaln": 0}


@dataclass(frozen=True)
class PublishedCodec:
    """A codec that published configurations name: kind, pixels of a latent cell's side, the folder of its files in its
    Hub repository, and their size.
    """

    kind: Literal["wan", "kl"]
    stride: int
    folder: str
    size: str


CODECS = {
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": PublishedCodec("wan", 16, "vae/", "2.8 GB"),
    "stabilityai/sd-vae-ft-ema": PublishedCodec("kl", 8, "", "0.3 GB"),
}
"""By Hub repository."""


@dataclass(frozen=True)
class PublishedModel:
    """What a public configuration says: the flow, the template of its prompts, the codec's Hub repository (one of
    `CODECS`) and the scale of its later latents, frames (height, width) in pixels at 16:9 (pictures: square), frames a
    second (pictures: 0); and the guidance of its authors' sampling commands.
    """

    flow: FlowConfig
    text: TextConfig
    vae: str
    later_scale: float
    frame_size: tuple[int, int]
    fps: float
    guidance: float


def read_published_yaml(path: Path) -> PublishedModel:
    """The public YAML as it is: ``arguments``, a list of single ``name: value`` entries.

    Raises:
        CheckpointError: not a file, or not YAML. ConfigError: not such a list, or unknown, missing or unusable arguments.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"{path} cannot be read as YAML ({' '.join(str(error).split()):.120})"
        ) from error
    entries = data.get("arguments") if isinstance(data, Mapping) else None
    if not isinstance(entries, list) or not all(isinstance(e, Mapping) for e in entries):
        raise ConfigError(f"{path}: expected a list of arguments under the key 'arguments'")
    return published_model({str(k): v for entry in entries for k, v in entry.items()}, str(path))


def published_model(given: Mapping[str, Any], where: str) -> PublishedModel:
    """From the arguments of the public training script; a flag that is absent is off, a model without ``vid_size`` is
    one of pictures.

    Raises:
        ConfigError: unknown, missing or unusable arguments; ``where`` names their source.
    """
    known = {*_FLAGS, *_RENAMED_ARGUMENTS, *_AS_THEY_ARE, *_OTHER, *_TRAINING, *_SETTLED}
    if unknown := sorted(set(given) - known):
        raise ConfigError(f"{where}: unknown arguments {', '.join(unknown)}")
    for name, value in _SETTLED.items():
        if given.get(name, value) != value:
            raise ConfigError(f"{where}: {name} is {given[name]!r}; STARFlow-V needs {value!r}")
    try:
        arguments: dict[str, Any] = {name: bool(given.get(name, 0)) for name in _FLAGS}
        arguments |= {name: given[name] for name in _AS_THEY_ARE if name in given}
        arguments |= {ours: given[theirs] for theirs, ours in _RENAMED_ARGUMENTS.items() if theirs in given}
        arguments["layers_per_block"] = [int(n) for n in str(given["layers_per_block"]).split()]
        arguments["txt_dim"] = _text_width(str(given["text"]))
        vae, _, scale = str(given["vae"]).partition(":")
        if vae not in CODECS:
            raise ConfigError(f"codec {vae!r} is not known ({', '.join(CODECS)})")
        area, stride, ratio = int(given["img_size"]) ** 2, CODECS[vae].stride, 1.0
        frames = fps = 0
        if video := "vid_size" in given:
            frames, fps = (int(n) for n in str(given["vid_size"]).split(":"))
            ratio = 16 / 9
        else:
            arguments["shallow_block_local"] = True  # of the one frame that there is
        side = int(given["img_size"]) // stride // int(given.get("patch_size", 1))
        arguments.setdefault("pt_seq_len", side)  # tokens of a side in training
        window = 1 + (frames - 1) // 4 if video else 1
        flow = config_from_published(arguments, noise_std=float(given["noise_std"]), **_window(window))
        height, width = (round((area * r) ** 0.5 / stride) * stride for r in (1 / ratio, ratio))
        later = float(scale) if scale else 1.0
    except KeyError as error:
        raise ConfigError(f"{where}: missing argument {error}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: an argument has a value that cannot be used ({error})") from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    flags = {ours: bool(given.get(theirs, 0)) for ours, theirs in _TEMPLATE.items()}
    text = TextConfig(str(given["text"]), **flags, extend=video)
    return PublishedModel(flow, text, vae, later, (height, width), float(fps), 3.5 if video else 3.6)


_TEMPLATE = {"fps": "fps_cond", "noise_level": "cond_noise_level", "aspect": "mix_aspect"}


def _window(latent_frames: int) -> dict[str, int]:
    """The window a model was trained with, and the 16 frames of it that long videos keep (fewer in a shorter one)."""
    return {"window": latent_frames, "context": max(1, min(16, latent_frames - 1))}


def _text_width(encoder: str) -> int:
    if encoder in TEXT_WIDTHS:
        return TEXT_WIDTHS[encoder]
    config = Path(encoder) / "config.json"
    if not config.is_file():
        raise ConfigError(
            f"text encoder {encoder!r} is not known ({', '.join(TEXT_WIDTHS)}) and no directory of one"
        )
    return int(read_json(config)["d_model"])


_OWNERS = (("deep.", "blocks.{deep}."), ("shallow.", "blocks."), ("denoiser.", "learnable_self_denoiser."))
_RENAMED = (
    ("transformer.", ""),
    ("layers.", "attn_blocks."),
    ("attention.out.", "attention.proj."),
    ("mlp.up.", "mlp.main.0."),
    ("mlp.down.", "mlp.main.2."),
    ("proj_text.", "proj_txt."),
)


def published_key(name: str, deep: int) -> str:
    """The published name of one of our state-dict keys; ``deep`` is the deep block's index."""
    for ours, theirs in _OWNERS:
        if name.startswith(ours):
            name = theirs.format(deep=deep) + name.removeprefix(ours)
            break
    for ours, theirs in _RENAMED:
        name = name.replace(ours, theirs)
    return re.sub(r"\.sos$", ".sos_embed", name)


def map_published(flow: Flow, state: Mapping[str, Tensor], where: str = "checkpoint") -> dict[str, Tensor]:
    """A state dict under the published names as one under ours, strictly; ``flow`` may be on the meta device.

    Action weights, which published checkpoints lack, are not in it.

    Raises:
        CheckpointError: listing every missing, unexpected and wrongly shaped key.
    """
    deep = len(flow.config.layers_per_block) - 1
    ours = {k: v for k, v in flow.state_dict().items() if "proj_action" not in k}
    names = {published_key(name, deep): name for name in ours}
    given = {k: v for k, v in state.items() if k.rsplit(".", 1)[-1] not in DEAD_BUFFERS}
    mapped, shapes = {}, []
    for key, name in names.items():
        if key not in given:
            continue
        value = given[key]
        value = value.reshape(-1) if name.endswith(".sos") else value
        if value.shape != ours[name].shape:
            shapes.append(f"{key} {tuple(value.shape)} (expected {tuple(ours[name].shape)})")
        mapped[name] = value
    problems = [
        f"{what}: {', '.join(sorted(keys))}"
        for what, keys in (
            ("missing", names.keys() - given.keys()),
            ("unexpected", given.keys() - names.keys()),
            ("wrong shape", shapes),
        )
        if keys
    ]
    if problems:
        raise CheckpointError(f"{where} does not fit the configuration; " + "; ".join(problems))
    return mapped


def load_published(flow: Flow, state: Mapping[str, Tensor]) -> None:
    """Load a state dict under the published names into ``flow``; action weights keep their (zero) initial values.

    Raises:
        CheckpointError: as `map_published`.
    """
    flow.load_state_dict({**flow.state_dict(), **map_published(flow, state)})
