"""A world on disk: a directory of JSON and safetensors, checked before it is trusted.

    world.json            format version, configuration, spaces, fps, provenance, measured quality, SHA-256 of the others
    flow.safetensors      flow and action encoder      codec.safetensors      heads.safetensors (where it has heads)
    starts.npz            initial clips (where it has a bank): frames (S, T, F, height, width, 3) uint8, or (S, n, height,
                          width, 3) where the first chunk is one picture; actions (S, T, ...)
    README.md             model card

A large part is cut into shards, ``flow-00001-of-00007.safetensors`` and so on, listed with their SHA-256 in
``flow.safetensors.index.json``. Weights may be stored as float16; the flow computes in the world's ``dtype`` (see
`WorldSpec`), everything else in float32.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from worldmodel.codec.conv import ConvCodec, ConvCodecConfig, channels_last
from worldmodel.codec.kl import KLCodec, KLCodecConfig
from worldmodel.codec.wan import WanCodec, WanCodecConfig
from worldmodel.condition.actions import ActionEncoder, ActionEncoderConfig
from worldmodel.condition.prompts import T5, Prompts
from worldmodel.condition.spaces import pack_actions, packed_size, prompt_key, space_from_json
from worldmodel.condition.text import TextConfig
from worldmodel.errors import CheckpointError, ConfigError, InputError
from worldmodel.files import (
    DAMAGED_ARRAYS,
    config_from_dict,
    config_to_dict,
    read_json,
    read_tensors,
    save_tensors,
    writable,
    write_atomic,
    write_json,
    write_text,
)
from worldmodel.flow.flow import Flow, FlowConfig
from worldmodel.heads import Heads, HeadsConfig
from worldmodel.packed import narrow
from worldmodel.sampling import Sampling

WORLD_FORMAT = 1
SHIPPED = Path(__file__).parent / "worlds"

CodecConfig = ConvCodecConfig | WanCodecConfig | KLCodecConfig
AnyCodec = ConvCodec | WanCodec | KLCodec


@dataclass(frozen=True)
class WorldSpec:
    """What ``world.json`` says, less the weights.

    frame_size: (height, width) pixels. fps: pixel frames a second. heads: of reward and termination, None for a world
    that knows neither. text: how prompts condition it, None for a world without. dtype: of the flow's weights and hidden
    states; tokens, affine maps and densities are float32 whatever it is. bank: it has real clips to start from.
    environment: id and arguments of the real environment it was learned from, and how episodes were collected.
    provenance: how it was made. quality: measured on held-out episodes. sha256: of the files that were written with it;
    `write_world` sets it.
    """

    name: str
    frame_size: tuple[int, int]
    fps: float
    action_space_json: dict[str, Any]
    flow: FlowConfig
    codec: CodecConfig
    actions: ActionEncoderConfig
    heads: HeadsConfig | None
    text: TextConfig | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    bank: bool = True
    sampling: Sampling = Sampling()
    environment: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    quality: dict[str, Any] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    format: int = WORLD_FORMAT

    def __post_init__(self) -> None:
        """Raises ConfigError for a flow of other latents than the codec's, or an eye that fits no codec's chunks."""
        if self.codec.latent_channels != self.flow.in_channels:
            raise ConfigError(
                f"{self.name}: the codec has {self.codec.latent_channels} channels, the flow {self.flow.in_channels}"
            )
        eye = None if self.heads is None else self.heads.eye
        frames = self.codec.frames if isinstance(self.codec, ConvCodecConfig) else None
        if eye is not None and eye.frames != frames:
            raise ConfigError(
                f"{self.name}: heads.eye looks at {eye.frames} frames, expected "
                + (f"the codec's {frames}" if frames else "no eye: this codec decodes no chunk alone")
            )

    @cached_property
    def action_space(self) -> spaces.Space[Any]:
        """The Gymnasium space of one action."""
        return space_from_json(self.action_space_json)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the files of weights."""
        return ("flow", "codec") if self.heads is None else ("flow", "codec", "heads")


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

    def build(self, device: torch.device | str) -> tuple[Flow, AnyCodec, ActionEncoder | None, Heads | None]:
        """The modules, in evaluation mode; weights go to ``device`` one by one, and no second copy is made on the way.

        Raises:
            CheckpointError: missing or unexpected keys, or wrong shapes; all of them are listed.
        """
        modules: dict[str, Any] = empty_modules(self.spec)
        for part in self.spec.parts:
            _load_strict(modules[part], self.tensors[part], self.path / f"{part}.safetensors", device)
            modules[part].eval().requires_grad_(False)
        parts, codec = dict(modules["flow"].items()), modules["codec"]
        if isinstance(codec, ConvCodec):
            channels_last(codec)
        return parts["flow"], codec, parts.get("actions"), modules.get("heads")


def empty_modules(spec: WorldSpec) -> dict[str, Any]:
    """The modules of each of ``spec.parts`` on the meta device: names, shapes and dtypes without storage."""
    with torch.device("meta"):
        parts: dict[str, nn.Module] = {"flow": Flow(spec.flow).to(getattr(torch, spec.dtype))}
        if spec.actions.packed:
            parts["actions"] = ActionEncoder(spec.actions)
        modules = {"flow": nn.ModuleDict(parts), "codec": _empty_codec(spec.codec)}
        return modules if spec.heads is None else {**modules, "heads": Heads(spec.heads)}


def _empty_codec(config: CodecConfig) -> AnyCodec:
    if isinstance(config, ConvCodecConfig):
        return ConvCodec(config)
    return WanCodec(config) if isinstance(config, WanCodecConfig) else KLCodec(config)


def check_fit(module: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Check that tensors have the names and shapes of a module's state dict.

    Raises:
        CheckpointError: missing or unexpected keys, or wrong shapes.
    """
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
        raise CheckpointError(f"{where}: does not fit its configuration; " + "; ".join(problems))


def _load_strict(
    module: nn.Module, tensors: Mapping[str, Tensor], where: Path, device: torch.device | str
) -> None:
    check_fit(module, tensors, where)
    expected = module.state_dict()
    ready = {k: v.to(device, expected[k].dtype) for k, v in tensors.items()}
    module.load_state_dict(ready, assign=True)


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
    if (spec.codec.height, spec.codec.width) != spec.frame_size:
        raise ConfigError(
            f"{path}/world.json: codec frames are {spec.codec.height} x {spec.codec.width}, frame_size {spec.frame_size}"
        )
    if (spec.text is None) != (spec.flow.text_tokens == 0):
        raise ConfigError(f"{path}/world.json: text and flow.text_tokens must be set together")
    return spec


def read_world(name: str | Path) -> WorldFiles:
    """Read and check a world directory.

    Raises:
        CheckpointError: missing, corrupt or truncated files, or not those that world.json was written with. ConfigError:
            unknown or missing keys in world.json.
    """
    path, spec = find_world(name), read_spec(name)
    digest = hashlib.sha256()
    tensors = {}
    for part in spec.parts:
        file = path / f"{part}.safetensors"
        tensors[part], identity = read_tensors(file)
        _check_digest(file, identity, spec)
        digest.update(identity)
    starts = _read_starts(path / "starts.npz", spec) if spec.bank else {}
    return WorldFiles(spec, tensors, starts, digest.hexdigest(), path)


def _check_digest(file: Path, content: bytes, spec: WorldSpec) -> None:
    if spec.sha256.get(file.name, found := hashlib.sha256(content).hexdigest()) != found:
        raise CheckpointError(
            f"{file}: its SHA-256 is not the one in world.json, so it is damaged or of another world; copy the world "
            "directory again"
        )


def _read_starts(file: Path, spec: WorldSpec) -> Mapping[str, np.ndarray]:
    try:
        content = file.read_bytes()
        _check_digest(file, content, spec)
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            starts = {key: archive[key] for key in archive.files}
            if "frames" not in starts:
                raise KeyError("frames")
    except DAMAGED_ARRAYS as error:
        raise CheckpointError(
            f"{file}: cannot be read ({' '.join(str(error).split()):.80}); copy the world directory again"
        ) from error
    frames, codec = starts["frames"], spec.codec
    named: tuple[str | int, ...] = ("S", "T", codec.frames, *spec.frame_size, 3)
    chunks = frames.shape[1:2]
    if codec.first_frames != codec.frames:  # clips that begin with a picture are not whole chunks
        named = ("S", f"{codec.first_frames} + {codec.frames} k", *spec.frame_size, 3)
        chunks = _chunks(frames, codec)
    fits = frames.ndim == len(named) and all(
        n == e for n, e in zip(frames.shape, named, strict=True) if isinstance(e, int)
    )
    if frames.dtype != np.uint8 or not fits or not chunks or 0 in frames.shape:
        raise CheckpointError(
            f"{file}: frames are {frames.dtype} {frames.shape}, expected uint8 ({', '.join(map(str, named))})"
        )
    if spec.actions.packed or "actions" in starts:
        _check_start_actions(file, starts, spec, (len(frames), chunks[0]))
    return starts


def _chunks(clips: np.ndarray, codec: CodecConfig) -> tuple[int, ...]:
    """(T,) chunks of clips (S, n, height, width, 3), or () where n is not a number of whole chunks."""
    rest = clips.shape[1] - codec.first_frames if clips.ndim == 5 else -1
    return () if rest < 0 or rest % codec.frames else (1 + rest // codec.frames,)


def _check_start_actions(
    file: Path, starts: Mapping[str, np.ndarray], spec: WorldSpec, shape: tuple[int, int]
) -> None:
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
    """Write a world directory; each file is replaced atomically, ``world.json`` last. Weights are stored as float16.

    Raises:
        CheckpointError: it cannot be written.
    """
    writable(path)
    written = [path / f"{part}.safetensors" for part in tensors]
    for file, values in zip(written, tensors.values(), strict=True):
        save_tensors(file, {k: v.detach().cpu().contiguous() for k, v in values.items()}, {})
    if spec.bank:
        written.append(path / "starts.npz")
        write_atomic(written[-1], lambda file: _write_starts(file, starts))
    write_text(path / "README.md", card)
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in written}
    write_json(path / "world.json", config_to_dict(replace(spec, sha256=digests)))


def _write_starts(file: Path, starts: Mapping[str, np.ndarray]) -> None:
    with file.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **starts)


def half_precision(module: nn.Module) -> dict[str, Tensor]:
    """A state dict with parameters as float16 and buffers as they are."""
    parameters = dict(module.named_parameters())
    return {k: v.half() if k in parameters else v for k, v in module.state_dict().items()}


def narrowed(module: nn.Module) -> dict[str, Tensor]:
    """As `half_precision`, matrices rounded as in `narrow`: for the parts that do most of a step's arithmetic."""
    matrices = {name: narrow(weight).half() for name, weight in module.named_parameters() if weight.ndim > 1}
    return half_precision(module) | matrices
