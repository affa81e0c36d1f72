"""What the front knows of sessions: whose they are, how long they live, and which step each of them is at.

No sockets and no model here: time comes in as an argument, refusals go out as `ServingError`.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import msgpack

from envs.serving.protocol import EPOCH_BYTES, ID_BYTES, Reply, Request, ServingError
from envs.serving.worker import Job, Outcome

KEPT_REPLIES = 64
KEPT_BYTES = 32 << 20
KEPT_SECONDS = 120.0
KEPT_TOMBSTONES = 4096
MAX_WAITERS = 16
MAX_READS = 4


@dataclass(frozen=True)
class Limits:
    """What one server gives out.

    lease: seconds a session or snapshot lives without a request that names it. memory: bytes for sessions and
    snapshots together. sessions, snapshots: the most of one key. queue, queue_bytes: requests that wait for the model,
    of all keys together, with the frames that they imagine.
    """

    lease: float = 60.0
    memory: int = 4 << 30
    sessions: int = 1024
    snapshots: int = 256
    queue: int = 1024
    queue_bytes: int = 256 << 20


class Waiter(NamedTuple):
    """Who waits for a reply: the routing id to send it to, and the id of the request it answers."""

    address: bytes
    request: bytes


@dataclass(eq=False)
class Running:
    """A request that the worker has, the bytes that it holds, and all who wait for its one reply."""

    owner: str
    job: Job
    nbytes: int
    waiters: list[Waiter] = field(default_factory=list)

    @cached_property
    def digest(self) -> bytes:
        """See `digest`; taken when it is first needed, since for large requests it costs more than all else."""
        return digest(self.job.request)

    def join(self, waiter: Waiter) -> None:
        """Wait for the same reply; beyond `MAX_WAITERS` the oldest waits no longer."""
        self.waiters = [*self.waiters, waiter][-MAX_WAITERS:]


@dataclass(eq=False)
class Session:
    """A session. expires: when its lease runs out (`time.monotonic`). seq, done, reply: the last step that counts.
    done is its digest, or itself where that would take long.

    at: grows with every change. shown: what viewers see of it. reads: requests under way that change nothing.
    """

    name: bytes
    owner: str
    options: dict[str, object]
    expires: float
    seq: int = 0
    done: bytes | Request = b""
    reply: Reply | None = None
    running: Running | None = None
    at: int = 1
    shown: Outcome | None = None
    reads: int = 0


@dataclass(eq=False)
class Principal:
    """A key: what it has, and its replies that a retry may ask for again (request id -> digest, reply, when).

    snapshots: when the lease of each runs out (`time.monotonic`).
    """

    seen: float
    sessions: int = 0
    snapshots: dict[bytes, float] = field(default_factory=dict)
    replies: OrderedDict[bytes, tuple[bytes, Reply, float]] = field(default_factory=OrderedDict)
    reply_bytes: int = 0
    running: dict[bytes, Running] = field(default_factory=dict)


def digest(request: Request) -> bytes:
    """What a request asks for, whoever asks and when: all of it but id and deadline."""
    shapes = [[name, a.dtype.str, list(a.shape)] for name, a in request.arrays.items()]
    head = [request.op, request.session, request.seq, sorted(request.args.items()), shapes]
    result = hashlib.sha256(msgpack.packb(head))
    for array in request.arrays.values():
        result.update(array.reshape(-1).view("u1").data if array.size else b"")
    return result.digest()


class SessionTable:
    """All sessions and keys of one server. One thread uses it."""

    def __init__(self, limits: Limits, session_bytes: int) -> None:
        self.limits = limits
        self.epoch = secrets.token_bytes(EPOCH_BYTES)
        self.sessions: dict[bytes, Session] = {}
        self.principals: dict[str, Principal] = {}
        self._session_bytes = session_bytes
        self._reserved = 0
        self._tombstones: OrderedDict[bytes, str] = OrderedDict()

    # ---- keys ------------------------------------------------------------------------------------------------
    def principal(self, owner: str, now: float) -> Principal:
        """A key's record, made at its first request."""
        principal = self.principals.setdefault(owner, Principal(now))
        principal.seen = now
        return principal

    # ---- sessions --------------------------------------------------------------------------------------------
    def find(self, name: bytes, owner: str, now: float) -> Session:
        """A session of this key; its lease begins anew.

        Raises:
            ServingError: ``session_lost``, ``expired`` or ``no_session``.
        """
        session = self.sessions.get(name)
        if session is not None and session.owner == owner:
            session.expires = now + self.limits.lease
            return session
        if not name.startswith(self.epoch):
            raise ServingError(
                "session_lost", "a session of a server that is gone; create one (an environment's reset does)"
            )
        if self._tombstones.get(name) == owner:
            raise ServingError(
                "expired",
                f"its lease of {self.limits.lease:g} s ran out; create one (an environment's reset does)",
            )
        raise ServingError(
            "no_session", "no such session of this key; create one (an environment's reset does)"
        )

    def reserve(self, owner: str, count: int, snapshots: bool = False) -> tuple[bytes, ...]:
        """Names and memory for new sessions or snapshots; give them back with `release`, or `add` them.

        Raises:
            ServingError: ``busy``: too many of this key, or no memory left.
        """
        principal = self.principals[owner]
        have, most = principal.sessions, self.limits.sessions
        if snapshots:
            have, most = len(principal.snapshots), self.limits.snapshots
        if have + count > most:
            kind = "snapshots" if snapshots else "sessions"
            raise ServingError("busy", f"{have} {kind} of this key, at most {most}; close some", 1.0)
        if (self._reserved + count) * self._session_bytes > self.limits.memory:
            raise ServingError(
                "busy", f"no memory for more sessions ({self._reserved} are open); close some", 5.0
            )
        self._reserved += count
        principal.sessions += 0 if snapshots else count
        names = tuple(self.epoch + secrets.token_bytes(ID_BYTES) for _ in range(count))
        if snapshots:
            principal.snapshots |= dict.fromkeys(names, math.inf)  # until there is something to lease
        return names

    def release(self, owner: str, names: tuple[bytes, ...], snapshots: bool = False) -> None:
        """What was reserved, or opened, is gone; snapshots may be gone already."""
        principal = self.principals[owner]
        if snapshots:
            self._reserved -= sum(principal.snapshots.pop(name, None) is not None for name in names)
        else:
            self._reserved -= len(names)
            principal.sessions -= len(names)

    def add(self, name: bytes, owner: str, options: dict[str, object], shown: Outcome, now: float) -> Session:
        """A session that was reserved, now open."""
        session = Session(name, owner, options, now + self.limits.lease, shown=shown)
        self.sessions[name] = session
        return session

    def remove(self, session: Session, expired: bool = False) -> None:
        """Close a session."""
        del self.sessions[session.name]
        self.release(session.owner, (session.name,))
        if expired:
            self._tombstones[session.name] = session.owner
            if len(self._tombstones) > KEPT_TOMBSTONES:
                self._tombstones.popitem(last=False)

    def lease_snapshot(self, name: bytes, owner: str, now: float) -> None:
        """The lease of a snapshot of this key begins, or begins anew.

        Raises:
            ServingError: ``no_session``.
        """
        snapshots = self.principals[owner].snapshots
        if name not in snapshots:
            raise ServingError("no_session", "no such snapshot of this key; its lease may have run out")
        snapshots[name] = now + self.limits.lease

    def newest(self, owner: str, count: int) -> list[bytes]:
        """Sessions of a key, newest first."""
        return [s.name for s in reversed(self.sessions.values()) if s.owner == owner][:count]

    def expire(self, now: float) -> Iterator[Session]:
        """Sessions whose lease has run out and that nobody waits for; they are removed."""
        for session in [s for s in self.sessions.values() if s.expires < now]:
            if session.running is None and not session.reads:
                self.remove(session, expired=True)
                yield session

    def expired_snapshots(self, now: float) -> Iterator[bytes]:
        """Snapshots whose lease has run out; they are released, and so are old replies and keys that have nothing."""
        for owner, principal in list(self.principals.items()):
            while principal.replies and next(iter(principal.replies.values()))[2] < now - KEPT_SECONDS:
                _forget_oldest(principal)
            names = tuple(name for name, expires in principal.snapshots.items() if expires < now)
            self.release(owner, names, snapshots=True)
            yield from names
            has = principal.sessions or principal.snapshots or principal.replies or principal.running
            if not has and principal.seen < now - self.limits.lease:
                del self.principals[owner]

    # ---- at most once ----------------------------------------------------------------------------------------
    def step(self, session: Session, request: Request, waiter: Waiter) -> Reply | None:
        """A stored reply; or None: the waiter has joined the one that is running, or it is this session's next.

        Raises:
            ServingError: ``gap``, ``stale`` or ``conflict``.
        """
        seq, running = request.seq or 0, session.running
        if seq > session.seq + 1:
            raise ServingError("gap", f"seq {seq}, but the next one is {session.seq + 1}")
        if seq < session.seq or not seq:
            raise ServingError("stale", f"seq {seq}, but {session.seq} is done")
        if seq == session.seq:
            done = session.done if isinstance(session.done, bytes) else digest(session.done)
            if session.reply is None or done != digest(request):
                raise ServingError("conflict", f"seq {seq} is done, with other content")
            return session.reply
        if running is not None:
            if running.digest != digest(request):
                raise ServingError("conflict", f"seq {seq} is being done, with other content")
            running.join(waiter)
        return None

    def once(self, principal: Principal, request: Request, waiter: Waiter) -> Reply | None:
        """As `step`, for requests that are told apart by their id.

        Raises:
            ServingError: ``conflict``.
        """
        running, stored = principal.running.get(request.id), principal.replies.get(request.id)
        known = running.digest if running is not None else stored[0] if stored is not None else None
        if known is not None and known != digest(request):
            raise ServingError("conflict", "this request id was used with other content")
        if running is not None:
            running.join(waiter)
            return None
        return None if stored is None else stored[1]

    def keep(self, principal: Principal, request: bytes, mark: bytes, reply: Reply, now: float) -> None:
        """Remember a reply for retries of its request."""
        principal.replies[request] = mark, reply, now
        principal.reply_bytes += _nbytes(reply)
        while len(principal.replies) > KEPT_REPLIES or (
            principal.reply_bytes > KEPT_BYTES and len(principal.replies) > 1
        ):
            _forget_oldest(principal)


def _forget_oldest(principal: Principal) -> None:
    _, (_, reply, _) = principal.replies.popitem(last=False)
    principal.reply_bytes -= _nbytes(reply)


def _nbytes(reply: Reply) -> int:
    return sum(array.nbytes for array in reply.arrays.values())
