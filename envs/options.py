"""What an environment of a world is made with, its spaces, and worlds loaded once a process."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from gymnasium import spaces

from worldmodel.condition.spaces import pack_actions, prompts_of
from worldmodel.errors import InputError
from worldmodel.sampling import Sampling

if TYPE_CHECKING:
    from worldmodel import WorldModel
    from worldmodel.checkpoint import WorldSpec

StepMode = Literal["chunk", "frame"]
Observation = Literal["pixels", "latent"]
RENDER_MODES = ("human", "rgb_array", "rgb_array_list")
RESET_OPTIONS = ("start", "bank_index", "image", "clip", "episode", "snapshot", "prompt")


@dataclass(frozen=True)
class EnvOptions:
    """Options that one environment and a batch of them share; see `envs.world_env.WorldModelEnv`.

    Raises:
        InputError: a value that is not one of the choices, or out of range.
    """

    step_mode: StepMode = "chunk"
    observation: Observation = "pixels"
    termination_threshold: float = 0.5
    guidance: float | None = None
    temperature: float | None = None
    context: Literal["reencode", "rolling"] | None = None
    render_mode: str | None = None

    def __post_init__(self) -> None:
        choices: dict[str, tuple[str | None, ...]] = {
            "step_mode": ("chunk", "frame"),
            "observation": ("pixels", "latent"),
            "render_mode": (None, *RENDER_MODES),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)!r}, expected one of {known}")
        if self.observation == "latent" and self.step_mode == "frame":
            raise InputError('observation="latent" has one value a chunk; use it with step_mode="chunk"')
        for name in ("termination_threshold", "guidance", "temperature"):
            value = getattr(self, name)
            if value is None and name != "termination_threshold":
                continue
            if not (isinstance(value, Real) and math.isfinite(value)):
                raise InputError(f"{name} is {value!r}, expected a finite number")
        self.sampling(Sampling())

    def sampling(self, base: Sampling) -> Sampling:
        """The sampler's dials: these options where they are given, else the world's own."""
        given: dict[str, Any] = {
            "guidance": self.guidance,
            "temperature": self.temperature,
            "context": self.context,
        }
        return replace(base, **{name: value for name, value in given.items() if value is not None})


def check_max_chunks(value: int | None) -> int | None:
    """A horizon in chunks, or None for no truncation.

    Raises:
        InputError: not an integer of at least 1.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise InputError(f"max_chunks is {value!r}, expected an integer of at least 1, or None")
    return int(value)


def check_seed(seed: Any) -> int | None:
    """A seed of any kind of integer as Python's, or None.

    Raises:
        InputError: something else.
    """
    try:
        return None if seed is None else operator.index(seed)
    except TypeError as error:
        raise InputError(f"seed is {seed!r:.80}, expected an integer or None") from error


def check_reset_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Reset options without the default ``start="bank"``: the one source that was asked for, if any, and the prompt.

    Raises:
        InputError: an unknown key, or two sources at once.
    """
    given = dict(options or {})
    unknown = sorted(set(given) - set(RESET_OPTIONS))
    if unknown:
        raise InputError(f"unknown reset options: {', '.join(unknown)} (known: {', '.join(RESET_OPTIONS)})")
    bank = "start" in given
    if given.pop("start", "bank") != "bank":
        raise InputError(
            'reset option start must be "bank"; give an image, clip, episode or snapshot by its own key'
        )
    sources = sorted(set(given) - {"prompt"})
    if len(sources) > 1 or ("prompt" in given and "snapshot" in given):
        raise InputError(f"reset options {', '.join(sorted(given))} exclude each other; give one")
    if "prompt" in given and not isinstance(given["prompt"], str):
        raise InputError(f"prompt is of type {type(given['prompt']).__name__}, expected a string")
    return given | {"start": "bank"} if bank and not sources else given


def spec_of(world: str | Path | WorldModel) -> WorldSpec:
    """The description of a world; reads ``world.json`` only.

    Raises:
        CheckpointError: no such world. ConfigError: an unknown or missing key.
    """
    from worldmodel import WorldModel  # here: clients of a served world do without torch
    from worldmodel.checkpoint import read_spec
    from worldmodel.published import obtain

    return world.spec if isinstance(world, WorldModel) else read_spec(obtain(world))


def check_device(world: str | Path | WorldModel, device: str | None) -> str | None:
    """Where a world's weights are to go, as it was given; None leaves it to `worldmodel.plan.device_for`.

    Raises:
        InputError: no such device, or a world whose weights are somewhere already.
    """
    from worldmodel import WorldModel
    from worldmodel.plan import device_for

    if device is not None:
        if isinstance(world, WorldModel):
            raise InputError(
                f"device is {device!r}, but this world is on {world.device}; give its name or folder, or no device"
            )
        device_for(spec_of(world), device)
    return device


def load_world(world: str | Path | WorldModel, options: EnvOptions, device: str | None = None) -> WorldModel:
    """The world with these options' sampler. Weights are read once a process and device, and shared.

    Raises:
        CheckpointError: a corrupt or truncated world directory.
    """
    from worldmodel import WorldModel
    from worldmodel.plan import device_for
    from worldmodel.published import obtain

    if not isinstance(world, WorldModel):
        path = obtain(world).resolve()
        place = str(device_for(spec_of(path), device))
        world = _load_once(path, (path / "world.json").stat().st_mtime_ns, place)
    return world.with_sampling(options.sampling(world.spec.sampling))


@lru_cache(maxsize=4)
def _load_once(path: Path, written: int, device: str) -> WorldModel:
    """``written`` is part of the key, so that a world that was trained again is read again."""
    from worldmodel import WorldModel

    return WorldModel.load(path, device)


def observation_space(spec: WorldSpec, options: EnvOptions) -> spaces.Box:
    """(F, height, width, 3) or (height, width, 3) uint8 pixels, or a (C, h, w) float32 latent."""
    height, width = spec.frame_size
    if options.observation == "latent":
        stride = spec.codec.stride
        shape = (spec.codec.latent_channels, height // stride, width // stride)
        return spaces.Box(-np.inf, np.inf, shape, np.float32)
    frames = (spec.codec.frames,) if options.step_mode == "chunk" else ()
    return spaces.Box(0, 255, (*frames, height, width, 3), np.uint8)


def batch_of_one(space: spaces.Space[Any], action: Any) -> Any:
    """One action as a batch of one, for the world to check and to use.

    Raises:
        InputError: no action, or one that is no array.
    """
    if action is None:
        raise InputError(f"action is None, expected one of {space}")
    return _lift(action)


def check_actions(world: WorldModel, actions: Any, rows: int) -> None:
    """Check a batch of ``rows`` actions as `WorldModel.step` does.

    Raises:
        InputError: wrong shape, type or range.
    """
    space = world.spec.action_space
    prompts_of(space, actions, rows)
    if world.actions is not None:
        pack_actions(space, actions, rows)


def _lift(action: Any) -> Any:
    if isinstance(action, Mapping):
        return {key: _lift(value) for key, value in action.items()}
    try:
        return np.asarray(action)[None]
    except (ValueError, TypeError) as error:
        raise InputError(f"action of type {type(action).__name__} is not an array: {error}") from error


def keys_to_action(space: spaces.Space[Any]) -> dict[tuple[int, ...], Any]:
    """Keyboard bindings for `gymnasium.utils.play`, as tuples of pygame key codes.

    Box with one number: left is low, right is high. Discrete: the digits, and for up to four actions the
    arrows too.

    Raises:
        InputError: another kind of space; pass ``keys_to_action`` yourself.
    """
    left, right, up, down = (0x40000000 + code for code in (80, 79, 82, 81))
    if isinstance(space, spaces.Box) and math.prod(space.shape) == 1 and space.is_bounded():
        return {(left,): space.low.copy(), (right,): space.high.copy()}
    if isinstance(space, spaces.Discrete):
        first, count = int(space.start), int(space.n)
        keys: dict[tuple[int, ...], Any] = {(ord(str(i)),): first + i for i in range(min(count, 10))}
        arrows = (left, right) if count == 2 else (left, up, right, down)
        if count <= 4:
            keys |= {(arrows[i],): first + i for i in range(count)}
        return keys
    raise _not_played(space)


def noop_action(space: spaces.Space[Any]) -> Any:
    """What to do when no key is pressed: the middle of a bounded Box, else the first action."""
    if isinstance(space, spaces.Box) and space.is_bounded():
        return ((space.low.astype(np.float64) + space.high) / 2).astype(space.dtype)
    if isinstance(space, spaces.Discrete):
        return int(space.start)
    raise _not_played(space)


def _not_played(space: spaces.Space[Any]) -> InputError:
    return InputError(
        f"the keyboard plays Discrete actions and a bounded Box of one number, not {' '.join(str(space).split()):.120}; "
        "for others call gymnasium.utils.play with keys_to_action and noop"
    )
