"""Halves are used where they cost less per request, and then the same sessions stay together."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from envs.serving.pace import LONGEST, MEASURED, SETTLE, Pace, Round
from envs.serving.protocol import Request, new_id
from envs.serving.worker import Finished, Job, Outcome, Worker

WINDOW = SETTLE + MEASURED


def simulated(pace: Pace, rounds: int, sessions: int, fixed: float, each: float, turnaround: float) -> int:
    """Rounds in halves out of so many, where a round of n takes ``fixed + n * each`` and its sessions come back after
    ``n * turnaround``, half of which runs beside the other half's round.
    """
    halves = 0
    for _ in range(rounds):
        halves += pace.halves
        n = -(-sessions // 2) if pace.halves else sessions
        seconds = fixed + n * each
        pace.took(Round(sessions, n, max(1e-9, n * turnaround - seconds * pace.halves), seconds))
    return halves


def test_halves_are_found_where_the_model_would_wait() -> None:
    pace = Pace()
    simulated(pace, 20 * WINDOW, 16, fixed=2.4, each=0.84, turnaround=0.6)
    assert simulated(pace, 500 * WINDOW, 16, fixed=2.4, each=0.84, turnaround=0.6) > 0.98 * 500 * WINDOW


@pytest.mark.parametrize(
    "facts",
    [
        {"sessions": 16, "fixed": 1000.0, "each": 10.0, "turnaround": 0.6},  # a large model: nothing to fill
        {"sessions": 3, "fixed": 0.1, "each": 1.0, "turnaround": 1.0},  # too few
        {"sessions": 1, "fixed": 0.0, "each": 1.0, "turnaround": 50.0},
    ],
)
def test_halves_are_not_tried_in_vain(facts: dict[str, Any]) -> None:
    assert simulated(Pace(), 300 * WINDOW, **facts) == 0


def test_trials_that_fail_become_rare() -> None:
    pace, facts = Pace(), {"sessions": 4, "fixed": 3.0, "each": 0.8, "turnaround": 0.6}
    assert simulated(pace, 20 * WINDOW, **facts) >= WINDOW
    simulated(pace, LONGEST * WINDOW, **facts)
    assert simulated(pace, 4 * LONGEST * WINDOW, **facts) <= 4 * WINDOW


def test_what_has_changed_is_found() -> None:
    pace, cheap = Pace(), {"fixed": 2.4, "each": 0.84, "turnaround": 0.6}
    assert simulated(pace, 20 * WINDOW, 16, **cheap) > 10 * WINDOW
    simulated(pace, WINDOW, 4, **cheap)  # most have left
    assert not pace.halves
    assert simulated(pace, 20 * WINDOW, 16, **cheap) > 10 * WINDOW
    simulated(pace, 4 * LONGEST * WINDOW, 16, fixed=40.0, each=0.84, turnaround=0.6)
    assert simulated(pace, WINDOW, 16, fixed=40.0, each=0.84, turnaround=0.6) == 0


class Eager:
    """A backend and its clients: whoever has an answer asks for the next step at once, ``rounds`` rounds long."""

    facts: dict[str, Any] = {}
    action_space = b"{}"
    session_bytes = 1
    going_on = False

    def __init__(self, halves: bool) -> None:
        self.rounds: list[set[bytes]] = []
        self.over = threading.Event()
        self.gone: set[bytes] = set()
        self.worker = Worker(self, self.answer, window=0.005, rows=64)
        self.worker._pace.halves = halves
        self.worker._pace.took = lambda done: None  # type: ignore[method-assign]

    def short(self, request: Request) -> bool:
        return True

    def run(self, jobs: Sequence[Job]) -> list[Finished]:
        self.rounds.append({job.who for job in jobs})
        return [(job, Outcome()) for job in jobs]

    def answer(self, finished: list[Finished]) -> None:
        if len(self.rounds) > 40:
            self.over.set()
        else:
            self.ask([job.who for job, _ in finished if job.who not in self.gone])

    def ask(self, sessions: Sequence[bytes]) -> None:
        self.worker.submit([Job(Request("step", new_id(), who, 1)) for who in sessions])

    def play(self, sessions: Sequence[bytes]) -> None:
        self.ask(sessions)
        self.worker.start()
        assert self.over.wait(60.0)
        self.worker.stop()
        self.worker.join(60.0)


def test_in_halves_the_same_sessions_stay_together() -> None:
    sessions = [bytes([k]) * 24 for k in range(9)]
    eager = Eager(halves=True)
    eager.play(sessions)
    ours, theirs = eager.rounds[-2:]
    assert {len(ours), len(theirs)} == {4, 5} and ours | theirs == set(sessions)
    assert all(done == (theirs if k % 2 else ours) for k, done in enumerate(eager.rounds[-20:]))


def test_whole_everybody_is_in_each_round() -> None:
    sessions = [bytes([k]) * 24 for k in range(9)]
    eager = Eager(halves=False)
    eager.play(sessions)
    assert all(done == set(sessions) for done in eager.rounds)


def test_halves_go_on_without_who_has_left() -> None:
    sessions = [bytes([k]) * 24 for k in range(8)]
    eager = Eager(halves=True)
    eager.gone = set(sessions[:3])
    eager.play(sessions)
    assert sorted(map(len, eager.rounds[-2:])) == [2, 3]
    assert set.union(*eager.rounds[-2:]) == set(sessions[3:])
