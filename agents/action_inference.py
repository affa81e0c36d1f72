"""Which action was it? p(action | past, what happened) by Bayes over the world's exact likelihoods; no inverse model.

All candidates see the same noised latent, so that their likelihoods differ by the action alone.

Axis letters: A candidate actions, D numbers of a Box action, F pixel frames, T chunks of a clip.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from gymnasium import spaces
from tqdm import tqdm

from worldmodel import InputError, WorldModel, WorldState

MOST_CHOICES = 4096
"""Largest number of actions of a discrete space that is enumerated."""
MOST_DIMENSIONS = 6
FIRST_CELLS = {1: 41, 2: 9, 3: 5, 4: 4, 5: 3, 6: 3}
"""Cells along each axis of a Box's first grid, by its dimensions."""
TEMPERATURES = tuple(sorted(np.geomspace(0.25, 4.0, 33).tolist(), key=lambda t: abs(math.log(t))))
"""Those that `fit_temperature` tries, the nearest to 1 first."""
ROWS = 512
"""Candidates of one forward pass."""

LogPrior = Callable[[np.ndarray], np.ndarray]
"""Actions (A, ...) to log-weights (A,), a density for Box; need not be normalised."""


@dataclass(frozen=True)
class ActionPosterior:
    """p(action | past, what happened) over A candidates.

    actions: (A, ...) in the action space; for Box the centres of cells that tile it. probabilities: (A,) float64, sum
    to one. log_likelihood: (A,) float64 nats of the chunk under each. volume: (A,) of the cells, 1 for discrete spaces.
    widths: (A, D) sides of the cells, or None.
    """

    space: spaces.Space[Any]
    actions: np.ndarray
    probabilities: np.ndarray
    log_likelihood: np.ndarray
    volume: np.ndarray
    widths: np.ndarray | None = None

    @property
    def map(self) -> np.ndarray:
        """(...) the action of the highest posterior density."""
        return np.asarray(self.actions[int(np.argmax(self.probabilities / self.volume))])

    @property
    def mean(self) -> np.ndarray:
        """(...) float64 posterior mean.

        Raises:
            InputError: the space is discrete, where a mean is no action; use `map`.
        """
        if self.widths is None:
            raise InputError(f"{self.space} has no mean action; use map")
        return np.tensordot(self.probabilities, self.actions.astype(np.float64), axes=1)

    def credible_set(self, level: float = 0.9) -> np.ndarray:
        """(A,) bool: the smallest set of candidates, by density, that holds at least ``level`` of the probability.

        Raises:
            InputError: a level outside (0, 1].
        """
        if not 0 < level <= 1:
            raise InputError(f"level is {level}, expected one in (0, 1]")
        order = np.argsort(-self.probabilities / self.volume, kind="stable")
        count = int(np.searchsorted(np.cumsum(self.probabilities[order]), level - 1e-12)) + 1
        inside = np.zeros(len(order), dtype=bool)
        inside[order[:count]] = True
        return inside

    def contains(self, action: Any, level: float = 0.9) -> bool:
        """The credible set holds this action; for Box, the cell that it lies in."""
        value = np.asarray(action, dtype=np.float64).reshape(-1)
        off = np.abs(self.actions.reshape(len(self.actions), -1) - value)
        reach = 0.0 if self.widths is None else self.widths / 2
        return bool(self.credible_set(level)[np.argmin((off - reach).max(-1))])

    def tempered(self, temperature: float) -> ActionPosterior:
        """The posterior with likelihoods raised to 1 / temperature, under a uniform prior: wider above 1.

        Raises:
            InputError: a temperature that is not above 0.
        """
        if not temperature > 0:
            raise InputError(f"temperature is {temperature}, expected a number above 0")
        p = _normalised(self.log_likelihood / temperature, self.actions, self.volume, None)
        return replace(self, probabilities=p)

    def contains_tempered(self, action: Any, level: float = 0.9) -> list[bool]:
        """Whether the credible set holds this action at each of `TEMPERATURES`; what `fit_temperature` takes."""
        return [self.tempered(temperature).contains(action, level) for temperature in TEMPERATURES]

    def sample(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """(n, ...) actions; within a Box's cell, uniformly."""
        picked = rng.choice(len(self.actions), size=n, p=self.probabilities)
        drawn = self.actions[picked]
        if self.widths is None or not isinstance(self.space, spaces.Box):
            return drawn
        jitter = (rng.random((n, self.widths.shape[1])) - 0.5) * self.widths[picked]
        moved = np.clip(drawn + jitter.reshape(drawn.shape), self.space.low, self.space.high)
        return moved.astype(self.space.dtype)


def fit_temperature(inside: Sequence[Sequence[bool]], level: float = 0.9) -> float:
    """The one of `TEMPERATURES` at which credible sets of ``level`` hold nearest to that share of the actions taken.

    ``inside``: `ActionPosterior.contains_tempered` of each of many posteriors. For `ActionPosterior.tempered`: a world
    that is less sure than it might be has a temperature below 1.

    Raises:
        InputError: no posteriors.
    """
    if not len(inside):
        raise InputError("no posteriors; a temperature is fitted to many, whose actions are known")
    return TEMPERATURES[int(np.abs(np.mean(inside, axis=0) - level).argmin())]


def infer_action(
    world: WorldModel,
    state: WorldState,
    frames: np.ndarray,
    draws: int = 4,
    log_prior: LogPrior | None = None,
    refinements: int = 2,
) -> ActionPosterior:
    """The posterior over the action that caused a real chunk (F, height, width, 3) uint8 after one session's past.

    Exact for Discrete and MultiDiscrete. A Box (1 to 6 dimensions) is tiled by cells, and those that hold most of the
    probability are halved along every axis with those that touch them, ``refinements`` times: a posterior narrower than the
    cells that this leaves needs more of them. The log-likelihood of an action is the mean over
    ``draws`` of the noise added to the latent; the prior is uniform unless ``log_prior`` is given.

    Raises:
        InputError: another space, a state of several sessions, wrong frames, or a prior that is not finite anywhere.
    """
    if state.rows != 1:
        raise InputError(
            f"the state holds {state.rows} sessions, expected 1; take one with state.select([i])"
        )
    space = world.spec.action_space
    pixels = np.asarray(frames)[None]

    def likelihood(actions: np.ndarray) -> np.ndarray:
        parts = []
        for first in range(0, len(actions), ROWS):
            batch = actions[first : first + ROWS]
            same = state.select([0] * len(batch))
            seen = np.repeat(pixels, len(batch), axis=0)
            parts.append(-world.score(same, seen, batch, draws).rate.numpy())
        return np.concatenate(parts)

    if not isinstance(space, spaces.Box):
        actions = enumerate_actions(space)
        nats, ones = likelihood(actions), np.ones(len(actions))
        return ActionPosterior(space, actions, _normalised(nats, actions, ones, log_prior), nats, ones)
    centres, widths = _first_grid(space)
    nats = likelihood(_as_actions(space, centres))
    for _ in range(refinements):
        volume = widths.prod(-1)
        p = _normalised(nats, _as_actions(space, centres), volume, log_prior)
        split = _to_split(p, nats, centres, widths)
        corners = np.array(list(itertools.product((-0.25, 0.25), repeat=centres.shape[1])))
        finer = (centres[split][:, None] + corners * widths[split][:, None]).reshape(-1, centres.shape[1])
        new = likelihood(_as_actions(space, finer))
        centres = np.concatenate((centres[~split], finer))
        widths = np.concatenate((widths[~split], np.repeat(widths[split] / 2, len(corners), axis=0)))
        nats = np.concatenate((nats[~split], new))
    actions, volume = _as_actions(space, centres), widths.prod(-1)
    p = _normalised(nats, actions, volume, log_prior)
    return ActionPosterior(space, actions, p, nats, volume, widths)


def label_video(
    world: WorldModel, state: WorldState, frames: np.ndarray, draws: int = 4
) -> tuple[np.ndarray, list[ActionPosterior]]:
    """Actions (T, ...) for an unlabelled clip (T, F, height, width, 3) uint8 that follows one session's past.

    Chunk by chunk: the most probable action is inferred, then taken as the one that happened. For Box it is the mean.

    Raises:
        InputError: as `infer_action`.
    """
    labels, posteriors = [], []
    for chunk in tqdm(frames, desc="infer actions", unit="chunk", leave=False):
        posterior = infer_action(world, state, chunk, draws)
        label = posterior.map if posterior.widths is None else posterior.mean
        labels.append(np.asarray(label).astype(posterior.actions.dtype))
        posteriors.append(posterior)
        state, _ = world.observe(state, chunk[None], labels[-1][None])
    return np.stack(labels), posteriors


def enumerate_actions(space: spaces.Space[Any]) -> np.ndarray:
    """Every action (A, ...) of a Discrete or MultiDiscrete space.

    Raises:
        InputError: another space, or more than 4096 actions.
    """
    if isinstance(space, spaces.Discrete):
        sizes, starts = np.array([space.n]), np.array([space.start])
    elif isinstance(space, spaces.MultiDiscrete):
        sizes, starts = np.asarray(space.nvec).reshape(-1), np.asarray(space.start).reshape(-1)
    else:
        raise InputError(
            f"cannot infer actions of {space}; expected Discrete, MultiDiscrete or a bounded Box"
        )
    count = math.prod(int(n) for n in sizes)
    if count > MOST_CHOICES:
        raise InputError(f"{space} has {count} actions, expected at most {MOST_CHOICES}")
    choices = np.array(list(itertools.product(*(range(int(n)) for n in sizes)))) + starts
    return choices.reshape(count, *(space.shape or ())).astype(space.dtype)


def _first_grid(space: spaces.Box) -> tuple[np.ndarray, np.ndarray]:
    """Centres and widths (A, D) of the cells of the first tiling."""
    low, high = (np.asarray(b, dtype=np.float64).reshape(-1) for b in (space.low, space.high))
    bounded = bool(np.isfinite(low).all() and np.isfinite(high).all() and (high > low).all())
    if not bounded or not 1 <= len(low) <= MOST_DIMENSIONS or not np.issubdtype(space.dtype, np.floating):
        raise InputError(
            f"cannot infer actions of {space}; expected a bounded Box of floats with 1 to 6 dimensions"
        )
    cells = FIRST_CELLS[len(low)]
    steps = np.array(list(itertools.product(range(cells), repeat=len(low)))) + 0.5
    width = (high - low) / cells
    return low + steps * width, np.tile(width, (len(steps), 1))


def _as_actions(space: spaces.Box, values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), *space.shape).astype(space.dtype)


def _to_split(p: np.ndarray, nats: np.ndarray, centres: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """(A,) bool: the fewest cells that hold 99 % of the probability, and those that touch them, whose centres may be far
    from what they hold; the heaviest first, as many as one pass takes the parts of.
    """
    order = np.lexsort((-nats, -p))
    count = int(np.searchsorted(np.cumsum(p[order]), 0.99)) + 1
    most = ROWS // 2 ** centres.shape[1]
    heavy = order[: min(count, most)]
    apart = np.abs(centres[:, None] - centres[heavy]) / (widths[:, None] + widths[heavy])
    touching = (apart < 0.51).all(-1).any(1)
    split = np.zeros(len(p), dtype=bool)
    split[order[touching[order]][:most]] = True
    return split


def _normalised(
    nats: np.ndarray, actions: np.ndarray, volume: np.ndarray, log_prior: LogPrior | None
) -> np.ndarray:
    """Probabilities (A,) from log-likelihoods, volumes and a prior."""
    logits = nats + np.log(volume)
    if log_prior is not None:
        logits = logits + np.asarray(log_prior(actions), dtype=np.float64)
    if logits.shape != nats.shape or np.isnan(logits).any() or not np.isfinite(logits.max()):
        raise InputError(f"log_prior must return ({len(nats)},) numbers, finite for at least one action")
    p = np.exp(logits - logits.max())
    return p / p.sum()
