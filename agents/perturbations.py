"""What can go wrong with a real Pendulum-v1 or its camera: labelled episodes on which a monitor is judged.

Axis letters: K chunks of an episode, F pixel frames of a chunk; height, width pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np

from worldmodel.training.episodes import Episode

ONSET = (10, 17)
"""The chunk with which a perturbation begins is drawn from this range."""
EVERY = 8
"""An event of a single chunk comes again after so many chunks."""

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

    def begins(self, chunks: int, rng: np.random.Generator) -> np.ndarray:
        """(n,) the chunks at which it (re)appears in an episode of so many chunks."""
        first = int(rng.integers(*ONSET))
        return np.array([first]) if self.lasting else np.arange(first, chunks, EVERY)

    def labels(self, chunks: int, begins: np.ndarray) -> np.ndarray:
        """(K,) int: 1 for chunks that it acts in, 0 before the first, -1 for those in between, which count as neither."""
        index = np.arange(chunks)
        if self.lasting:
            return (index >= begins[0]).astype(np.int64)
        return np.where(np.isin(index, begins), 1, np.where(index < begins[0], 0, -1))


class PerturbedEnv(gymnasium.Wrapper[Any, Any, Any, Any]):
    """A simulator that goes wrong before the given chunks (of ``frame_skip`` steps); its own values come back at reset."""

    def __init__(
        self,
        env: gymnasium.Env[Any, Any],
        perturbation: Perturbation,
        begins: np.ndarray,
        frame_skip: int,
        rng: np.random.Generator,
    ) -> None:
        super().__init__(env)
        self.perturbation, self.rng = perturbation, rng
        self.steps_of_change = {int(chunk) * frame_skip for chunk in begins}
        self.taken = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """As the environment."""
        self.taken = 0
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """As the environment, but for what goes wrong."""
        if self.taken in self.steps_of_change and self.perturbation.change is not None:
            self.perturbation.change(self.env.unwrapped, self.rng)
        if self.taken >= min(self.steps_of_change) and self.perturbation.command is not None:
            action = self.perturbation.command(action, self.env.action_space)
        self.taken += 1
        return self.env.step(action)


def perturb_pictures(
    episode: Episode,
    perturbation: Perturbation,
    begins: np.ndarray,
    frame_skip: int,
    rng: np.random.Generator,
) -> tuple[Episode, np.ndarray]:
    """The episode as a camera that goes wrong shows it, and the mask (height, width) of the pixels it changes."""
    assert perturbation.picture is not None
    frames = episode.frames.copy()
    mask = np.zeros(frames.shape[1:3], dtype=bool)
    for begin in begins:
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
    row, column = (int(rng.integers(size - 12)) for size in mask.shape)
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
