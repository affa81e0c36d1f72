"""Replicas of a world as Ray actors, behind one server's address; needs the extra ``ray``.

`RayBackend` is a backend like any other, so address, keys, leases and at-most-once steps are the front's. Each
session is pinned to a replica. Placement, restarts and health are Ray's. While a session rests, its replica hands out a
copy of it; when the replica dies, a session whose copy is up to date goes on elsewhere, and its client notices
nothing; any other is ``session_lost``. Nothing is ever run again that has been answered.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray.exceptions import RayActorError

from envs.serving.batches import Batch
from envs.serving.messages import decode_request, encode_request
from envs.serving.protocol import OPS, Request, ServingError
from envs.serving.worker import Finished, Job, Outcome
from envs.serving.world_backend import WorldBackend
from envs.snapshot import Snapshot
from worldmodel.errors import InputError, WorldModelError
from worldmodel.world import WorldModel

STARTUP = 120.0  # seconds for all replicas to load the world
POLL = 0.002  # seconds that a round waits for replicas
WINDOW = 0.005  # seconds that a replica waits for those who were in its last batch
REST = 0.25  # seconds after which a session that has changed is copied
LOST = ServingError("session_lost", "the replica that had this session is gone; create one")

Sent = tuple[list[bytes], tuple[bytes, ...]]
"""A job on its way to a replica: its request as message frames, and the names of what it makes."""


class PortableBackend(WorldBackend):
    """A backend whose sessions can be copied out, and in elsewhere."""

    def copy_out(self, name: bytes) -> bytes | None:
        """A session or snapshot as one safetensors file; None if there is none of that name."""
        session = self._sessions.get(name) or self._snapshots.get(name)
        if session is None:
            return None
        with TemporaryDirectory() as folder:
            path = Path(folder) / "session"
            session.snapshot().save(path)
            return path.read_bytes()

    def copy_in(self, name: bytes, data: bytes, create: Request, as_snapshot: bool) -> None:
        """Hold what `copy_out` gave; ``create`` is the request that first made the session, with its options."""
        with TemporaryDirectory() as folder:
            path = Path(folder) / "session"
            path.write_bytes(data)
            saved = Snapshot.load(path, self.world.device)
        session = self._fresh(create)
        session.rng.bit_generator.state = saved.rng
        slot = Batch(saved.state).slots()[0]
        session = replace(session, slot=slot, turn=saved.turn, chunk=saved.chunk)
        (self._snapshots if as_snapshot else self._sessions)[name] = session


class Replica:
    """One replica, in a process of its own. ``boot`` tells one life of it from the next."""

    def __init__(self, world: str) -> None:
        import torch

        torch.set_num_threads(1)
        self._backend = PortableBackend(WorldModel.load(world))
        self._boot = secrets.token_bytes(8)

    def begin(self) -> tuple[bytes, int]:
        """This life's name, and its process."""
        return self._boot, os.getpid()

    def facts(self) -> tuple[dict[str, Any], bytes, int]:
        """What `Backend` has as attributes."""
        return dict(self._backend.facts), self._backend.action_space, self._backend.session_bytes

    def run(self, boot: bytes, jobs: Sequence[Sent]) -> list[dict[str, Any]] | None:
        """The outcomes of jobs, in their order; None if they were meant for an earlier life."""
        if boot != self._boot:
            return None
        asked = [Job(decode_request(frames), made) for frames, made in jobs]
        done = dict(self._backend.run(asked))
        while self._backend.going_on:
            done |= dict(self._backend.run([]))
        return [_pack(done[job]) for job in asked]

    def copy_out(self, boot: bytes, name: bytes) -> bytes | None:
        """See `PortableBackend.copy_out`."""
        return self._backend.copy_out(name) if boot == self._boot else None

    def copy_in(self, name: bytes, data: bytes, create: list[bytes], as_snapshot: bool) -> None:
        """See `PortableBackend.copy_in`."""
        self._backend.copy_in(name, data, decode_request(create), as_snapshot)


def _pack(outcome: Outcome | ServingError) -> dict[str, Any]:
    if isinstance(outcome, ServingError):
        return {"error": (outcome.code, str(outcome), outcome.retry_after, outcome.correlation)}
    return vars(outcome)


def _unpack(packed: dict[str, Any]) -> Outcome | ServingError:
    return ServingError(*packed["error"]) if "error" in packed else Outcome(**packed)


@dataclass(eq=False)
class Seat:
    """A replica's place. boot: its present life, None while it is starting. pinned: how many sessions it has.
    company: those of its last batch, which it waits for until ``hold``.
    """

    actor: Any
    boot: bytes | None = None
    pid: int = 0
    pinned: int = 0
    company: frozenset[bytes] = frozenset()
    hold: float = 0.0


@dataclass(eq=False)
class Pinned:
    """A session or a snapshot: where it is, how often it has changed, and its newest copy with that count."""

    seat: Seat
    create: list[bytes]
    is_snapshot: bool = False
    changes: int = 0
    copy: tuple[int, bytes] | None = None

    @property
    def safe(self) -> bytes | None:
        """The copy, if it is up to date."""
        return self.copy[1] if self.copy is not None and self.copy[0] == self.changes else None


@dataclass(eq=False)
class Flight:
    """What is under way at one life of a replica: jobs, or the copy of a session that has changed so often."""

    seat: Seat
    boot: bytes
    jobs: list[Job] = field(default_factory=list)
    name: bytes = b""
    changes: int = 0


class RayBackend:
    """``replicas`` of a world; see `envs.serving.worker.Backend`.

    Joins the Ray cluster that RAY_ADDRESS names, or starts one on this machine.

    Raises:
        InputError: replicas < 1. WorldModelError: the world cannot be loaded by a replica.
    """

    def __init__(self, world: str, replicas: int) -> None:
        if replicas < 1:
            raise InputError(f"replicas is {replicas}, expected at least 1")
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        kind = ray.remote(Replica).options(num_cpus=1, max_restarts=-1)
        self._seats = [Seat(kind.remote(world)) for _ in range(replicas)]
        try:
            facts, self.action_space, self.session_bytes = ray.get(self._seats[0].actor.facts.remote())
        except ray.exceptions.RayError as error:
            raise WorldModelError(f"a replica cannot serve {world}: {str(error).splitlines()[-1]}") from error
        self.facts: Mapping[str, Any] = facts
        self._pinned: dict[bytes, Pinned] = {}
        self._waiting: deque[Job] = deque()  # until their replica is there and free
        self._resting: dict[bytes, float] = {}  # when those without a copy changed, oldest first
        self._batches: dict[Any, Flight] = {}
        self._copies: dict[Any, Flight] = {}
        self._starting: dict[Any, Seat] = {}
        for seat in self._seats:
            self._start(seat)
        ready, late = ray.wait(list(self._starting), num_returns=replicas, timeout=STARTUP)
        if late:
            self.close()
            raise WorldModelError(
                f"{len(late)} of {replicas} replicas did not start: each needs a processor of its own"
            )
        for ref in ready:
            self._started(ref)

    @property
    def going_on(self) -> bool:
        """Whether replicas have something under way or are starting, or sessions are to be copied."""
        return bool(self._waiting or self._batches or self._copies or self._resting or self._starting)

    def short(self, request: Request) -> bool:
        """Nothing is: all is done elsewhere."""
        return False

    @property
    def pids(self) -> list[int]:
        """The processes of the replicas that are there, as far as is known."""
        return [seat.pid for seat in self._seats if seat.boot is not None]

    @property
    def shares(self) -> list[int]:
        """How many sessions and snapshots each replica has."""
        return [seat.pinned for seat in self._seats]

    def close(self) -> None:
        """End the replicas."""
        for seat in self._seats:
            ray.kill(seat.actor)

    def run(self, jobs: Sequence[Job]) -> list[Finished]:
        """Send jobs to where their sessions are, and take in what has come back meanwhile."""
        finished: list[Finished] = []
        self._waiting.extend(jobs)
        self._dispatch(finished)
        self._copy_resting()
        refs = [*self._batches, *self._starting, *self._copies]
        if refs:
            for ref in ray.wait(refs, num_returns=1, timeout=POLL)[0]:
                self._arrived(ref, finished)
        else:
            time.sleep(POLL / 4)
        return finished

    # ---- out ------------------------------------------------------------------------------------------------------
    def _dispatch(self, finished: list[Finished]) -> None:
        """One batch for each replica that has none under way."""
        now = time.monotonic()
        busy = {flight.seat for flight in self._batches.values()}
        flights: dict[Seat, Flight] = {}
        later: list[Job] = []
        taken: set[bytes] = set()
        for job in self._waiting:
            name = _subject(job.request)
            place = job.refusal(now) or self._place(job.request)
            if isinstance(place, ServingError):
                finished.append((job, place))
            elif place is None or place.boot is None or place in busy or name in taken:
                later.append(job)
            else:
                flights.setdefault(place, Flight(place, place.boot)).jobs.append(job)
            taken |= {name} - {b""}
        for seat, flight in list(flights.items()):
            if now < seat.hold and not seat.company <= {_subject(job.request) for job in flight.jobs}:
                later += flights.pop(seat).jobs
        self._waiting = deque(sorted(later, key=list(self._waiting).index))
        for seat, flight in flights.items():
            refused = [(job, refusal) for job in flight.jobs if (refusal := job.begin(now))]
            finished += refused
            flight.jobs = [job for job in flight.jobs if job.begun]
            if not flight.jobs:
                continue
            seat.pinned += sum(len(job.made) for job in flight.jobs)
            sent = [(_bytes(job.request), job.made) for job in flight.jobs]
            self._batches[seat.actor.run.remote(flight.boot, sent)] = flight

    def _place(self, request: Request) -> Seat | ServingError | None:
        """Where a request belongs: at its session, or for a new one where there are fewest; None: nowhere yet."""
        snapshot = request.args.get("snapshot")
        if request.op == "create" and snapshot is None:
            up = [seat for seat in self._seats if seat.boot is not None]
            return min(up, key=lambda seat: seat.pinned, default=None)
        pinned = self._pinned.get(request.session or snapshot or b"")
        kept = pinned if snapshot is None else self._pinned.get(snapshot)
        if pinned is None or kept is None:
            return LOST
        if kept.seat is not pinned.seat:
            if kept.safe is None:
                return None  # its copy is on its way
            self._move(snapshot or b"", kept, pinned.seat)
        return pinned.seat

    # ---- back -----------------------------------------------------------------------------------------------------
    def _arrived(self, ref: Any, finished: list[Finished]) -> None:
        if ref in self._starting:
            self._started(ref)
            return
        flight = self._copies.pop(ref) if ref in self._copies else self._batches.pop(ref)
        try:
            back = ray.get(ref)
        except RayActorError:
            back = None
        if back is None and flight.name in self._pinned:
            self._resting.setdefault(flight.name, time.monotonic())
        if back is None:
            self._died(flight)
            self._waiting.extendleft(reversed(flight.jobs))  # not one of them was answered
        elif flight.jobs:
            self._answered(flight, back, finished)
        elif flight.name in self._pinned:
            self._pinned[flight.name].copy = flight.changes, back

    def _answered(self, flight: Flight, back: list[dict[str, Any]], finished: list[Finished]) -> None:
        flight.seat.company = frozenset(_subject(job.request) for job in flight.jobs) - {b""}
        flight.seat.hold = time.monotonic() + WINDOW
        for job, packed in zip(flight.jobs, back, strict=True):
            outcome = _unpack(packed)
            self._keep_books(job, outcome, flight.seat)
            finished.append((job, outcome))

    def _keep_books(self, job: Job, outcome: Outcome | ServingError, seat: Seat) -> None:
        """What a job that was answered has made, changed or ended."""
        request, op = job.request, OPS[job.request.op]
        if isinstance(outcome, ServingError):
            seat.pinned -= len(job.made)
            return
        parent = self._pinned.get(request.session or b"")
        create = _bytes(request._replace(arrays={})) if parent is None else parent.create
        for name in job.made:
            self._pinned[name] = Pinned(seat, create, request.op == "snapshot")
        changed = [*job.made]
        if op.seq and parent is not None:
            parent.changes += 1
            changed.append(request.session or b"")
        for name in changed:
            self._resting.pop(name, None)
            self._resting[name] = time.monotonic()
        if request.op in ("close", "discard"):
            self._forget(_subject(request))

    def _forget(self, name: bytes) -> None:
        pinned = self._pinned.pop(name, None)
        self._resting.pop(name, None)
        if pinned is not None:
            pinned.seat.pinned -= 1

    # ---- copies -----------------------------------------------------------------------------------------------------
    def _copy_resting(self) -> None:
        """Ask for copies of sessions that have changed and rest now."""
        before = time.monotonic() - REST
        for name, changed in list(self._resting.items()):
            pinned = self._pinned[name]
            if changed > before:
                return
            if pinned.seat.boot is not None:
                del self._resting[name]
                ref = pinned.seat.actor.copy_out.remote(pinned.seat.boot, name)
                self._copies[ref] = Flight(pinned.seat, pinned.seat.boot, [], name, pinned.changes)

    def _move(self, name: bytes, pinned: Pinned, seat: Seat) -> None:
        """Have another replica hold what there is a copy of; calls that follow find it there."""
        seat.actor.copy_in.remote(name, pinned.safe, pinned.create, pinned.is_snapshot)
        pinned.seat.pinned -= 1
        seat.pinned += 1
        pinned.seat = seat

    # ---- death and birth ----------------------------------------------------------------------------------------------
    def _start(self, seat: Seat) -> None:
        seat.boot = None
        self._starting[seat.actor.begin.remote()] = seat

    def _started(self, ref: Any) -> None:
        seat = self._starting.pop(ref)
        try:
            seat.boot, seat.pid = ray.get(ref)
        except RayActorError:
            self._start(seat)
            return
        for name, pinned in self._pinned.items():
            if pinned.seat is seat:
                self._move(name, pinned, seat)

    def _died(self, flight: Flight) -> None:
        """A replica is gone with all it held. What has an up-to-date copy goes on elsewhere, or there when it is back."""
        seat = flight.seat
        if seat.boot != flight.boot:
            return
        self._start(seat)
        up = [other for other in self._seats if other.boot is not None]
        for name, pinned in list(self._pinned.items()):
            if pinned.seat is not seat:
                continue
            if pinned.safe is None:
                self._forget(name)
            elif up:
                self._move(name, pinned, min(up, key=lambda other: other.pinned))


def _subject(request: Request) -> bytes:
    """The session, or else the snapshot, that a request is about."""
    return request.session or request.args.get("snapshot", b"")


def _bytes(request: Request) -> list[bytes]:
    return [bytes(frame) for frame in encode_request(request)]
