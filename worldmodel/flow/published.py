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
        ConfigError: an unknown argument, or one set to what STARFlow-V does not use.
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
    values["layers_per_block"] = tuple(values["layers_per_block"])
    blocks = arguments.get("num_blocks", len(values["layers_per_block"]))
    if blocks != len(values["layers_per_block"]):
        raise ConfigError(
            f"num_blocks is {blocks} but layers_per_block has {len(values['layers_per_block'])} entries"
        )
    values.setdefault("top_channels", values["channels"])
    return FlowConfig(**{**values, **overrides})


_LAYER = {
    "attention.norm": "attention.norm",
    "attention.qkv": "attention.qkv",
    "attention.proj": "attention.out",
    "mlp.norm": "mlp.norm",
    "mlp.main.0": "mlp.up",
    "mlp.main.2": "mlp.down",
}
_PART = {"proj_in": "proj_in", "proj_out": "proj_out", "proj_txt": "proj_text", "final_norm": "final_norm"}


def _our_key(key: str, deep: int) -> str | None:
    """Our name of a published key, or None where it has none."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)|learnable_self_denoiser\.(.+)", key)
    if match is None:
        return None
    index, rest, denoiser_rest = match.groups()
    if denoiser_rest is not None:
        owner, rest = "denoiser", denoiser_rest
    else:
        owner = "deep" if int(index) == deep else f"shallow.{int(index)}"
        if rest == "sos_embed":
            return f"{owner}.sos"
    layer = re.fullmatch(r"attn_blocks\.(\d+)\.(.+)\.(weight|bias)", rest)
    if layer is not None:
        name = _LAYER.get(layer[2])
        return None if name is None else f"{owner}.transformer.layers.{layer[1]}.{name}.{layer[3]}"
    part = re.fullmatch(r"([a-z_]+)\.(weight|bias)", rest)
    if part is not None and part[1] in _PART:
        return f"{owner}.transformer.{_PART[part[1]]}.{part[2]}"
    return None


def load_published(flow: Flow, state: Mapping[str, Tensor]) -> None:
    """Load a state dict under the published names into ``flow``, strictly.

    Action weights, which published checkpoints lack, keep their (zero) initial values.

    Raises:
        CheckpointError: listing every missing, unexpected and wrongly shaped key.
    """
    deep = len(flow.config.layers_per_block) - 1
    ours = dict(flow.state_dict())
    mapped: dict[str, Tensor] = {}
    unexpected, shapes = [], []
    for key, value in state.items():
        if key.rsplit(".", 1)[-1] in DEAD_BUFFERS:
            continue
        name = _our_key(key, deep)
        if name is None or name not in ours:
            unexpected.append(key)
            continue
        value = value.reshape(-1) if name.endswith(".sos") else value
        if value.shape != ours[name].shape:
            shapes.append(f"{key} {tuple(value.shape)} (expected {tuple(ours[name].shape)})")
        mapped[name] = value
    missing = sorted(k for k in ours if k not in mapped and "proj_action" not in k)
    problems = [
        f"{what}: {', '.join(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes))
        if names
    ]
    if problems:
        raise CheckpointError("checkpoint does not fit the configuration; " + "; ".join(problems))
    flow.load_state_dict({**ours, **mapped})
