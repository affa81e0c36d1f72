"""A planner's first candidates: by inverse dynamics, the world's own p(action | past, goal) (arXiv 2605.08732), or as
the better half of its training episodes would act (a policy prior, as in TD-MPC2, arXiv 2310.16828).

Axis letters: n proposals, H chunks of the horizon, F pixel frames of a chunk, P floats of a packed action, A numbers of
an action in a belief's coordinates.
"""

from __future__ import annotations

import numpy as np

from agents.action_inference import infer_action
from agents.actions import Actions, batch_of_one, map_actions, take
from agents.beliefs import Belief, Categorical, Gaussian, Joint, first_belief
from agents.presets import Search
from worldmodel import InputError, Sampling, WorldModel, WorldState

SPREAD = 0.3
"""Standard deviation of a Box action about what the prior expects, in halves of its range."""
LEAST = 1e-2
"""Probability that any choice has at least, relative to the others: a regression may leave [0, 1]."""


def propose_actions(
    world: WorldModel,
    state: WorldState,
    goal: np.ndarray,
    count: int,
    horizon: int,
    rng: np.random.Generator,
    temperature: float = 4.0,
    sampling: Sampling | None = None,
) -> np.ndarray:
    """Sequences (n, H, ...) that lead towards a goal chunk (F, height, width, 3) uint8, for `Planner.plan`.

    Chunk by chunk: the actions that would most likely make the goal the very next chunk are sampled from their
    posterior, widened by ``temperature``; the most probable one is imagined, and the next chunk is asked about.

    Raises:
        InputError: as `agents.action_inference.infer_action`.
    """
    columns = []
    for _ in range(horizon):
        posterior = infer_action(world, state, goal, draws=1, refinements=1)
        drawn = posterior.tempered(temperature).sample(count, rng)
        drawn[0] = posterior.map
        columns.append(drawn)
        state, _ = world.step(state, batch_of_one(posterior.map), sampling)
    return np.stack(columns, axis=1)


def propose_behaviour(
    world: WorldModel,
    state: WorldState,
    count: int,
    horizon: int,
    rng: np.random.Generator,
    spread: float = SPREAD,
    sampling: Sampling | None = None,
) -> Actions:
    """Sequences (n, H, ...) in the manner of the better training episodes, for `Planner.plan`.

    Chunk by chunk, n imagined forks draw what the world's prior says of their own latents; the first takes the most
    probable action. ``spread``: standard deviation of a Box action, in halves of its range.

    Raises:
        InputError: a world without a prior, more than one session, or an action space that cannot be searched.
    """
    if world.heads is None or world.heads.config.discount is None:
        raise InputError(
            f"world {world.spec.name} has no prior over actions; train its heads with a discount"
        )
    if state.rows != 1:
        raise InputError(f"the state holds {state.rows} sessions, expected 1")
    belief = first_belief(world.spec.action_space, Search(horizon=1))
    branches, columns = state.fork(count), []
    for step in range(horizon):
        expected = world.ahead(branches).prior.double().cpu().numpy()
        taken = take(belief.actions(_drawn(belief, expected, spread, rng)[:, None]), 0, axis=1)
        columns.append(taken)
        if step < horizon - 1:
            branches, _ = world.step(branches, taken, sampling, decode=bool(state.codec), action_gain=False)
    return map_actions(lambda *parts: np.stack(parts, axis=1), *columns)


def unlike_behaviour(
    world: WorldModel, state: WorldState, actions: Actions, spread: float = SPREAD
) -> np.ndarray:
    """(B,) nats by which actions (B, ...) are less probable, under the world's prior, than its most probable ones.

    Of the distribution that `propose_behaviour` draws from; 0 or above. Raises InputError for a world without a prior.
    """
    belief = first_belief(world.spec.action_space, Search(horizon=1))
    x = belief.coordinates(map_actions(lambda a: a[:, None], actions))[:, 0]
    return _unlike(belief, world.ahead(state).prior.double().cpu().numpy(), x, spread)


def _unlike(belief: Belief, expected: np.ndarray, x: np.ndarray, spread: float) -> np.ndarray:
    """Of coordinates (n, A), given expected packed actions (n, P)."""
    if isinstance(belief, Gaussian):
        return np.asarray(0.5 * np.square((x - np.clip(expected, -1.0, 1.0)) / spread).sum(1))
    if isinstance(belief, Categorical):
        weights = [np.clip(part, LEAST, None) for part in np.split(expected, _ends(belief), axis=1)]
        own = [np.take_along_axis(w, x[:, [at]].astype(int), axis=1)[:, 0] for at, w in enumerate(weights)]
        return np.asarray(sum(np.log(w.max(1) / p) for w, p in zip(weights, own, strict=True)))
    columns = np.split(x, np.cumsum([p.centre.shape[-1] for p in belief.parts.values()])[:-1], axis=1)
    each = zip(belief.parts.values(), _pieces(belief, expected), columns, strict=True)
    return np.asarray(sum(_unlike(p, e, own, spread) for p, e, own in each))


def _ends(belief: Categorical) -> np.ndarray:
    """Where the one-hot parts of a packed action but the last end."""
    return np.cumsum(belief.allowed.sum(-1))[:-1]


def _pieces(belief: Joint, packed: np.ndarray) -> list[np.ndarray]:
    """Packed actions (n, P) of a Dict space, key by key."""
    sizes = [
        int(part.allowed.sum()) if isinstance(part, Categorical) else part.centre.shape[-1]
        for part in belief.parts.values()
    ]
    return np.split(packed, np.cumsum(sizes)[:-1], axis=1)


def _drawn(belief: Belief, expected: np.ndarray, spread: float, rng: np.random.Generator) -> np.ndarray:
    """Coordinates (n, A) drawn around expected packed actions (n, P); the first row is the most probable."""
    if isinstance(belief, Gaussian):
        noise = rng.standard_normal(expected.shape)
        noise[0] = 0.0
        return np.clip(expected + spread * noise, -1.0, 1.0)
    if isinstance(belief, Categorical):
        return np.stack([_chosen(part, rng) for part in np.split(expected, _ends(belief), axis=1)], axis=1)
    pieces = zip(belief.parts.values(), _pieces(belief, expected), strict=True)
    return np.concatenate([_drawn(p, e, spread, rng) for p, e in pieces], axis=1)


def _chosen(expected: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Choices (n,) from expected one-hot vectors (n, choices), the first row's most probable."""
    weights = np.clip(expected, LEAST, None)
    edges = np.cumsum(weights, axis=1) / weights.sum(1, keepdims=True)
    chosen = (rng.random((len(weights), 1)) >= edges[:, :-1]).sum(1)
    chosen[0] = weights[0].argmax()
    return chosen
