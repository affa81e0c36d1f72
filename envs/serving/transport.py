"""The server's ROUTER socket: bounded, never blocking, never dropping in silence."""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import zmq

from envs.serving.protocol import MAX_BLOBS, MAX_MESSAGE
from envs.serving.security import ZAP_DOMAIN, KeyPair
from worldmodel.errors import InputError

MAX_PARTS = 2 + MAX_BLOBS
BACKLOG_BYTES = 4 * MAX_MESSAGE  # of one peer
ALL_BACKLOG_BYTES = 256 << 20
BACKLOG_MESSAGES = 1024
BACKLOG_SECONDS = 30.0
_DONTWAIT = int(zmq.DONTWAIT)  # plain integers: the operators of pyzmq's flags cost as much as a system call
_MORE = int(zmq.DONTWAIT | zmq.SNDMORE)
_POLLIN = int(zmq.POLLIN)


class Message(NamedTuple):
    """What arrived. owner: the peer's key, "" without CURVE. parts: its message frames; None: more than a message of
    the protocol may have, and thrown away.
    """

    address: bytes
    owner: str
    parts: list[Any] | None


@dataclass(eq=False)
class Backlog:
    """Replies that a peer has not taken yet."""

    since: float
    messages: deque[list[Any]] = field(default_factory=deque)
    nbytes: int = 0


def bound(
    socket: zmq.Socket[bytes], url: str, keys: KeyPair | None, patience: float = 0.0
) -> zmq.Socket[bytes]:
    """The socket, bound for the keys that are allowed (None: for everybody); a taken address is tried ``patience`` seconds.

    Raises:
        InputError: the address cannot be bound; the socket is closed then.
    """
    if keys is not None:
        socket.curve_server, socket.zap_domain = True, ZAP_DOMAIN
        socket.zap_enforce_domain = True  # else a dead handler would let every key in
        socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
    socket.ipv6 = "[" in url  # not always: libzmq would write IPv4 addresses as IPv6 ones
    end = time.monotonic() + patience
    port = url.rpartition(":")[2]
    try:
        if port.isdigit() and int(port) > 65535:  # libzmq would take it modulo 65536
            raise InputError(f"cannot bind {url}: expected a port up to 65535")
        while True:
            try:
                socket.bind(url)
                return socket
            except zmq.ZMQError as error:
                if time.monotonic() > end:
                    raise InputError(
                        f"cannot bind {url}: {error}; expected tcp://address:port, free"
                    ) from error
                time.sleep(0.01)
    except BaseException:
        socket.close(0)
        raise


class Transport:
    """A bound ROUTER. ``counts``: messages received, sent, dropped (``unreachable``, ``backlog``), rebound.

    No high-water mark bounds what arrives: a socket of libzmq 4.3.5 that has stopped reading a peer at its mark aborts
    the process at the next heartbeat, its own or the peer's, once that peer has reset the connection. What piles up
    is bounded by the server's look at its memory (see `rebind`). Peers are read in turn, so a flood delays nobody.

    Raises:
        InputError: the address cannot be bound.
    """

    def __init__(self, context: zmq.Context[Any], url: str, keys: KeyPair | None) -> None:
        self.counts: Counter[str] = Counter()
        self._context = context
        self._keys = keys
        self._backlogs: dict[bytes, Backlog] = {}
        self.socket = self._bound(url, 0.0)
        self.url = bytes(self.socket.last_endpoint).decode()  # type: ignore[arg-type]

    def _bound(self, url: str, patience: float) -> zmq.Socket[bytes]:
        s = self._context.socket(zmq.ROUTER)
        s.linger, s.maxmsgsize, s.router_mandatory = 0, MAX_MESSAGE, 1
        s.sndhwm, s.rcvhwm = 8, 0
        s.handshake_ivl, s.heartbeat_ivl, s.heartbeat_timeout, s.heartbeat_ttl = 2000, 1000, 3000, 3000
        return bound(s, url, self._keys, patience)

    def rebind(self) -> None:
        """Drop every connection and all that has piled up in them; clients come back by themselves.

        The one way to be rid of a multipart message that never ends: libzmq keeps its parts, and no option
        bounds how many.
        """
        self.socket.close(0)
        self._backlogs.clear()
        self.counts["rebound"] += 1
        self.socket = self._bound(self.url, 5.0)

    def receive(self) -> Message | None:
        """The next message, or None. Parts beyond what the protocol allows are thrown away as they come."""
        receive = self.socket.recv
        if not self.socket.get(zmq.EVENTS) & _POLLIN:  # type: ignore[operator]
            return None
        frame = receive(_DONTWAIT, copy=False)
        address, owner = frame.bytes, ""
        parts: list[Any] = []
        count = size = 0
        while frame.more:
            frame = receive(copy=False)
            buffer = frame.buffer
            count, size = count + 1, size + len(buffer)
            if count == 1 and self._keys is not None:
                with contextlib.suppress(zmq.ZMQError):  # none: nobody's, which is refused
                    owner = str(frame.get("User-Id"))
            if count > MAX_PARTS or size > 2 * MAX_MESSAGE:
                parts.clear()
            else:
                parts.append(buffer)
        self.counts["received"] += 1
        whole = count <= MAX_PARTS and size <= 2 * MAX_MESSAGE
        return Message(address, owner, parts if whole else None)

    def send(self, address: bytes, parts: Sequence[Any]) -> None:
        """Send, or keep for a peer that is slow; what a peer that is gone would get is counted and dropped."""
        backlog = self._backlogs.get(address)
        if backlog is None and self._sent(address, parts):
            return
        size = sum(len(part) for part in parts)
        backlog = backlog or self._backlogs.setdefault(address, Backlog(time.monotonic()))
        total = sum(b.nbytes for b in self._backlogs.values())
        full = backlog.nbytes + size > BACKLOG_BYTES or total + size > ALL_BACKLOG_BYTES
        if full or len(backlog.messages) >= BACKLOG_MESSAGES:
            self.counts["dropped"] += 1
            return
        backlog.messages.append(list(parts))
        backlog.nbytes += size

    def flush(self) -> bool:
        """Try what is kept again; whether anything still is."""
        for address, backlog in list(self._backlogs.items()):
            while backlog.messages and self._sent(address, backlog.messages[0]):
                backlog.nbytes -= sum(len(part) for part in backlog.messages.popleft())
                backlog.since = time.monotonic()
            if backlog.messages and time.monotonic() - backlog.since > BACKLOG_SECONDS:
                self.counts["dropped"] += len(backlog.messages)
                backlog.messages.clear()
            if not backlog.messages:
                del self._backlogs[address]
        return bool(self._backlogs)

    def _sent(self, address: bytes, parts: Sequence[Any]) -> bool:
        """Whether it is on its way, or nowhere to go."""
        send = self.socket.send
        try:
            send(address, _MORE)
            for part in parts[:-1]:
                send(part, _MORE, copy=False)
            send(parts[-1], _DONTWAIT, copy=False)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self.counts["unreachable"] += 1
            return True
        self.counts["sent"] += 1
        return True

    def close(self, linger: float) -> None:
        """Close, giving what is on its way up to ``linger`` seconds."""
        self.socket.close(int(1000 * linger))
