"""The published STARFlow-V names: constructor arguments and state-dict keys, mapped strictly."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from worldmodel.errors import CheckpointError, ConfigError
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
    "learnable_self_denoiser": True,
    "shallow_block_local": True,
}
_IRRELEVANT = ("img_size", "num_blocks")


def config_from_published(arguments: Mapping[str, Any], **overrides: Any) -> FlowConfig:
    """A `FlowConfig` from the reference constructor's arguments.

    Raises:
        ConfigError: an unknown or missing argument, or one set to what STARFlow-V does not use.
    """
    unknown = sorted(set(arguments) - set(_ARGUMENTS) - set(_FIXED) - set(_IRRELEVANT))
    if unknown:
        raise ConfigError(
            f"unknown model arguments {unknown}; known: {sorted({*_ARGUMENTS, *_FIXED, *_IRRELEVANT})}"
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
    return FlowConfig(**{**values, **overrides})


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


def load_published(flow: Flow, state: Mapping[str, Tensor]) -> None:
    """Load a state dict under the published names into ``flow``, strictly.

    Action weights, which published checkpoints lack, keep their (zero) initial values.

    Raises:
        CheckpointError: listing every missing, unexpected and wrongly shaped key.
    """
    deep = len(flow.config.layers_per_block) - 1
    ours = {k: v for k, v in flow.state_dict().items() if "proj_action" not in k}
    names = {published_key(name, deep): name for name in ours}
    given = {k: v for k, v in state.items() if k.rsplit(".", 1)[-1] not in DEAD_BUFFERS}
    mapped, shapes = {}, []
    for key in names.keys() & given.keys():
        name, value = names[key], given[key]
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
        raise CheckpointError("checkpoint does not fit the configuration; " + "; ".join(problems))
    flow.load_state_dict({**flow.state_dict(), **mapped})
