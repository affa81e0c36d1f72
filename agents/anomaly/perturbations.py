"""What can go wrong with a real Pendulum-v1 or its camera: labelled episodes on which a monitor is judged.

Axis letters: K chunks of an episode, F pixel frames of a chunk; height, width pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.classic_control.pendulum import PendulumEnv

from worldmodel import InputError
from worldmodel.training.episodes import Episode
from worldmodel.training.policies import WIDE_STARTS, pendulum_anywhere

ONSET = (10, 17)
"""The chunk with which a perturbation begins is drawn from this range."""
EVERY = 8
"""An event of a single chunk comes again after so many chunks."""

FOREVER = 10_000
"""Chunks of an episode that has no end of its own."""
ENV_ID = "agents.anomaly.perturbations:PerturbedPendulum-v0"
"""For `gymnasium.make` and `CollectConfig`, with ``perturbation`` among the arguments."""

Simulator = Any
Change = Callable[[Simulator, np.random.Generator], None]
Command = Callable[[np.ndarray, gymnasium.Space[Any]], np.ndarray]
Picture = Callable[[np.ndarray, np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]
"""Frames (n, height, width, 3) uint8, the frame before them, rng -> frames, and a mask (height, width) of what changed."""


@dataclass(frozen=True)
class Perturbation:
    """One way to go wrong. Exactly one of change, command and picture is given.

    change: of the simulator, when it begins. command: what becomes of every action from then on. picture: what becomes
    of the frames. lasting: to the episode's end; otherwise a single chunk, again every `EVERY` chunks.
    """

    name: str
    lasting: bool
    change: Change | None = None
    command: Command | None = None
    picture: Picture | None = None

    def begins(self, chunks: int, seed: int) -> np.ndarray:
        """(n,) the chunks at which it (re)appears in the episode of that seed; all of so many chunks may follow."""
        first = int(np.random.default_rng((seed, 1)).integers(*ONSET))
        return np.array([first]) if self.lasting else np.arange(first, chunks, EVERY)

    def labels(self, chunks: int, seed: int) -> np.ndarray:
        """(K,) int: 1 for chunks that it acts in, 0 before the first, -1 for those in between, which count as neither."""
        index, begins = np.arange(chunks), self.begins(chunks, seed)
        if self.lasting:
            return (index >= begins[0]).astype(np.int64)
        return np.where(np.isin(index, begins), 1, np.where(index < begins[0], 0, -1))


class PerturbedPendulum(PendulumEnv):
    """Pendulum-v1 that goes wrong at the beginning of some chunks of ``chunk_steps`` steps, which the reset's seed sets.

    Raises:
        InputError: no such perturbation, or one of the camera.
    """

    def __init__(self, perturbation: str, chunk_steps: int = 4, render_mode: str | None = None) -> None:
        super().__init__(render_mode=render_mode)
        known = [p.name for p in PERTURBATIONS.values() if p.picture is None]
        if perturbation not in known:
            raise InputError(
                f"no perturbation {perturbation!r} of the simulator; choose from {', '.join(known)}"
            )
        self.perturbation, self.chunk_steps = PERTURBATIONS[perturbation], chunk_steps
        self.normal = {"g": self.g, "m": self.m}
        self.taken, self.begins = 0, np.zeros(0, dtype=np.int64)
        self.rng = np.random.default_rng(0)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """As Pendulum-v1; everything is right again."""
        for name, value in self.normal.items():
            setattr(self, name, value)
        seed = int(self.np_random.integers(2**31)) if seed is None else seed
        self.taken, self.begins = 0, self.perturbation.begins(FOREVER, seed)
        self.rng = np.random.default_rng((seed, 2))
        return super().reset(seed=seed, options=options)

    def step(self, u: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """As Pendulum-v1, but for what goes wrong."""
        chunk, within = divmod(self.taken, self.chunk_steps)
        if within == 0 and chunk in self.begins and self.perturbation.change is not None:
            self.perturbation.change(self, self.rng)
        if chunk >= self.begins[0] and self.perturbation.command is not None:
            u = self.perturbation.command(u, self.action_space)
        self.taken += 1
        return super().step(u)


def perturb_pictures(
    episode: Episode, perturbation: Perturbation, frame_skip: int
) -> tuple[Episode, np.ndarray]:
    """The episode as a camera that goes wrong shows it, and the mask (height, width) of the pixels it changes.

    Raises:
        InputError: a perturbation of the simulator.
    """
    if perturbation.picture is None:
        raise InputError(f"{perturbation.name} is of the simulator, not of the camera")
    seed, frames = int(episode.meta["seed"]), episode.frames.copy()
    rng = np.random.default_rng((seed, 2))
    mask = np.zeros(frames.shape[1:3], dtype=bool)
    for begin in perturbation.begins(len(episode.rewards), seed):
        first = 1 + frame_skip * int(begin)
        last = len(frames) if perturbation.lasting else first + frame_skip
        frames[first:last], mask = perturbation.picture(frames[first:last], frames[first - 1], rng)
    return episode._replace(frames=frames), mask


def scale(attribute: str, factor: float) -> Change:
    """Multiply an attribute of the simulator."""

    def change(simulator: Simulator, rng: np.random.Generator) -> None:
        setattr(simulator, attribute, factor * getattr(simulator, attribute))

    return change


def teleport(simulator: Simulator, rng: np.random.Generator) -> None:
    """To any angle, at the same speed."""
    simulator.state = np.array([rng.uniform(-np.pi, np.pi), simulator.state[1]])


def flip_velocity(simulator: Simulator, rng: np.random.Generator) -> None:
    """The other way, equally fast."""
    simulator.state = np.array([simulator.state[0], -simulator.state[1]])


def _everywhere(frames: np.ndarray) -> np.ndarray:
    return np.ones(frames.shape[1:3], dtype=bool)


def freeze(frames: np.ndarray, before: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The last picture again and again."""
    return np.broadcast_to(before, frames.shape).copy(), _everywhere(frames)


def gains(red: float, green: float, blue: float) -> Picture:
    """Colour channels multiplied."""

    def picture(
        frames: np.ndarray, before: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        return (frames * np.array([red, green, blue])).round().astype(np.uint8), _everywhere(frames)

    return picture


def noise(frames: np.ndarray, before: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian noise of 15 grey levels on every value."""
    noisy = frames + 15.0 * rng.standard_normal(frames.shape)
    return noisy.round().clip(0, 255).astype(np.uint8), _everywhere(frames)


def patch(frames: np.ndarray, before: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A grey square of 12 pixels at a random place."""
    mask = np.zeros(frames.shape[1:3], dtype=bool)
    row, column = rng.integers(0, np.array(mask.shape) - 12)
    mask[row : row + 12, column : column + 12] = True
    return np.where(mask[None, :, :, None], np.uint8(128), frames), mask


def blank(frames: np.ndarray, before: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Nothing but white."""
    return np.full_like(frames, 255), _everywhere(frames)


def mirrored(action: np.ndarray, space: Any) -> np.ndarray:
    """The action's mirror image in its range."""
    return (space.low + space.high - action).astype(action.dtype)


def nothing(action: np.ndarray, space: Any) -> np.ndarray:
    """The middle of the range, which is no torque."""
    return ((space.low + space.high) / 2).astype(action.dtype)


PERTURBATIONS: dict[str, Perturbation] = {
    p.name: p
    for p in (
        Perturbation("gravity x0.5", True, change=scale("g", 0.5)),
        Perturbation("gravity x1.5", True, change=scale("g", 1.5)),
        Perturbation("mass x2", True, change=scale("m", 2.0)),
        Perturbation("action inverted", True, command=mirrored),
        Perturbation("action dropped", True, command=nothing),
        Perturbation("frame freeze", True, picture=freeze),
        Perturbation("teleport", False, change=teleport),
        Perturbation("velocity flip", False, change=flip_velocity),
        Perturbation("tint", True, picture=gains(1.0, 0.85, 0.85)),
        Perturbation("dim", True, picture=gains(0.8, 0.8, 0.8)),
        Perturbation("noise", True, picture=noise),
        Perturbation("patch", True, picture=patch),
        Perturbation("blank frame", False, picture=blank),
    )
}
"""The rows of the table, by name."""

gymnasium.register(ENV_ID.split(":")[1], entry_point="agents.anomaly.perturbations:PerturbedPendulum")
WIDE_STARTS[ENV_ID] = pendulum_anywhere
