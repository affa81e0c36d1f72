"""Acting by planning again after every real chunk: real frames in, actions out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from agents.actions import batch_of_one, take
from agents.beliefs import Belief
from agents.objectives import Moment, Objective
from agents.planners import Plan, Planner
from worldmodel import InputError, WorldModel, WorldState


class MPCAgent:
    """Model-predictive control of one session: `reset(frame)`, then `act(frames)` with what each action caused.

    The world never drives: it observes what really happened, and imagines only to plan. ``state`` and ``last_plan`` may
    be read at any time.
    """

    def __init__(
        self,
        world: WorldModel,
        planner: Planner | None = None,
        objective: Objective | Callable[[Moment], Any] | None = None,
    ) -> None:
        self.world = world
        self.planner = planner or Planner()
        self.objective = objective
        self.state: WorldState | None = None
        self.last_plan: Plan | None = None
        self._warm: tuple[Belief, np.ndarray] | None = None
        self._action: Any = None
        self._seed, self._chunks = 0, 0

    def reset(self, frames: np.ndarray, seed: int = 0) -> None:
        """Begin with the first real chunk (n, height, width, 3) uint8, or one picture (height, width, 3) held still.

        Raises:
            InputError: another shape or dtype.
        """
        pixels = np.asarray(frames)
        if pixels.ndim == 3:
            pixels = np.broadcast_to(pixels, (self.world.first_frames, *pixels.shape))
        self.state, _ = self.world.observe(self.world.initial_state([seed]), pixels[None].copy())
        self.last_plan, self._warm, self._action = None, None, None
        self._seed, self._chunks = seed, 0

    def act(self, frames: np.ndarray | None = None) -> Any:
        """The first action of a new plan, in the world's action space.

        ``frames`` (F, height, width, 3) uint8: the chunk that the action before caused, observed first; None where
        nothing has happened since `reset`, or `observe` was called.

        Raises:
            InputError: before `reset`, or frames before any action; and as `Planner.plan`.
        """
        if frames is not None:
            if self._action is None:
                raise InputError(
                    "no action has caused these frames; call act() first, or observe(frames, action)"
                )
            self.observe(frames, self._action)
        plan = self.planner.plan(self.world, self._session(), self.objective, self._draw(), self._warm)
        self.last_plan, self._action = plan, take(plan.actions, 0)
        return self._action

    def observe(self, frames: np.ndarray, action: Any) -> None:
        """What really happened: a chunk (F, height, width, 3) uint8, and the action that caused it.

        Raises:
            InputError: before `reset`, or another shape, dtype or range.
        """
        self.state, _ = self.world.observe(self._session(), np.asarray(frames)[None], batch_of_one(action))
        self._warm = None if self.last_plan is None else self.last_plan.warm
        self._chunks += 1

    def _session(self) -> WorldState:
        if self.state is None:
            raise InputError("the agent has seen nothing yet; call reset(frames) first")
        return self.state

    def _draw(self) -> int:
        """The search's seed at this chunk."""
        return int(np.random.SeedSequence((self._seed, self._chunks)).generate_state(1)[0])
