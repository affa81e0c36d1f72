"""What threads hand to one another: the front sleeps in a poller with its sockets, the worker in `Mailbox.wait`."""

from __future__ import annotations

import contextlib
import logging
import math
import select
import socket
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")

log = logging.getLogger(__name__)


class Mailbox(Generic[T]):
    """Things posted by any thread, for the one thread that takes them.

    A socket pair rings, not a lock: sending releases the interpreter while it wakes the other side, which so goes on
    at once instead of waking to wait for the interpreter.
    """

    def __init__(self) -> None:
        self._things: deque[T] = deque()
        self._rung = False
        self._ours, self._theirs = socket.socketpair()
        self._poll = select.poll()
        self._poll.register(self._ours, select.POLLIN)

    def __len__(self) -> int:
        return len(self._things)

    def fileno(self) -> int:
        """Readable when there may be something to take; for a poller."""
        return self._ours.fileno()

    def post(self, things: Iterable[T]) -> None:
        """Put things in, and wake who sleeps; from any thread."""
        self._things.extend(things)
        if self._things and not self._rung:
            self._rung = True
            with contextlib.suppress(OSError):  # closed: nobody takes anything any more
                self._theirs.send(b"!")

    def take(self) -> list[T]:
        """All that is there; only when it is readable."""
        self._hush()
        return [self._things.popleft() for _ in range(len(self._things))]

    def next(self) -> T:
        """The oldest thing; raises IndexError where there is none."""
        return self._things.popleft()

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep until there is something, ``timeout`` seconds at most (None: for ever); whether there is."""
        while not self._things:
            if timeout is not None and not self._poll.poll(math.ceil(1000 * timeout)):
                return False
            self._hush()
        return True

    def _hush(self) -> None:
        self._ours.recv(64)
        self._rung = False  # before anything is counted: whoever posts from here on rings again

    def close(self) -> None:
        """Close both ends."""
        self._ours.close()
        self._theirs.close()


class Calls(Mailbox[Callable[[], None]]):
    """Calls that one thread is to make for others."""

    def ask(self, call: Callable[[], None]) -> None:
        """Have it make this one; from any thread."""
        self.post((call,))

    def make(self) -> None:
        """Make those that are there; only when it is readable."""
        for call in self.take():
            try:
                call()
            except Exception:  # one reply's bug must not end the thread that serves all
                log.exception("a call into the front failed")
