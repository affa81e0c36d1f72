"""What a plan is worth: objectives that are added up over its chunks, `PredictedReward() + TerminationPenalty(50.0)`.

Axis letters: N branches, T chunks of a clip, F pixel frames of a chunk, C latent channels; h, w latent grid.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.actions import Actions, take
from agents.proposals import unlike_behaviour
from worldmodel import Chunk, InputError, WorldModel, WorldState


@dataclass(frozen=True)
class Moment:
    """Chunk ``step`` (from 0) of N imagined branches, as objectives see it.

    before, after: the N sessions around the chunk. actions: (N, ...), or a dict of such, what caused it. survival: (N,)
    float64, the probability that no chunk before it ended the episode.
    """

    world: WorldModel
    before: WorldState
    after: WorldState
    chunk: Chunk
    actions: Actions
    survival: Tensor
    step: int
    horizon: int

    @property
    def last(self) -> bool:
        """The plan ends with this chunk."""
        return self.step == self.horizon - 1


class Objective(ABC):
    """What a chunk adds to its plan's return; ``+`` adds objectives."""

    @abstractmethod
    def value(self, moment: Moment) -> Tensor:
        """(N,) what the moment adds to the returns of the N branches."""

    @property
    def name(self) -> str:
        """What error messages call it."""
        return type(self).__name__

    @property
    def sees_pixels(self) -> bool:
        """It reads the chunk's frames; where no objective does, none are decoded."""
        return False

    @property
    def weighs_action_gain(self) -> bool:
        """It reads the chunk's ``action_gain``; where no objective does, that is NaN, and planning takes less time."""
        return False

    def __add__(self, other: Objective) -> Objective:
        """Both, added up."""
        return Total((*_parts(self), *_parts(other)))


def _parts(objective: Objective) -> tuple[Objective, ...]:
    return objective.parts if isinstance(objective, Total) else (objective,)


@dataclass(frozen=True)
class Total(Objective):
    """The sum of objectives; each one's values are checked."""

    parts: tuple[Objective, ...]

    @property
    def sees_pixels(self) -> bool:
        """One of the parts does."""
        return any(part.sees_pixels for part in self.parts)

    @property
    def weighs_action_gain(self) -> bool:
        """One of the parts does."""
        return any(part.weighs_action_gain for part in self.parts)

    def value(self, moment: Moment) -> Tensor:
        """The sum of the parts.

        Raises:
            InputError: a part returned a value that is not finite, or another shape than (N,).
        """
        total = torch.zeros(moment.after.rows, dtype=torch.float64)
        for part in self.parts:
            total = total + _checked(part.value(moment), part.name, moment)
        return total


def _checked(value: Any, name: str, moment: Moment) -> Tensor:
    rows = moment.after.rows
    try:
        values = torch.as_tensor(value, dtype=torch.float64).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{name} at step {moment.step} returned {type(value).__name__}, expected ({rows},)"
        ) from error
    if tuple(values.shape) != (rows,):
        raise InputError(
            f"{name} at step {moment.step} returned shape {tuple(values.shape)}, expected ({rows},)"
        )
    bad = torch.nonzero(~torch.isfinite(values))
    if len(bad):
        row = int(bad[0])
        raise InputError(
            f"{name} returned {float(values[row])} at step {moment.step} of {moment.horizon} (branch {row}, action "
            f"{' '.join(str(take(moment.actions, row)).split())}); return finite numbers"
        )
    return values


def judge(objective: Objective, moment: Moment) -> Tensor:
    """(N,) float64 on the CPU: what an objective gives the moment, checked.

    Raises:
        InputError: a value that is not finite, or another shape than (N,); it names the objective and the step.
    """
    return Total(_parts(objective)).value(moment)


@dataclass(frozen=True)
class PredictedReward(Objective):
    """The world's predicted reward, times ``discount ** step`` and the probability that the episode still runs."""

    discount: float = 1.0

    def value(self, moment: Moment) -> Tensor:
        """See the class. Raises InputError for a world without heads, which predicts none."""
        if moment.world.heads is None:
            raise InputError(
                f"world {moment.world.spec.name} predicts no reward; train it with heads, or plan by another objective"
            )
        return self.discount**moment.step * moment.survival * moment.chunk.reward.cpu().double()


@dataclass(frozen=True)
class TerminationPenalty(Objective):
    """Minus ``penalty`` times the probability that the episode ends with this chunk."""

    penalty: float

    def value(self, moment: Moment) -> Tensor:
        """See the class."""
        return -self.penalty * moment.survival * moment.chunk.termination.cpu().double()


@dataclass(frozen=True)
class LatentDistance(Objective):
    """Minus ``weight`` times the mean squared distance of the latent from a goal (C, h, w).

    Of every chunk, or of the plan's last one alone with ``only_last``.
    """

    goal: Tensor = field(repr=False)
    weight: float = 1.0
    only_last: bool = False

    @classmethod
    def to_picture(
        cls, world: WorldModel, picture: np.ndarray, weight: float = 1.0, only_last: bool = False
    ) -> LatentDistance:
        """The goal is a still picture (height, width, 3) uint8, encoded by the world's codec as a chunk of it.

        Raises:
            InputError: another shape or dtype.
        """
        expected = (*world.spec.frame_size, 3)
        pixels = np.asarray(picture)
        if pixels.dtype != np.uint8 or pixels.shape != expected:
            raise InputError(f"the goal picture is {pixels.dtype} {pixels.shape}, expected uint8 {expected}")
        clip = torch.from_numpy(np.stack([pixels] * world.first_frames))[None].to(world.device)
        with torch.no_grad():
            latents, _ = world.codec.encode(clip, world.codec.initial_state(1))
        return cls(latents[0, 0], weight, only_last)

    def value(self, moment: Moment) -> Tensor:
        """See the class."""
        if self.only_last and not moment.last:
            return torch.zeros(moment.after.rows)
        distance = (moment.chunk.latent - self.goal.to(moment.chunk.latent)).square().mean((1, 2, 3))
        return -self.weight * distance


@dataclass(frozen=True)
class SurprisePenalty(Objective):
    """Minus ``weight * max(0, surprise - limit)``: a plan is to stay where the world knows what it says.

    Surprise is in nats a chunk, of the imagined frames *encoded again* and scored as if they had been observed. (The
    world's log-density of its own samples would, in expectation, only punish entropy.) Costs one more pass a chunk.
    """

    weight: float
    limit: float

    @classmethod
    def calibrated(
        cls,
        world: WorldModel,
        weight: float,
        quantile: float = 0.95,
        clips: tuple[np.ndarray, Any] | None = None,
        seed: int = 0,
    ) -> SurprisePenalty:
        """The limit is a quantile of the surprise of real chunks given their real past.

        ``clips``: frames (B, T, F, height, width, 3) uint8 and actions (B, T, ...), T > 1; by default the world's bank.

        Raises:
            InputError: clips of one chunk, none in a world without a bank, or a quantile outside (0, 1).
        """
        if clips is None:
            if "frames" not in world.starts:
                raise InputError(
                    f"world {world.spec.name} has no bank of clips; pass clips=(frames, actions)"
                )
            frames = world.starts["frames"]
            clips = frames, world.start_actions(np.arange(len(frames)))
        frames, actions = clips
        if not 0 < quantile < 1 or frames.shape[1] < 2:
            raise InputError(
                f"quantile is {quantile} of clips of {frames.shape[1]} chunks; expected (0, 1) and 2 or more"
            )
        state = world.initial_state([seed + row for row in range(len(frames))])
        _, chunks = world.observe_clip(state, frames, actions)
        return cls(weight, float(np.quantile([-c.log_prob.numpy() for c in chunks[1:]], quantile)))

    @property
    def sees_pixels(self) -> bool:
        """They are encoded again."""
        return True

    def value(self, moment: Moment) -> Tensor:
        """See the class."""
        score = moment.world.score(moment.before, moment.chunk.frames, moment.actions)
        return -self.weight * (score.rate - self.limit).clamp_min(0.0)


@dataclass(frozen=True)
class GoalLikelihood(Objective):
    """``weight`` times the log-density, in nats, of a goal chunk as what comes next: p(goal | branch, action).

    Of every chunk, or of the plan's last one alone with ``only_last``. Latents lie near a manifold, so the density of a
    goal that a branch just misses falls off a cliff: ``temperature`` is the standard deviation of the base noise that
    the goal is measured against (1 is the model's own). All branches see the same noised goal. Costs one more pass a
    chunk.

    frames: (F, height, width, 3) uint8.
    """

    frames: np.ndarray = field(repr=False)
    weight: float = 1.0
    temperature: float = 3.0
    only_last: bool = True

    def __post_init__(self) -> None:
        """Check the range. Raises InputError."""
        if not self.temperature > 0:
            raise InputError(f"temperature is {self.temperature}, expected a number above 0")

    @classmethod
    def to_picture(cls, world: WorldModel, picture: np.ndarray, **options: Any) -> GoalLikelihood:
        """The goal is a picture (height, width, 3) uint8 that holds still for a chunk."""
        return cls(np.stack([np.asarray(picture)] * world.chunk_frames), **options)

    def value(self, moment: Moment) -> Tensor:
        """See the class."""
        rows = moment.before.rows
        if self.only_last and not moment.last:
            return torch.zeros(rows)
        same = moment.before.reseed([0] * rows)
        goal = np.repeat(np.asarray(self.frames)[None], rows, axis=0)
        world = moment.world
        # guided, the noise would be that of another density
        plain = replace(world.spec.sampling, guidance=0.0)
        chunk = world.observe(same, goal, moment.actions, plain)[1]
        square = chunk.noise.double().square().flatten(1)
        tempered = (1.0 - self.temperature**-2) / 2.0 * square.sum(1) - square.shape[1] * math.log(
            self.temperature
        )
        return self.weight * (chunk.log_prob + tempered.cpu())


@dataclass(frozen=True)
class TerminalValue(Objective):
    """What is to be had behind the plan's last chunk, if the episode still runs: ``discount ** H * value(latents)``.

    function: latents (N, C, h, w) to (N,) returns-to-go, e.g. the critic of a policy; None for the world's own value.
    """

    function: Callable[[Tensor], Any] | None
    discount: float = 1.0

    @classmethod
    def of(cls, world: WorldModel) -> TerminalValue:
        """The world's own value head, under the discount that it was learned with.

        Raises:
            InputError: the world has none.
        """
        heads = world.heads
        if heads is None or heads.config.discount is None:
            raise InputError(
                f"world {world.spec.name} foresees no value; train its heads with a discount, or pass a function"
            )
        return cls(None, heads.config.discount)

    def value(self, moment: Moment) -> Tensor:
        """See the class."""
        if not moment.last:
            return torch.zeros(moment.after.rows)
        function = self.function
        ahead: Any = function(moment.chunk.latent) if function else moment.world.ahead(moment.after).value
        ahead = torch.as_tensor(ahead, dtype=torch.float64).cpu()
        return self.discount**moment.horizon * survival_after(moment.survival, moment.chunk) * ahead


NAT = 1 / 16
"""What a nat off the prior costs a plan, in standard deviations of the world's values."""


@dataclass(frozen=True)
class BehaviourPenalty(Objective):
    """Minus ``weight * discount ** step`` a nat by which an action is less probable than the most probable one under the
    world's prior, while the episode runs: KL-regularised control (arXiv 1805.00909, sec. 3.1). It keeps a plan where the
    training episodes told how things go on, unless much is to be had elsewhere.
    """

    weight: float
    discount: float = 1.0

    @classmethod
    def of(cls, world: WorldModel, nat: float = NAT) -> BehaviourPenalty:
        """``nat``: of a nat, in standard deviations of the world's values.

        Raises:
            InputError: the world has no prior.
        """
        heads = world.heads
        if heads is None or heads.config.discount is None:
            raise InputError(
                f"world {world.spec.name} has no prior over actions; train its heads with a discount"
            )
        return cls(nat * float(heads.value_std), heads.config.discount)

    def value(self, moment: Moment) -> Tensor:
        """See the class."""
        nats = torch.from_numpy(unlike_behaviour(moment.world, moment.before, moment.actions))
        return -self.weight * self.discount**moment.step * moment.survival * nats


@dataclass(frozen=True)
class Custom(Objective):
    """A function of the moment that returns (N,) numbers."""

    function: Callable[[Moment], Any]

    @property
    def name(self) -> str:
        """The function's own name."""
        return str(getattr(self.function, "__name__", "the objective"))

    @property
    def sees_pixels(self) -> bool:
        """It may."""
        return True

    @property
    def weighs_action_gain(self) -> bool:
        """It may."""
        return True

    def value(self, moment: Moment) -> Tensor:
        """See the class."""
        return self.function(moment)  # checked where the parts are added up


def survival_after(survival: Tensor, chunk: Chunk) -> Tensor:
    """(N,) float64: the probability that the episode runs on behind the chunk."""
    return survival * (1.0 - chunk.termination.cpu().double())


def as_objective(objective: Objective | Callable[[Moment], Any]) -> Objective:
    """An objective as it is; a plain function as `Custom`.

    Raises:
        InputError: neither.
    """
    if isinstance(objective, Objective):
        return objective
    if not callable(objective):
        raise InputError(
            f"the objective is {type(objective).__name__}, expected an Objective or a function of a Moment"
        )
    return Custom(objective)
