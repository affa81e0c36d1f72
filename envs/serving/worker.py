"""The thread that a model runs in: it takes requests in rounds, and hands them to a backend.

A round is what several clients ask for within a few milliseconds, so that one forward pass serves them all; where
two rounds that take turns serve them faster, half of them (see `envs.serving.pace`).
What takes less time than handing it over does is run where it arrives, see `Worker.at_once`.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from envs.serving.mailbox import Mailbox
from envs.serving.pace import Pace, Round
from envs.serving.protocol import Request, ServingError

MAX_SKIPPED = 64
MAX_REMEMBERED = 4096
PATIENCE = 0.5
HAND_OVER = (
    100e-6  # seconds, at most, that two threads take to hand one another a request and what came of it
)
PROVEN = 16  # times in a row that a kind of request has taken less

_BEGINNING = threading.Lock()

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """A request for the model. made: the names that the front gives to what it makes (sessions or a snapshot).

    expires: `time.monotonic` after which it is not to begin. cancelled, begun: see `cancel` and `begin`.
    """

    request: Request
    made: tuple[bytes, ...] = ()
    expires: float = float("inf")
    cancelled: bool = False
    begun: bool = False

    @property
    def who(self) -> bytes:
        """The session it is for; one that is to make a session is alone."""
        return self.request.session or self.request.id

    def begin(self, now: float) -> ServingError | None:
        """From here on it cannot be cancelled any more; or why it does not begin. For the backend."""
        with _BEGINNING:
            refusal = self.refusal(now)
            self.begun = refusal is None
        return refusal

    def cancel(self) -> bool:
        """Whether it will not be done; from any thread."""
        with _BEGINNING:
            self.cancelled = not self.begun
        return self.cancelled

    def refusal(self, now: float) -> ServingError | None:
        """Why it is not to begin, or go on, if it is not."""
        if self.cancelled:
            return ServingError("cancelled", "cancelled before it was done; nothing has changed")
        if now > self.expires:
            return ServingError("deadline", "it would have begun after its deadline; nothing has changed")
        return None


@dataclass(frozen=True)
class Outcome:
    """What came of a job: the reply's result and arrays (never written to again), and for viewers the new frames
    (n, height, width, 3) uint8 and the action that caused them.
    """

    result: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    frames: np.ndarray | None = None
    action: Any = None


Finished = tuple[Job, Outcome | ServingError]


class Backend(Protocol):
    """Where sessions live. Called by one thread at a time.

    facts: what `hello` says of the world (world, fingerprint, frame_size, chunk_frames, latent_shape, fps, sampling).
    action_space: its JSON. session_bytes: memory that one session may come to hold, with its last request and reply.
    """

    facts: Mapping[str, Any]
    action_space: bytes
    session_bytes: int

    @property
    def going_on(self) -> bool:
        """Whether jobs of earlier rounds are not finished; `run` is then called again at once."""

    def short(self, request: Request) -> bool:
        """Whether a request may be run where it arrives, once its kind has proven to take no longer than a hand-over."""

    def run(self, jobs: Sequence[Job]) -> list[Finished]:
        """One round: jobs of different sessions. Each is done whole or, with an error, not at all; `Job.begin` says
        which are not to begin.
        """


def internal_error(error: BaseException) -> ServingError:
    """What clients hear of a failure of the model; the log says more, under the correlation id."""
    correlation = secrets.token_hex(6)
    log.error("internal error %s", correlation, exc_info=error)
    message = "the model failed; nothing has changed; the server's log says more"
    return ServingError("internal", message, correlation=correlation)


class Worker(threading.Thread):
    """Runs a backend.

    Args:
        report: called in this thread with what is finished.
        window: seconds that a round waits for the next of those whose turn it is: who took part in the last one or, in
            halves, in the one before it. Where they keep coming, a round may wait longer in all, up to `PATIENCE`
            of what the last one took.
        rows: the most jobs of a round.
    """

    def __init__(
        self, backend: Backend, report: Callable[[list[Finished]], None], window: float, rows: int
    ) -> None:
        super().__init__(name="worldmodel-worker", daemon=True)
        self.rounds = 0
        self.jobs = 0
        self.seconds = 0.0
        self._backend = backend
        self._report = report
        self._window = window
        self._rows = rows
        self._mail: Mailbox[Job | None] = Mailbox()
        self._waiting: list[Job] = []
        self._stopping = False
        self._last = 0.0  # seconds of the last round
        self._pace = Pace()
        self._turn: set[bytes] = set()  # sessions that the next round waits for
        self._others: set[bytes] = set()  # in halves: those of the last round, whom it does not wait for
        self._vain: dict[bytes, tuple[int, int]] = {}  # waits in vain in a row, rounds to do without waiting
        self._model = threading.Lock()
        self._quick: Counter[str] = (
            Counter()
        )  # by op: rounds of one, in a row, that took less than `HAND_OVER`

    def submit(self, jobs: Sequence[Job]) -> None:
        """Hand over jobs; from any thread."""
        self._mail.post(jobs)

    def at_once(self, job: Job) -> list[Finished] | None:
        """Run a job in the calling thread, while no other is under way; None where a hand-over is to be preferred:
        it may take longer than one, or the model is in use.
        """
        if self._quick[job.request.op] < PROVEN or not self._model.acquire(blocking=False):
            return None
        try:
            whole = not self._backend.going_on and self._backend.short(job.request)
            return self._run([job]) if whole else None
        finally:
            self._model.release()

    def stop(self) -> None:
        """Finish the round and end."""
        self._mail.post((None,))

    def run(self) -> None:
        """Rounds until `stop`."""
        while True:
            began = time.perf_counter()
            self._gather()
            if self._stopping:
                return
            here = {job.who for job in self._waiting}
            population = len(here | self._others)
            jobs, refused = self._round(
                min(self._rows, -(-population // 2)) if self._pace.halves else self._rows
            )
            steps = {job.who for job in jobs if job.request.op == "step"}
            idle = time.perf_counter() - began
            with self._model:
                finished = self._run(jobs)
            if refused or finished:
                self._report(refused + finished)
            self._turn, self._others = steps, set()
            if self._pace.halves:
                self._turn, self._others = (here | self._others) - {job.who for job in jobs}, steps
            if steps:
                self._pace.took(Round(population, len(jobs), idle, self._last))

    def _run(self, jobs: list[Job]) -> list[Finished]:
        began = time.perf_counter()
        try:
            finished = self._backend.run(jobs)
        except Exception as error:  # a backend's own bug; the thread must live
            failure = internal_error(error)
            finished = [(job, failure) for job in jobs]
        self._last = time.perf_counter() - began
        self.seconds += self._last
        self.rounds += bool(jobs)
        self.jobs += len(jobs)
        if len(jobs) == 1:
            whole = len(finished) == 1 and isinstance(finished[0][1], Outcome)
            op, quick = jobs[0].request.op, self._last < HAND_OVER
            # a refusal says nothing of how long it takes to do it
            self._quick[op] = self._quick[op] + (whole and quick) if quick else 0
        return finished

    def _gather(self) -> None:
        """Wait for a first job, then for the rest of those whose turn it is."""
        if not self._waiting and not self._backend.going_on:
            self._take(None)
        end = time.monotonic() + max(self._window, PATIENCE * self._last)
        missing = self._expected()
        while not self._stopping:
            for session in missing.intersection(job.who for job in self._waiting):
                missing.discard(session)
                self._vain.pop(session, None)
            left = min(self._window, end - time.monotonic())
            if not self._take(max(0.0, left) if missing and len(self._waiting) < self._rows else 0.0):
                break
        for session in missing:
            strikes = self._vain.get(session, (0, 0))[0] + 1
            self._vain[session] = strikes, min(MAX_SKIPPED, 2**strikes)

    def _expected(self) -> set[bytes]:
        """Those worth waiting for: who kept a round waiting in vain is not, for twice as many rounds each time."""
        if len(self._vain) > MAX_REMEMBERED:
            self._vain.clear()
        expected = set()
        for session in self._turn:
            strikes, skip = self._vain.get(session, (0, 0))
            if skip:
                self._vain[session] = strikes, skip - 1
            else:
                expected.add(session)
        return expected

    def _take(self, timeout: float | None) -> bool:
        if not self._mail and (timeout == 0.0 or not self._mail.wait(timeout)):
            return False
        job = self._mail.next()
        if job is None:
            self._stopping = True
        else:
            self._waiting.append(job)
        return True

    def _round(self, rows: int) -> tuple[list[Job], list[Finished]]:
        """The jobs of the next round, one a session, in the order they came, and those not to begin. Those of the other
        half come only where nobody else does.
        """
        self._waiting.sort(key=lambda job: job.who in self._others)
        now = time.monotonic()
        jobs: list[Job] = []
        refused: list[Finished] = []
        later: list[Job] = []
        taken: set[bytes] = set()
        for job in self._waiting:
            session = job.request.session
            full = len(jobs) >= rows or (
                job.who in self._others and bool(jobs) and jobs[0].who not in self._others
            )
            if refusal := job.refusal(now):
                refused.append((job, refusal))
            elif full or (session is not None and session in taken):
                later.append(job)
            else:
                jobs.append(job)
            if session is not None:
                taken.add(session)
        self._waiting = later
        return jobs, refused
