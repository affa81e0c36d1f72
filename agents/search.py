"""Searching for a good sequence of actions: a belief is sampled, judged and fitted again.

Nothing here knows a world: a search is given a function from candidate sequences to their returns.

Axis letters: N candidates, E elites, H chunks of the horizon, A numbers of one action.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from agents.actions import Actions
from agents.beliefs import Belief, Gaussian
from agents.presets import Search

Evaluate = Callable[[Actions], np.ndarray]
"""Candidate sequences (N, H, ...) in the action space to their returns (N,)."""

Clock = Callable[[], float]


@dataclass(frozen=True)
class Found:
    """The end of a search. ``x`` are sequences in the belief's own coordinates.

    actions: (H, ...) to execute. value: its return; for MPPI, whose sequence is an average, the weighted mean return.
    candidates: (N, H, ...) and returns: (N,) of the last iteration. belief, elites (E, H, A): for a warm start.
    iterations: completed. seconds: spent.
    """

    actions: Actions
    value: float
    candidates: Actions
    returns: np.ndarray
    belief: Belief
    elites: np.ndarray
    iterations: int
    seconds: float

    def shift(self, search: Search) -> tuple[Belief, np.ndarray]:
        """Where the search one chunk later begins: the belief, and sequences to be tried again."""
        kept = self.elites[: math.ceil(search.keep * len(self.elites))]
        return self.belief.shift(search), np.concatenate((kept[:, 1:], kept[:, -1:]), axis=1)


def weights_of(returns: np.ndarray, elites: np.ndarray, search: Search) -> np.ndarray:
    """Weights (E,) of the elites: alike, or for MPPI the softmax of the standardised returns."""
    if search.method != "mppi":
        return np.full(len(elites), 1 / len(elites))
    spread = max(float(returns.std()), 1e-12)
    logits = (returns[elites] - returns.max()) / spread / search.temperature
    weights = np.exp(logits)
    return weights / weights.sum()


def search_actions(
    evaluate: Evaluate,
    belief: Belief,
    search: Search,
    rng: np.random.Generator,
    tried: np.ndarray | None = None,
    clock: Clock = time.perf_counter,
) -> Found:
    """Search from ``belief``; its centre, and ``tried`` (n, H, A), are among the first candidates."""
    began, slowest, best = clock(), 0.0, None
    kept = belief.sample(rng, 1, search)[:0] if tried is None else tried
    done = 0
    for index in range(search.iterations):
        started = clock()
        if index and search.deadline is not None and started - began + slowest > search.deadline:
            break
        n = max(math.ceil(search.candidates / search.shrink**index), search.elites, len(kept) + 1)
        x = np.concatenate((belief.sample(rng, n - len(kept), search), kept))
        returns = np.asarray(evaluate(belief.actions(x)), dtype=np.float64)
        order = np.argsort(-returns, kind="stable")
        top = order[: search.elites]
        weights, elites = weights_of(returns, top, search), x[top]
        if best is None or returns[top[0]] > best[0]:
            best = float(returns[top[0]]), x[top[0]]
        if search.method == "shooting":
            belief = belief.fit(best[1][None], np.ones(1), search)
        else:
            belief = belief.fit(elites, weights, search)
        kept = elites[: math.ceil(search.keep * len(elites))]
        done, slowest = index + 1, max(slowest, clock() - started)
    assert best is not None
    value, chosen = best
    if search.method == "mppi" and isinstance(belief, Gaussian):
        value, chosen = float(weights @ returns[top]), belief.centre
    candidates = belief.actions(x)
    seconds = clock() - began
    return Found(belief.actions(chosen), value, candidates, returns, belief, elites, done, seconds)
