"""Whether those who step together do so in one round, or in two halves that take turns; by what costs less, measured."""

from __future__ import annotations

from statistics import median
from typing import NamedTuple

LEAST = 4  # sessions of which halves are worth a try
SETTLE, MEASURED = 8, 16  # rounds to pass after a change, and rounds measured then: a window
FIRST, LONGEST = 2, 256  # windows from one trial to the next, which doubles while nothing changes
IDLE = 0.1  # share of time between rounds below which halves have nothing to fill
GAIN = 0.97  # what a request must cost in halves, in parts of what it costs whole


class Round(NamedTuple):
    """A round of ``requests`` out of ``population`` sessions took ``seconds``, after ``idle`` ones without work."""

    population: int
    requests: int
    idle: float
    seconds: float

    @property
    def cost(self) -> float:
        """Seconds a request."""
        return (self.idle + self.seconds) / self.requests


class Pace:
    """One round of all costs the model least, but it stands idle while replies go out and the next requests come in.
    In halves it works on one while the other is under way, as the stages of a pipeline do.

    The way in use is measured by the median cost of a window's rounds, since clients may pause; now and then the
    other one is tried for a window, and the cheaper one stays in use.
    """

    def __init__(self) -> None:
        self.halves = False
        self._home = False  # the way in use, of which a trial is the other
        self._cost = 0.0  # of a request in the way in use
        self._population = 0.0
        self._pause = self._left = FIRST  # windows in all until the next trial, and those left
        self._rounds: list[Round] = []

    def took(self, done: Round) -> None:
        """Count a round."""
        self._rounds.append(done)
        if len(self._rounds) == SETTLE + MEASURED:
            self._decide(self._rounds[SETTLE:])
            self._rounds = []

    def _decide(self, rounds: list[Round]) -> None:
        cost = median(r.cost for r in rounds)
        population = median(r.population for r in rounds)
        if not self._population <= 2 * population <= 4 * self._population:
            self._population = population
            self.halves = self._home = False
            self._pause = self._left = FIRST
        elif self.halves == self._home:
            self._cost = cost
            self._left -= 1
            idle = median(r.idle / (r.idle + r.seconds) for r in rounds) > IDLE
            if self._left <= 0 and population >= LEAST and (self._home or idle):
                self.halves = not self._home
        else:  # this was the trial
            whole, halves = (cost, self._cost) if self._home else (self._cost, cost)
            better = halves < GAIN * whole
            self._pause = min(2 * self._pause, LONGEST) if better == self._home else FIRST
            self._left = self._pause
            self.halves = self._home = better
