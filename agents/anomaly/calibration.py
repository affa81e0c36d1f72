"""From channel values to p-values, a drift statistic and alarms, as calibrated on normal episodes. No model in it.

Axis letters: E normal episodes, T chunks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from agents.anomaly.channels import Channel
from agents.anomaly.conformal import (
    COMBINATIONS,
    LEAST_EPISODES,
    Sides,
    Tail,
    episode_threshold,
    episodes_needed,
)
from worldmodel import ConfigError, InputError

FOLDS = 5
"""Parts of the normal episodes; each one's largest statistics come from tables of the others."""


@dataclass(frozen=True)
class MonitorConfig:
    """warmup: first chunks that are not judged, for want of a past. combination: of the channels' p-values
    (`COMBINATIONS`). channels: those combined, () for all. span: chunks that recent evidence is averaged over.
    drift: nats a chunk that the CUSUM forgives; normal evidence averages 1. cap: nats of one chunk that it counts at most.
    actions: they are known; without them a chunk is judged given the past alone.
    """

    warmup: int = 2
    combination: str = "fisher"
    channels: tuple[str, ...] = ()
    span: int = 6
    drift: float = 2.0
    cap: float = 8.0
    actions: bool = True

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be used."""
        if self.combination not in COMBINATIONS:
            raise ConfigError(f"no combination {self.combination!r}; choose from {', '.join(COMBINATIONS)}")
        if self.warmup < 0 or self.span < 1 or not self.drift > 0 or not self.cap > self.drift:
            raise ConfigError(
                f"warmup {self.warmup}, span {self.span}, drift {self.drift}, cap {self.cap}: expected >= 0, >= 1, "
                "> 0, > drift"
            )


class Tracked(NamedTuple):
    """What is remembered of an episode. chunk: how many were seen. evidence: (<= span,) nats of the last ones judged.
    drift: the CUSUM. since: the chunk at which it last left zero, -1 while it is zero.
    """

    chunk: int = 0
    evidence: np.ndarray = np.zeros(0)
    drift: float = 0.0
    since: int = -1


class Verdict(NamedTuple):
    """Of T chunks that follow each other, (T,) each unless said otherwise.

    p_value: the chunk's, from what it shows and what the last ones did. channels: (T, channels) p-values.
    evidence: minus log of the p-value of this chunk alone, nats. drift: the CUSUM of evidence. instant, drifting: the two
    alarms. onset: the chunk at which the anomaly began, by the alarm that rings; -1 where none does.
    """

    p_value: np.ndarray
    channels: np.ndarray
    evidence: np.ndarray
    drift: np.ndarray
    instant: np.ndarray
    drifting: np.ndarray
    onset: np.ndarray


@dataclass(frozen=True)
class Calibration:
    """Tables of normal values, and the limits above which evidence and drift raise an alarm."""

    config: MonitorConfig
    channels: tuple[Channel, ...]
    sides: tuple[Sides, ...]
    instant: Tail
    recent: Tail
    chunk: Tail
    evidence_limit: float = np.inf
    drift_limit: float = np.inf

    @classmethod
    def fit(
        cls, config: MonitorConfig, channels: tuple[Channel, ...], values: list[np.ndarray], alpha: float
    ) -> Calibration:
        """From the values (T, channels) of E normal episodes; alpha: the false-alarm rate an *episode*.

        An episode's largest evidence and drift, by tables of the other folds, are turned into ranks among all episodes;
        the larger rank gets the threshold of split conformal prediction, so that both alarms together ring in about a share
        alpha of episodes. That is no bound: a new episode is judged by tables of all, and ranked among one more.

        Raises:
            InputError: too few episodes for alpha; it says how many are needed.
        """
        cls.check(len(values), alpha)
        if absent := sorted(set(config.channels) - {c.name for c in channels}):
            raise InputError(
                f"no channel {', '.join(absent)}; choose from {', '.join(c.name for c in channels)}"
            )
        if not any(len(v) > config.warmup for v in values):
            raise InputError(
                f"no normal episode has more than {config.warmup} chunks, which are not judged; give longer ones"
            )
        maxima = np.zeros((len(values), 2))
        for fold in range(FOLDS):
            tables = cls._tables(config, channels, [v for i, v in enumerate(values) if i % FOLDS != fold])
            for i in range(fold, len(values), FOLDS):
                _, verdicts = tables.judge(Tracked(), values[i])
                maxima[i] = verdicts.evidence.max(initial=0.0), verdicts.drift.max(initial=0.0)
        order = np.sort(maxima, axis=0)
        rank = np.stack([np.searchsorted(order[:, k], maxima[:, k]) for k in range(2)], axis=1).max(1)
        place = int(episode_threshold(rank, alpha))
        return replace(
            cls._tables(config, channels, values),
            evidence_limit=float(order[place, 0]),
            drift_limit=float(order[place, 1]),
        )

    @staticmethod
    def check(episodes: int, alpha: float) -> None:
        """Raises InputError where so many normal episodes are too few for alpha; it says how many are needed."""
        needed = episodes_needed(alpha)
        if episodes < needed:
            larger = " or ask for a larger alpha" if episodes >= LEAST_EPISODES else ""
            raise InputError(
                f"{episodes} normal episodes, alpha {alpha:g} needs at least {needed}; collect {needed - episodes} "
                f"more{larger}"
            )

    @classmethod
    def _tables(
        cls, config: MonitorConfig, channels: tuple[Channel, ...], values: list[np.ndarray]
    ) -> Calibration:
        judged = [v[config.warmup :] for v in values if len(v) > config.warmup]
        flat = np.concatenate(judged)
        sides = tuple(Sides.fit(flat[:, k], c.two_sided) for k, c in enumerate(channels))
        nothing = Tail.fit(np.zeros(2))
        tables = cls(config, channels, sides, nothing, nothing, nothing)
        tables = replace(tables, instant=Tail.fit(tables._combined(tables._p_values(flat))))
        evidence = [tables._evidence(v) for v in judged]
        averages = [
            np.array([e[max(0, t + 1 - config.span) : t + 1].mean() for t in range(len(e))]) for e in evidence
        ]
        tables = replace(tables, recent=Tail.fit(np.concatenate(averages)))
        both = tables._both(np.concatenate(evidence), np.concatenate(averages))
        return replace(tables, chunk=Tail.fit(both))

    def _p_values(self, values: np.ndarray) -> np.ndarray:
        """(..., channels) from values of that shape."""
        return np.stack([side.p_value(values[..., k]) for k, side in enumerate(self.sides)], axis=-1)

    def _combined(self, p_values: np.ndarray) -> np.ndarray:
        wanted = self.config.channels
        picked = [k for k, c in enumerate(self.channels) if not wanted or c.name in wanted]
        return COMBINATIONS[self.config.combination](p_values[..., picked])

    def _evidence(self, values: np.ndarray) -> np.ndarray:
        return -np.log(self.instant.survival(self._combined(self._p_values(values))))

    def _both(self, evidence: np.ndarray, average: np.ndarray) -> np.ndarray:
        """What this chunk shows and what the recent ones do, as one statistic."""
        p = np.stack((np.exp(-evidence), self.recent.survival(average)), axis=-1)
        return COMBINATIONS["fisher"](p)

    def judge(self, tracked: Tracked, values: np.ndarray) -> tuple[Tracked, Verdict]:
        """The next T chunks of an episode, values (T, channels). During the warm-up every p-value is 1."""
        config, chunks = self.config, tracked.chunk + np.arange(len(values))
        warm = chunks < config.warmup
        p_values = np.where(warm[:, None], 1.0, self._p_values(values))
        evidence = np.where(warm, 0.0, -np.log(self.instant.survival(self._combined(p_values))))
        history = np.concatenate((tracked.evidence, evidence[~warm]))
        known = len(history)
        p = np.ones(len(values))
        ends = known - (~warm).sum() + 1 + np.arange((~warm).sum())
        averages = np.array([history[max(0, end - config.span) : end].mean() for end in ends])
        p[~warm] = self.chunk.survival(self._both(evidence[~warm], averages))
        drift, since = np.zeros(len(values)), np.full(len(values), -1)
        level, left = tracked.drift, tracked.since
        for t, nats in enumerate(evidence):
            level = max(0.0, level + min(float(nats), config.cap) - config.drift)
            left = -1 if level == 0 else (int(chunks[t]) if left < 0 else left)
            drift[t], since[t] = level, left
        instant, drifting = evidence > self.evidence_limit, drift > self.drift_limit
        onset = np.where(drifting, since, np.where(instant, chunks, -1))
        after = Tracked(tracked.chunk + len(values), history[-config.span :], level, left)
        return after, Verdict(p, p_values, evidence, drift, instant, drifting, onset)
