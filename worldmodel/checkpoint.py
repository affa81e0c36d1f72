"""A world on disk: a directory of JSON and safetensors, checked before it is trusted.

    world.json            format version, configuration, spaces, fps, provenance, measured quality
    flow.safetensors      flow and action encoder      codec.safetensors      heads.safetensors
    starts.npz            initial clips: frames (S, T, F, height, width, 3) uint8, actions (S, T, ...)
    README.md             model card

Weights may be stored as float16; they are computed with as float32.
"""

from __future__ import annotations

import hashlib
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from worldmodel.codec.conv import ConvCodec, ConvCodecConfig, channels_last
from worldmodel.condition.actions import ActionEncoder, ActionEncoderConfig
from worldmodel.condition.prompts import T5, Prompts
from worldmodel.condition.spaces import pack_actions, packed_size, prompt_key, space_from_json
from worldmodel.condition.text import TextConfig
from worldmodel.errors import CheckpointError, ConfigError, InputError
from worldmodel.files import (
    config_from_dict,
    config_to_dict,
    load_tensors,
    read_json,
    save_tensors,
    write_atomic,
    write_json,
)
from worldmodel.flow.flow import Flow, FlowConfig
from worldmodel.heads import Heads, HeadsConfig
from worldmodel.sampling import Sampling

WORLD_FORMAT = 1
SHIPPED = Path(__file__).parent / "worlds"


@dataclass(frozen=True)
class WorldSpec:
    """What ``world.json`` says, less the weights.

    frame_size: (height, width) pixels. fps: pixel frames a second. environment: id and arguments of the real
    environment it was learned from, and how episodes were collected. provenance: how it was
    made. quality: measured on held-out episodes.
    """

    name: str
    frame_size: tuple[int, int]
    fps: float
    action_space_json: dict[str, Any]
    flow: FlowConfig
    codec: ConvCodecConfig
    actions: ActionEncoderConfig
    heads: HeadsConfig
    text: TextConfig | None = None
    sampling: Sampling = Sampling()
    environment: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    quality: dict[str, Any] = field(default_factory=dict)
    format: int = WORLD_FORMAT

    @cached_property
    def action_space(self) -> spaces.Space[Any]:
        """The Gymnasium space of one action."""
        return space_from_json(self.action_space_json)


@dataclass(frozen=True)
class WorldFiles:
    """The contents of a world directory, read and checked."""

    spec: WorldSpec
    tensors: Mapping[str, Mapping[str, Tensor]]
    starts: Mapping[str, np.ndarray]
    fingerprint: str
    path: Path

    def prompts(self, device: torch.device | str, cache: Path | None = None) -> Prompts | None:
        """How captions become condition tokens, with the encoder on ``device`` (read when the first prompt comes).

        ``cache``: a folder where encoded prompts are kept. None for a world without prompts.
        """
        spec = self.spec
        if spec.text is None:
            return None
        inside = self.path / spec.text.encoder
        name = str(inside) if inside.is_dir() else spec.text.encoder
        shape = spec.flow.text_tokens, spec.flow.text_dim
        encode = T5(name, spec.flow.text_tokens, device)
        return Prompts(spec.text, shape, spec.fps, spec.flow.noise_std, spec.frame_size, encode, cache)

    def build(self, device: torch.device | str) -> tuple[Flow, ConvCodec, ActionEncoder | None, Heads]:
        """The modules, in evaluation mode, float32.

        Raises:
            CheckpointError: missing or unexpected keys, or wrong shapes; all of them are listed.
        """
        spec = self.spec
        flow, codec, heads = Flow(spec.flow), ConvCodec(spec.codec), Heads(spec.heads)
        actions = ActionEncoder(spec.actions) if spec.actions.packed else None
        parts = {"flow": flow, "actions": actions} if actions is not None else {"flow": flow}
        _load_strict(nn.ModuleDict(parts), self.tensors["flow"], self.path / "flow.safetensors")
        _load_strict(codec, self.tensors["codec"], self.path / "codec.safetensors")
        _load_strict(heads, self.tensors["heads"], self.path / "heads.safetensors")
        for module in (flow, codec, heads, actions):
            if module is not None:
                module.to(device).eval().requires_grad_(False)
        channels_last(codec)
        return flow, codec, actions, heads


def _load_strict(module: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    expected = module.state_dict()
    missing = sorted(set(expected) - set(tensors))
    extra = sorted(set(tensors) - set(expected))
    wrong = sorted(
        f"{k} {tuple(tensors[k].shape)} (expected {tuple(v.shape)})"
        for k, v in expected.items()
        if k in tensors and tensors[k].shape != v.shape
    )
    problems = [
        f"{what}: {', '.join(keys[:8])}{' ...' if len(keys) > 8 else ''}"
        for what, keys in (("missing", missing), ("unexpected", extra), ("wrong shape", wrong))
        if keys
    ]
    if problems:
        raise CheckpointError(f"{where}: does not fit world.json; " + "; ".join(problems))
    module.load_state_dict({k: v.to(expected[k].dtype) for k, v in tensors.items()})


def shipped_worlds() -> list[str]:
    """Names of the worlds that ship with the package."""
    return sorted(p.parent.name for p in SHIPPED.glob("*/world.json"))


def find_world(name: str | Path) -> Path:
    """The directory of a shipped world ("pendulum") or of a path.

    Raises:
        CheckpointError: neither; the message lists the worlds that ship.
    """
    shipped, path = shipped_worlds(), Path(name)
    if str(name) in shipped:
        return SHIPPED / str(name)
    if (path / "world.json").is_file():
        return path
    why = "no world.json in it" if path.is_dir() else "no such directory"
    raise CheckpointError(
        f"world {str(name)!r}: {why}; give a world directory or one of the shipped worlds: {', '.join(shipped) or 'none'}"
    )


def read_spec(name: str | Path) -> WorldSpec:
    """Read and check ``world.json`` alone: spaces, sizes and configuration without loading weights.

    Raises:
        CheckpointError: no such world, or a corrupt file. ConfigError: unknown or missing keys.
    """
    path = find_world(name)
    data = read_json(path / "world.json")
    if not isinstance(data, dict):
        raise ConfigError(f"{path}/world.json: expected an object with keys, got {type(data).__name__}")
    if data.get("format") != WORLD_FORMAT:
        raise ConfigError(f"{path}/world.json: format {data.get('format')!r}, expected {WORLD_FORMAT}")
    spec = config_from_dict(WorldSpec, data, f"{path}/world.json")
    if packed_size(spec.action_space) != spec.actions.packed:
        raise ConfigError(
            f"{path}/world.json: actions.packed is {spec.actions.packed}, expected {packed_size(spec.action_space)}"
        )
    if prompt_key(spec.action_space) is not None and spec.text is None:
        raise ConfigError(f"{path}/world.json: actions with a prompt need text, which says how it is read")
    return spec


def read_world(name: str | Path) -> WorldFiles:
    """Read and check a world directory.

    Raises:
        CheckpointError: missing, corrupt or truncated files. ConfigError: unknown or missing keys in world.json.
    """
    path, spec = find_world(name), read_spec(name)
    digest = hashlib.sha256()
    tensors = {}
    for part in ("flow", "codec", "heads"):
        file = path / f"{part}.safetensors"
        tensors[part] = load_tensors(file)
        digest.update(file.read_bytes())
    return WorldFiles(spec, tensors, _read_starts(path / "starts.npz", spec), digest.hexdigest(), path)


_DAMAGED = (OSError, ValueError, KeyError, EOFError, RuntimeError, MemoryError) + (
    zipfile.BadZipFile,
    zlib.error,
    tokenize.TokenError,
)
"""What numpy raises for a damaged archive."""


def _read_starts(file: Path, spec: WorldSpec) -> Mapping[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            starts = {key: archive[key] for key in archive.files}
            if "frames" not in starts:
                raise KeyError("frames")
    except _DAMAGED as error:
        raise CheckpointError(
            f"{file}: cannot be read ({' '.join(str(error).split()):.80}); copy the world directory again"
        ) from error
    frames, expected = starts["frames"], (spec.codec.frames, *spec.frame_size, 3)
    if frames.dtype != np.uint8 or frames.shape[2:] != expected or 0 in frames.shape:
        raise CheckpointError(
            f"{file}: frames are {frames.dtype} {frames.shape}, expected uint8 (S, T, *{expected})"
        )
    if spec.actions.packed or "actions" in starts:
        _check_start_actions(file, starts, spec)
    return starts


def _check_start_actions(file: Path, starts: Mapping[str, np.ndarray], spec: WorldSpec) -> None:
    shape = starts["frames"].shape[:2]
    banks = {k.removeprefix("actions/"): v for k, v in starts.items() if k.startswith("actions")}
    try:
        if any(bank.shape[:2] != shape for bank in banks.values()):
            raise InputError(f"not one for each of the {shape[1]} chunks of {shape[0]} clips")
        flat = {k: v.reshape(-1, *v.shape[2:]) for k, v in banks.items()}
        space = spec.action_space
        batch = flat if isinstance(space, spaces.Dict) else flat.get("actions")
        pack_actions(space, batch, shape[0] * shape[1])
    except InputError as error:
        raise CheckpointError(f"{file}: actions do not fit ({error})") from error


def write_world(
    path: Path,
    spec: WorldSpec,
    tensors: Mapping[str, Mapping[str, Tensor]],
    starts: Mapping[str, np.ndarray],
    card: str,
) -> None:
    """Write a world directory; each file is replaced atomically, ``world.json`` last. Weights are stored as float16."""
    path.mkdir(parents=True, exist_ok=True)
    for part, values in tensors.items():
        stored = {k: v.detach().cpu().contiguous() for k, v in values.items()}
        save_tensors(path / f"{part}.safetensors", stored, {})
    write_atomic(path / "starts.npz", lambda file: _write_starts(file, starts))
    write_atomic(path / "README.md", lambda file: file.write_text(card))
    write_json(path / "world.json", config_to_dict(spec))


def _write_starts(file: Path, starts: Mapping[str, np.ndarray]) -> None:
    with file.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **starts)


def half_precision(module: nn.Module) -> dict[str, Tensor]:
    """A state dict with parameters as float16 and buffers as they are."""
    parameters = dict(module.named_parameters())
    return {k: v.half() if k in parameters else v for k, v in module.state_dict().items()}
