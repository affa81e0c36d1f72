"""One client socket: requests out, replies in, whatever happens to the wire in between.

The socket is a DEALER, and its monitor tells when a server is there: nothing is sent before, so nothing is queued for
one that is not. (``IMMEDIATE`` would do that too, but it throws away replies that are here and not yet read when the
connection ends, as where a server answers and stops.) A request keeps its id and bytes until its reply is here: after
a reconnection, or where no reply came for `RETRY_AFTER`, the same bytes go out again, and the server runs them at most
once. Replies are matched by request id alone; one that nobody waits for is dropped. The monitor also tells a failed
handshake from a slow server; once one has succeeded, a server that does not shake hands is merely slow, or gone.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq
import zmq.utils.monitor as zmq_monitor

from envs.serving.messages import decode_reply, encode_request
from envs.serving.protocol import MAX_MESSAGE, Reply, Request, ServingError, new_id
from envs.serving.security import read_public, read_secret
from worldmodel.errors import InputError

RETRY_AFTER = 2.0  # seconds without a reply after which a request is sent again
HANDSHAKE = 1.5  # seconds from a TCP connection to the end of its handshake
HIGH_WATER = 8  # requests under way at once; a vector environment opens a connection for so many slots
_SURE = 3  # broken handshakes in a row; a server that is going down may break one, and a cut wire too
_DONTWAIT, _MORE, _POLLIN = int(zmq.DONTWAIT), int(zmq.DONTWAIT | zmq.SNDMORE), int(zmq.POLLIN)
_FULL = 0.005  # seconds until a socket that takes nothing is tried again
_REFUSED = (
    "the handshake failed: a wrong server key, a client key that is not allowed (worldmodel keys allow), no keys for "
    "a server that asks for them, or no world server at all"
)
_HANDSHAKE_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
_HANDSHAKE_FAILED = (
    _HANDSHAKE_REFUSED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL  # the latter also where the wire was cut meanwhile
)
_EVENTS = zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | _HANDSHAKE_FAILED


class Unanswered(ServingError):
    """A failure found on this side: whether the request was run is not known."""


@dataclass(frozen=True)
class ClientKeys:
    """CURVE keys of a client, Z85 text as `zmq.curve_keypair` makes it: the server's public one and its own two."""

    server: bytes
    public: bytes
    secret: bytes


def client_keys(key: str | Path | None, server_key: str | Path | None) -> ClientKeys | None:
    """Keys from the files that `worldmodel keys new` makes: the client's own ``.secret`` and the server's ``.public``.

    Raises:
        InputError: one without the other, or a file that is missing or malformed.
    """
    if key is None and server_key is None:
        return None
    if key is None or server_key is None:
        raise InputError("key (your .secret file) and server_key (the server's .public file) go together")
    pair = read_secret(key)
    return ClientKeys(read_public(server_key), pair.public, pair.secret)


@dataclass
class Call:
    """A request under way. due: when it goes out, or out again (`time.monotonic`); reply: None until it is here."""

    request: Request
    frames: Sequence[Any]
    deadline: float
    due: float = 0.0
    reply: Reply | None = None


class Connection:
    """A connection to a world server.

    Args:
        url: ``tcp://host:port``.
        keys: CURVE keys, or None for a server on the loopback that asks for none.
        timeout: seconds that a request may take, reconnections included.

    One thread uses it at a time; a lock keeps others waiting. Open one connection a thread.

    Raises:
        InputError: a malformed address or timeout.
    """

    def __init__(self, url: str, keys: ClientKeys | None = None, timeout: float = 30.0) -> None:
        if not (isinstance(url, str) and url.startswith("tcp://")):
            raise InputError(f"url is {url!r:.80}, expected tcp://host:port")
        if not (isinstance(timeout, int | float) and timeout > 0 and math.isfinite(timeout)):
            raise InputError(f"timeout is {timeout!r}, expected seconds above 0")
        self.url = url
        self.timeout = float(timeout)
        self.lease = 60.0
        self.serves = b"", ""  # the server's epoch and its world's fingerprint, as `hello` told them
        self.connected = False
        self._lock = threading.RLock()
        self._held: set[bytes] = set()  # sessions in use
        self._snapshots: set[bytes] = set()
        self._released = False
        self._garbage: deque[tuple[str, bytes]] = (
            deque()
        )  # sessions and snapshots that nobody refers to any more
        self._closed = threading.Event()
        self._keeper: threading.Thread | None = None
        self._calls: dict[bytes, Call] = {}
        self._shaking: float | None = None  # since when a TCP connection waits for the end of its handshake
        self._refusals = 0  # failed handshakes since the last good one
        self._met = False  # a handshake has succeeded: the keys are right
        self._renewed = 0.0  # when what is held was last renewed
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._configure(keys)
        self._monitor: zmq.Socket[bytes] = self._socket.get_monitor_socket(_EVENTS)
        self._poller = zmq.Poller()
        self._poller.register(self._monitor, zmq.POLLIN)
        self._poller.register(self._socket, zmq.POLLIN)
        try:
            self._socket.connect(url)
        except zmq.ZMQError as error:
            self.close()
            raise InputError(f"cannot connect to {url}: {error}; expected tcp://host:port") from error

    def _configure(self, keys: ClientKeys | None) -> None:
        s = self._socket
        s.linger, s.maxmsgsize, s.ipv6 = 0, MAX_MESSAGE, "[" in self.url
        # Replies answer this socket's own requests and need no bound; and at one, libzmq may abort, see `Transport`.
        s.sndhwm, s.rcvhwm = 2 * HIGH_WATER, 0
        s.heartbeat_ivl, s.heartbeat_timeout, s.heartbeat_ttl = 1000, 3000, 3000
        s.handshake_ivl, s.reconnect_ivl, s.reconnect_ivl_max = 2000, 50, 1000
        if keys is not None:
            s.curve_serverkey, s.curve_publickey, s.curve_secretkey = keys.server, keys.public, keys.secret

    def close(self) -> None:
        """Close the socket; what is under way is given up. Closing twice is fine."""
        self._closed.set()
        with self._lock:
            self._calls.clear()
            self.connected = False
            if not self._socket.closed:
                self._socket.disable_monitor()
                self._monitor.close(0)
                self._socket.close(0)

    def release(self) -> None:
        """Close the connection unless a session is still held over it; where a snapshot is, as soon as none is."""
        self._released = not self._held
        if self._released and not self._snapshots:
            if self.connected:
                self._sweep()
            self.close()

    # ---- requests -----------------------------------------------------------------------------------------------
    def ask(self, op: str, timeout: float | None = None, **fields: Any) -> Reply:
        """One request and its reply; see `start` and `wait`."""
        with self._lock:
            return self.wait([self.start(op, timeout, **fields)])[0]

    def start(self, op: str, timeout: float | None = None, **fields: Any) -> Call:
        """Put a request on its way, with the fields of `Request`; several may be under way at once.

        Raises:
            ServingError: an array that the protocol does not carry, or ``unsupported``: the connection is closed.
        """
        if self._garbage and op in ("create", "fork", "snapshot"):
            self._sweep()
        allowed = self.timeout if timeout is None else timeout
        request = Request(op, new_id(), deadline=allowed, **fields)
        call = Call(request, encode_request(request), time.monotonic() + allowed)
        with self._lock:
            if self._socket.closed:
                raise ServingError("unsupported", "this connection is closed; open another")
            self._calls[request.id] = call
            self._send(time.monotonic())
        return call

    def settle(self, calls: Sequence[Call]) -> None:
        """Wait until every call has a reply; where none came by its deadline, the reply is an error that says why.

        What is held is renewed meanwhile, since nobody else can use the connection.
        """
        with self._lock:
            renewals: list[Call] = []
            try:
                while waiting := [call for call in calls if call.reply is None]:
                    now = time.monotonic()
                    if self._renewal() <= now:
                        renewals += self._start_renewals()
                    if self._next() <= now:
                        self._send(now)
                    ends = [call.deadline for call in waiting]
                    self._pump(min(self._next(), self._renewal(), *ends) - now)
                    self._give_up(waiting, time.monotonic())
            finally:
                self.forget([*calls, *renewals])

    def forget(self, calls: Sequence[Call]) -> None:
        """Wait for these no longer."""
        with self._lock:
            for call in calls:
                self._calls.pop(call.request.id, None)

    def wait(self, calls: Sequence[Call]) -> list[Reply]:
        """The replies, in the order of the calls.

        Raises:
            ServingError: the first call that failed, once all are settled. ``session_lost``: the server was gone
            until the deadline; ``deadline``: it is there and did not answer; ``unauthorized``: the handshake failed;
            else as the server answered.
        """
        self.settle(calls)
        replies = [call.reply for call in calls if call.reply is not None]
        for reply in replies:
            if reply.error is not None:
                raise reply.error
        return replies

    # ---- leases and garbage -----------------------------------------------------------------------------------------
    def hold(self, session: bytes) -> None:
        """Renew this session's lease in the background from now on, so that its user may think as long as they like."""
        self._held.add(session)
        self._released = False
        self._begin_keeper()

    def hold_snapshot(self, snapshot: bytes) -> None:
        """As `hold`; until `discard`."""
        self._snapshots.add(snapshot)
        self._begin_keeper()

    def _begin_keeper(self) -> None:
        if self._keeper is None:
            self._renewed = time.monotonic()
            keep = (weakref.ref(self), self._closed, self.lease / 4)
            self._keeper = threading.Thread(target=_keep, args=keep, name="worldmodel-lease", daemon=True)
            self._keeper.start()

    def drop(self, session: bytes, close: bool) -> None:
        """No longer renew it; ``close`` it on the server at the next occasion. Safe in a finalizer."""
        self._held.discard(session)
        if close:
            self._garbage.append(("close", session))

    def discard(self, snapshot: bytes) -> None:
        """Discard it on the server at the next occasion. Safe in a finalizer."""
        self._snapshots.discard(snapshot)
        self._garbage.append(("discard", snapshot))

    def renew(self) -> None:
        """Renew the leases of all that is held, and clear away garbage; quiet where the server does not answer."""
        with self._lock, contextlib.suppress(ServingError):
            self.settle(self._start_renewals())
            self._sweep()
            if self._released:
                self.release()

    def _renewal(self) -> float:
        """When what is held is to be renewed next."""
        return self._renewed + self.lease / 4 if self._held or self._snapshots else math.inf

    def _start_renewals(self) -> list[Call]:
        self._renewed = time.monotonic()
        return [
            self.start("renew", 2.0, args={kind: names[i : i + 256]})
            for kind, names in (("sessions", list(self._held)), ("snapshots", list(self._snapshots)))
            for i in range(0, len(names), 256)
        ]

    def _sweep(self) -> None:
        with self._lock:
            while self._garbage:
                calls: list[Call] = []
                while self._garbage and len(calls) < HIGH_WATER:
                    op, handle = self._garbage.popleft()
                    named: dict[str, Any] = (
                        {"session": handle} if op == "close" else {"args": {"snapshot": handle}}
                    )
                    calls.append(self.start(op, 2.0, **named))
                self.settle(calls)

    # ---- the wire -----------------------------------------------------------------------------------------------
    def _send(self, now: float) -> None:
        """Hand over what is due, as long as the server is there and the socket takes it."""
        self._look()
        if not self.connected:
            return
        for call in self._calls.values():
            if call.reply is None and call.due <= now:
                try:
                    for part in call.frames[:-1]:
                        self._socket.send(part, _MORE, copy=False)
                    self._socket.send(call.frames[-1], _DONTWAIT, copy=False)
                except zmq.Again:
                    call.due = now + _FULL
                    return
                call.due = now + RETRY_AFTER

    def _next(self) -> float:
        """When there is something to do even if nothing arrives."""
        if self._refusals >= _SURE:  # known before the wait for it began
            return 0.0
        times = [call.due for call in self._calls.values() if call.reply is None] if self.connected else []
        if self._shaking is not None and not self._met:
            times.append(self._shaking + HANDSHAKE)
        return min(times, default=math.inf)

    def _pump(self, seconds: float) -> None:
        """Wait that long at most, then take in what has arrived."""
        ready = dict(self._poller.poll(max(0, math.ceil(1000 * seconds))))
        if self._socket in ready:
            self._receive()
            for _ in range(len(self._calls) - 1):
                if not self._socket.get(zmq.EVENTS) & _POLLIN:  # type: ignore[operator]
                    break
                self._receive()
        if self._monitor in ready:
            self._look()

    def _receive(self) -> None:
        frames = [self._socket.recv(_DONTWAIT, copy=False)]
        while frames[-1].more:
            frames.append(self._socket.recv(copy=False))
        reply = decode_reply([frame.buffer for frame in frames])
        call = self._calls.get(reply.id)
        if call is None or call.reply is not None:
            return  # nobody waits for it any more, or it is the second copy of an answer
        error = reply.error
        if error is not None and error.code == "busy":
            again = time.monotonic() + (error.retry_after or RETRY_AFTER)
            if again < call.deadline:
                call.due = again
                return
        call.reply = reply

    def _look(self) -> None:
        """Take in what the monitor has to tell."""
        while self._monitor.get(zmq.EVENTS) & _POLLIN:  # type: ignore[operator]
            self._notice(zmq_monitor.recv_monitor_message(self._monitor)["event"])

    def _notice(self, event: int) -> None:
        """Follow the socket's monitor."""
        if event == zmq.EVENT_CONNECTED:
            self._shaking = time.monotonic()
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._shaking, self._refusals, self.connected, self._met = None, 0, True, True
            for call in self._calls.values():
                call.due = 0.0  # what went out over the old connection may be lost
        else:
            if event & _HANDSHAKE_REFUSED:
                self._refusals = _SURE
            elif self._shaking is not None and not self._met:
                self._refusals += 1
            self._shaking, self.connected = None, False

    def _give_up(self, calls: Sequence[Call], now: float) -> None:
        """Answer for a server that refuses the handshake, or that did not answer by a call's deadline."""
        if self._shaking is not None and not self._met and now >= self._shaking + HANDSHAKE:
            self._refusals, self._shaking = _SURE, now
        if self._refusals >= _SURE:
            error = Unanswered("unauthorized", f"{self.url}: {_REFUSED}")
            for call in calls:
                call.reply = call.reply or Reply(call.request.id, error=error)
            return
        for call in calls:
            if call.reply is None and now >= call.deadline:
                call.reply = Reply(call.request.id, error=self._overdue(call))

    def _overdue(self, call: Call) -> ServingError:
        what = f"{call.request.op} was not answered in time by {self.url}"
        if self.connected:
            return Unanswered("deadline", f"{what}; the server is there: allow more than its timeout")
        if call.request.session is None:
            return Unanswered("session_lost", f"no world server answers at {self.url}; start one there")
        return Unanswered("session_lost", f"{what}; the server is gone, and its sessions may be; reset")


def _keep(connection: weakref.ref[Connection], closed: threading.Event, period: float) -> None:
    while not closed.wait(period):
        alive = connection()
        if alive is None:
            return
        alive.renew()
        del alive
