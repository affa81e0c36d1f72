"""Planning in imagination: candidate actions are played in forks of one state, judged, and searched for the best.

Axis letters: N candidates, H chunks of the horizon, K best futures kept, F pixel frames of a chunk.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from agents.actions import Actions, leading, map_actions, take
from agents.beliefs import Belief, first_belief
from agents.memory import check_room
from agents.objectives import Moment, Objective, PredictedReward, as_objective, judge, survival_after
from agents.presets import Search, preset
from agents.search import Clock, search_actions
from worldmodel import InputError, Sampling, WorldModel, WorldState

FUTURES = 4
"""K, the best imagined futures that a plan keeps."""


@dataclass(frozen=True)
class Futures:
    """K imagined futures, best first.

    actions: (K, H, ...), in a Dict space a dict of such. returns: (K,) float64. frames: (K, H, F, height, width, 3)
    uint8, or (K, H, 0, height, width, 3) where none were decoded. latents: (K, H, C, h, w). reward, log_prob: (K, H),
    the reward and the nats of every chunk.
    """

    actions: Actions
    returns: np.ndarray
    frames: np.ndarray
    latents: np.ndarray
    reward: np.ndarray
    log_prob: np.ndarray

    def best(self, count: int) -> Futures:
        """The ``count`` futures of the highest return."""
        order = np.argsort(-self.returns, kind="stable")[:count]
        return Futures(*(take(getattr(self, name), order) for name in Futures.__annotations__))

    @torch.no_grad()
    def decoded(self, world: WorldModel) -> Futures:
        """The same futures with their frames, by a codec that decodes every chunk alone."""
        if self.frames.shape[2]:
            return self
        latents = torch.from_numpy(self.latents).to(world.device)
        frames, _ = world.codec.decode(latents, world.codec.initial_state(len(latents)))
        shape = (*self.latents.shape[:2], *world.frames_shape)
        return replace(self, frames=frames.cpu().numpy().reshape(shape))

    def joined(self, other: Futures | None) -> Futures:
        """These and other futures."""
        if other is None:
            return self
        pairs = ((getattr(self, name), getattr(other, name)) for name in Futures.__annotations__)
        return Futures(*(map_actions(lambda *p: np.concatenate(p), *pair) for pair in pairs))


@dataclass(frozen=True)
class Plan:
    """What a planner decided.

    actions: (H, ...) in the action space. value: their return, as `agents.search.Found` defines it. candidates:
    (N, H, ...) and returns: (N,) float64 of the last iteration. futures: the best of all iterations, imagined.
    iterations: completed. seconds: spent. warm: the belief and the sequences that the next plan begins with.
    """

    actions: Actions
    value: float
    candidates: Actions
    returns: np.ndarray
    futures: Futures
    iterations: int
    seconds: float
    warm: tuple[Belief, np.ndarray]


@torch.no_grad()
def imagine(
    world: WorldModel,
    state: WorldState,
    actions: Actions,
    objective: Objective | Callable[[Moment], Any],
    sampling: Sampling | None = None,
    decode: bool = True,
) -> Futures:
    """Play N action sequences (N, H, ...) in N forks of one session and add up the objective; in the given order.

    ``decode=False`` leaves the frames out where neither the objective nor the codec needs them.

    Raises:
        InputError: more than one session, or a value of the objective that is not finite, with its step.
    """
    if state.rows != 1:
        raise InputError(
            f"the state holds {state.rows} sessions, expected 1; take one with state.select([i])"
        )
    goal = as_objective(objective)
    n, horizon = leading(actions)[:2]
    branches = state.fork(n)
    survival = torch.ones(n, dtype=torch.float64)
    returns = torch.zeros(n, dtype=torch.float64)
    decode = decode or goal.sees_pixels or bool(state.codec)
    frames, latents, rewards, nats = [], [], [], []
    for step in range(horizon):
        taken = take(actions, step, axis=1)
        after, chunk = world.step(
            branches, taken, sampling, decode=decode, action_gain=goal.weighs_action_gain
        )
        moment = Moment(world, branches, after, chunk, taken, survival, step, horizon)
        returns = returns + judge(goal, moment)
        survival = survival_after(survival, chunk)
        branches = after
        frames.append(chunk.frames.cpu().numpy())
        latents.append(chunk.latent.float().cpu().numpy())
        rewards.append(chunk.reward.cpu().numpy())
        nats.append(chunk.log_prob.numpy())
    stacked = (np.stack(x, axis=1) for x in (frames, latents, rewards, nats))
    return Futures(actions, returns.numpy(), *stacked)


@dataclass(frozen=True)
class Planner:
    """A way to search, and how its futures are imagined. Holds no session: `plan` is a function of its arguments.

    search: see `Search`; `Planner.preset("fast")`, "quality" and "paper". sampling: of the imagined chunks, None for the
    world's own. memory: bytes that the branches may take, None for what is free.
    """

    search: Search = Search()
    sampling: Sampling | None = None
    memory: int | None = None

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Planner:
        """The planner of a preset, with fields of its `Search` changed.

        Raises:
            InputError: no preset of that name, or a value out of range.
        """
        try:
            return cls(replace(preset(name), **changes))
        except TypeError as error:
            raise InputError(f"not a field of Search: {error}") from error

    def plan(
        self,
        world: WorldModel,
        state: WorldState,
        objective: Objective | Callable[[Moment], Any] | None = None,
        seed: int = 0,
        warm: tuple[Belief, np.ndarray] | None = None,
        proposals: Actions | None = None,
        clock: Clock = time.perf_counter,
    ) -> Plan:
        """Search for the actions of the next H chunks of one session; the same seed gives the same plan.

        ``objective`` is `PredictedReward` by default; ``warm`` is what the plan of the chunk before left (`Plan.warm`).
        ``proposals`` (n, H, ...): sequences that are among the first candidates, as `propose_actions` makes them.

        Raises:
            InputError: an action space that cannot be searched, more branches than fit into memory, or an objective
            that is not finite.
        """
        search = self.search
        check_room(world, search.candidates, search.horizon, self.memory)
        belief, tried = warm or (first_belief(world.spec.action_space, search), None)
        if len(belief.centre) != search.horizon:
            raise InputError(f"the warm start has {len(belief.centre)} chunks, expected {search.horizon}")
        if proposals is not None:
            if leading(proposals)[1] != search.horizon:
                raise InputError(
                    f"the proposals have {leading(proposals)[1]} chunks, expected {search.horizon}"
                )
            proposed = belief.coordinates(proposals)
            tried = proposed if tried is None else np.concatenate((tried, proposed))
        goal = as_objective(PredictedReward() if objective is None else objective)
        kept: Futures | None = None

        def evaluate(actions: Actions) -> np.ndarray:
            nonlocal kept
            futures = imagine(world, state, actions, goal, self.sampling, decode=False)
            kept = futures.best(FUTURES).joined(kept).best(FUTURES)
            return futures.returns

        found = search_actions(evaluate, belief, search, np.random.default_rng(seed), tried, clock)
        assert kept is not None
        return Plan(
            found.actions,
            found.value,
            found.candidates,
            found.returns,
            kept.decoded(world),
            found.iterations,
            found.seconds,
            found.shift(search),
        )
