"""Acting by planning again after every real chunk: real frames in, actions out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

import numpy as np

from agents.actions import Actions, batch_of_one, take
from agents.beliefs import Belief
from agents.objectives import BehaviourPenalty, Moment, Objective, PredictedReward, TerminalValue
from agents.planners import Plan, Planner
from agents.proposals import propose_behaviour
from worldmodel import InputError, WorldModel, WorldState

HORIZON = 2
"""Chunks that are imagined before a world's value takes over."""


class MPCAgent:
    """Model-predictive control of one session: `reset(frame)`, then `act(frames)` with what each action caused.

    The world never drives: it observes what really happened, and imagines only to plan. ``state`` and ``last_plan`` may
    be read at any time. ``proposals``: from a session and a seed, sequences (n, H, ...) that each plan tries first.
    """

    def __init__(
        self,
        world: WorldModel,
        planner: Planner | None = None,
        objective: Objective | Callable[[Moment], Any] | None = None,
        proposals: Callable[[WorldState, int], Actions] | None = None,
    ) -> None:
        self.world = world
        self.planner = planner or Planner()
        self.objective = objective
        self.proposals = proposals
        self.state: WorldState | None = None
        self.last_plan: Plan | None = None
        self._warm: tuple[Belief, np.ndarray] | None = None
        self._action: Any = None
        self._seed, self._chunks = 0, 0

    @classmethod
    def informed(
        cls, world: WorldModel, planner: Planner | None = None, horizon: int | None = HORIZON
    ) -> Self:
        """With all that the world has learned about acting: predicted reward alone, or, where its heads foresee more,
        discounted, with its value behind the plan, a penalty for what its prior would not do, and the prior's sequences as
        a quarter of the candidates. Plans are then at most ``horizon`` chunks long, since the value knows the rest; None
        for the planner's own horizon.
        """
        planner = planner or Planner()
        if world.heads is None or world.heads.config.discount is None:
            return cls(world, planner)
        if horizon is not None and horizon < planner.search.horizon:
            planner = replace(planner, search=replace(planner.search, horizon=horizon))
        count, horizon = math.ceil(planner.search.candidates / 4), planner.search.horizon

        def proposals(state: WorldState, seed: int) -> Actions:
            rng = np.random.default_rng((seed, 1))
            return propose_behaviour(world, state, count, horizon, rng, sampling=planner.sampling)

        worth = PredictedReward(world.heads.config.discount) + TerminalValue.of(world)
        objective = worth + BehaviourPenalty.of(world)
        return cls(world, planner, objective, proposals)

    def reset(self, frames: np.ndarray, seed: int = 0) -> None:
        """Begin with the first real chunk (F, height, width, 3) uint8, or one picture (height, width, 3) held still.

        Where the codec begins with fewer frames, those are the chunk's last, and may be given alone.

        Raises:
            InputError: another shape or dtype.
        """
        pixels = np.asarray(frames)
        if pixels.ndim == 3:
            pixels = np.broadcast_to(pixels, (self.world.first_frames, *pixels.shape))
        if len(pixels) == self.world.chunk_frames:
            pixels = pixels[-self.world.first_frames :]
        self.state, _ = self.world.observe(self.world.initial_state([seed]), pixels[None].copy())
        self.last_plan, self._warm, self._action = None, None, None
        self._seed, self._chunks = seed, 0

    def act(self, frames: np.ndarray | None = None) -> Any:
        """The first action of a new plan, in the world's action space.

        ``frames`` (F, height, width, 3) uint8: the chunk that the action before caused, observed first; None where
        nothing has happened since `reset`, or `observe` was called.

        Raises:
            InputError: before `reset`, or frames before any action; and as `Planner.plan`. Nothing has changed then.
        """
        if frames is not None and self._action is None:
            raise InputError(
                "no action has caused these frames; call act() first, or observe(frames, action)"
            )
        before = self.state, self._warm, self._chunks
        try:
            if frames is not None:
                self.observe(frames, self._action)
            state, seed = self._session(), self._draw()
            tried = None if self.proposals is None else self.proposals(state, seed)
            plan = self.planner.plan(self.world, state, self.objective, seed, self._warm, tried)
        except BaseException:  # Ctrl-C too: the frames are to be given again
            self.state, self._warm, self._chunks = before
            raise
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
