"""Planning by inverse dynamics: the world's own p(action | past, goal) as a planner's first candidates (arXiv 2605.08732).

Axis letters: n proposals, H chunks of the horizon, F pixel frames of a chunk.
"""

from __future__ import annotations

import numpy as np

from agents.action_inference import infer_action
from agents.actions import batch_of_one
from worldmodel import Sampling, WorldModel, WorldState


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
