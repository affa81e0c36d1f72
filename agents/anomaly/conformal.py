"""The statistics of a monitor: p-values against normal values, combined; thresholds by episodes. No model in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from worldmodel import InputError

TAIL_SHARE = 0.05
"""Share of the calibration values that the generalised Pareto tail is fitted to."""
SMALLEST_P = 1e-12
LEAST_EPISODES = 100
"""Normal episodes below which no threshold is trusted, whatever alpha is."""


@dataclass(frozen=True)
class Tail:
    """How often a normal value is at least so large: empirical, and a generalised Pareto law beyond its 95 % quantile.

    values: (n,) float64, sorted. shape, scale: of the excesses over ``start`` by probability-weighted moments (Hosking
    and Wallis, 1987), the shape at least 0, so that no finite value is impossible.
    """

    values: np.ndarray
    start: float
    shape: float
    scale: float

    @classmethod
    def fit(cls, values: np.ndarray) -> Tail:
        """To normal values (n,)."""
        ordered = np.sort(np.asarray(values, dtype=np.float64).ravel())
        count = max(2, math.ceil(TAIL_SHARE * len(ordered)))
        start = ordered[max(len(ordered) - count - 1, 0)]
        excess = ordered[-count:] - start
        rank = (np.arange(count) + 0.65) / count
        mean, weighted = float(excess.mean()), float(((1 - rank) * excess).mean())
        if mean - 2 * weighted <= 1e-12 * max(mean, 1.0):
            return cls(ordered, float(start), 0.0, max(mean, 1e-12))
        shape = min(max(2 - mean / (mean - 2 * weighted), 0.0), 0.5)
        return cls(ordered, float(start), shape, max(mean * (1 - shape), 1e-12))

    def survival(self, x: np.ndarray) -> np.ndarray:
        """P(normal value >= x), in [1e-12, 1], of the shape of ``x``."""
        x = np.asarray(x, dtype=np.float64)
        n = len(self.values)
        p = (1 + n - np.searchsorted(self.values, x, side="left")) / (n + 1)
        at_start = (1 + n - np.searchsorted(self.values, self.start, side="right")) / (n + 1)
        excess = np.maximum(x - self.start, 0.0) / self.scale
        with np.errstate(over="ignore"):
            beyond = np.exp(-excess) if self.shape < 1e-6 else (1 + self.shape * excess) ** (-1 / self.shape)
        return np.clip(np.where(x > self.start, at_start * beyond, p), SMALLEST_P, 1.0)


@dataclass(frozen=True)
class Sides:
    """A channel's p-value: of too large a value, or with ``lower`` of too large or too small a one."""

    upper: Tail
    lower: Tail | None

    @classmethod
    def fit(cls, values: np.ndarray, two_sided: bool) -> Sides:
        """To normal values (n,)."""
        return cls(Tail.fit(values), Tail.fit(-values) if two_sided else None)

    def p_value(self, x: np.ndarray) -> np.ndarray:
        """In [1e-12, 1]."""
        p = self.upper.survival(x)
        if self.lower is None:
            return p
        return np.clip(2 * np.minimum(p, self.lower.survival(-np.asarray(x))), SMALLEST_P, 1.0)


def _mean(p: np.ndarray) -> np.ndarray:
    return 1 - p.mean(-1)


def _fisher(p: np.ndarray) -> np.ndarray:
    return -np.log(p).sum(-1)


def _harmonic(p: np.ndarray) -> np.ndarray:
    return np.log((1 / p).mean(-1))


COMBINATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": _mean,
    "fisher": _fisher,
    "harmonic": _harmonic,
}
"""p-values (..., channels) to one statistic (...), larger the less normal; to be calibrated again, as channels depend."""


def episodes_needed(alpha: float) -> int:
    """Normal episodes without which a false-alarm rate of alpha an episode cannot be promised.

    Raises:
        InputError: alpha outside (0, 1).
    """
    if not 0 < alpha < 1:
        raise InputError(f"alpha is {alpha}, expected a false-alarm rate an episode in (0, 1)")
    return max(LEAST_EPISODES, math.ceil(1 / alpha) - 1)


def episode_threshold(maxima: Sequence[float] | np.ndarray, alpha: float) -> float:
    """Split conformal: a fresh episode's maximum exceeds it with probability at most alpha.

    The ceil((1 - alpha)(n + 1))-th smallest of n exchangeable maxima (Vovk et al.; Lei et al., 2018).
    """
    values = np.sort(np.asarray(maxima, dtype=np.float64))
    return float(values[math.ceil((1 - alpha) * (len(values) + 1)) - 1])
