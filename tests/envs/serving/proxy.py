"""A TCP proxy between a client and a server that can lose, hold and cut what flows through it."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from types import TracebackType
from urllib.parse import urlsplit


class Proxy:
    """Forwards ``url`` (tcp://...) byte by byte to ``upstream``; every switch takes effect at once.

    hold_replies: bytes from the server are kept, in order, until it is False again. lose_replies: bytes from the
    server are thrown away; `cut` must follow, since the stream is broken then. refuse: new connections are closed
    as soon as they are made.
    """

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname or "127.0.0.1", parts.port or 0)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.hold_replies = self.lose_replies = self.refuse = False
        self.lost = 0  # bytes of replies thrown away
        self._pairs: dict[socket.socket, tuple[socket.socket, bool]] = {}
        self._broken: set[socket.socket] = set()
        self._held: list[tuple[socket.socket, bytes]] = []
        self._cut = self._stop = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop = True
        self._thread.join()

    def cut(self) -> None:
        """Close every connection that is open now."""
        self._cut = True
        while self._cut and self._thread.is_alive():
            threading.Event().wait(0.002)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector, self._listener:
            self._selector = selector
            selector.register(self._listener, selectors.EVENT_READ)
            while not self._stop:
                for key, _ in selector.select(0.005):
                    if key.fileobj is self._listener:
                        self._accept()
                    elif key.fileobj in self._pairs:
                        self._forward(key.fileobj)  # type: ignore[arg-type]
                if not self.hold_replies:
                    held, self._held = self._held, []
                    for target, data in held:
                        self._send(target, data)
                if self._cut:
                    self._close_all()
                    self._cut = False
            self._close_all()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        if self.refuse:
            client.close()
            return
        try:
            server = socket.create_connection(self._upstream)
        except OSError:
            client.close()
            return
        for one, other, from_server in ((client, server, False), (server, client, True)):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._pairs[one] = other, from_server
            self._selector.register(one, selectors.EVENT_READ)

    def _forward(self, source: socket.socket) -> None:
        target, from_server = self._pairs[source]
        try:
            data = source.recv(1 << 20)
        except OSError:
            data = b""
        if not data:
            self._close(source)
        elif from_server and (self.lose_replies or source in self._broken):
            self._broken.add(source)  # what follows would be spliced into the stream, which no network does
            self.lost += len(data)
        elif from_server and self.hold_replies:
            self._held.append((target, data))
        else:
            self._send(target, data)

    def _send(self, target: socket.socket, data: bytes) -> None:
        with contextlib.suppress(OSError):
            target.sendall(data)

    def _close(self, one: socket.socket) -> None:
        if one in self._pairs:
            other, _ = self._pairs.pop(one)
            self._broken.discard(one)
            self._selector.unregister(one)
            one.close()
            self._close(other)

    def _close_all(self) -> None:
        for one in list(self._pairs):
            self._close(one)
        self._held.clear()
