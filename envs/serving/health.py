"""How the server is, over HTTP on the loopback: /healthz, /readyz, and /metrics in Prometheus' text format."""

from __future__ import annotations

import ctypes
import logging
import math
import os
import sys
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from worldmodel.errors import InputError

log = logging.getLogger(__name__)

RECOVERY = 30.0  # seconds until memory that stays above its limit is worth another try
_STATM = Path("/proc/self/statm")
_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None


def resident_bytes() -> int:
    """Memory of this process, bytes; 0 where the system does not tell."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def trim_memory() -> None:
    """Give memory that was freed back to the system, where the C library keeps it: glibc does.

    Sessions of a megabyte, freed in any order, otherwise leave a heap as large as their number ever made it.
    """
    if _TRIM is not None:
        _TRIM(0)


class MemoryWatch:
    """Says when memory is more than ``limit`` bytes above what it was at first, and something must go.

    Once said, it says so again only where memory has been below meanwhile, or after `RECOVERY` seconds: else what went
    was not the cause.
    """

    def __init__(self, limit: int) -> None:
        self._most = resident_bytes() + limit
        self._next = self._look = -math.inf

    def exceeded(self, now: float) -> bool:
        """Whether something must go now (`time.monotonic`); what was freed is given back first, once a second at most."""
        if resident_bytes() > self._most:
            if now < self._look:
                return False
            self._look = now + 1.0
            trim_memory()
        if resident_bytes() <= self._most:
            self._next = -math.inf
            return False
        due = now >= self._next
        self._next = now + RECOVERY if due else self._next
        return due


class HealthPages:
    """Three pages on ``127.0.0.1``, answered by a thread of their own; ``port`` is where.

    Raises:
        InputError: the port is taken, or none.
    """

    def __init__(
        self,
        port: int,
        alive: Callable[[], bool],
        ready: Callable[[], bool],
        metrics: Callable[[], Mapping[str, float]],
    ) -> None:
        class Handler(BaseHTTPRequestHandler):
            timeout = 5.0

            def do_GET(self) -> None:
                """One of the three pages."""
                if self.path == "/metrics":
                    self._send(200, prometheus(metrics()))
                elif self.path in ("/healthz", "/readyz"):
                    good = alive() if self.path == "/healthz" else ready()
                    self._send(200 if good else 503, "ok\n" if good else "no\n")
                else:
                    self._send(404, "/healthz, /readyz or /metrics\n")

            def _send(self, status: int, text: str) -> None:
                body = text.encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Nothing on standard error."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                """A prober that hung up is nothing to tell."""
                if not isinstance(sys.exception(), OSError):
                    log.exception("a health page failed")

        try:
            self._server = Server(("127.0.0.1", port), Handler)
        except (OSError, OverflowError) as error:
            raise InputError(
                f"cannot serve /healthz on port {port}: {error}; choose another --health"
            ) from error
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="worldmodel-health", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()


def prometheus(numbers: Mapping[str, float]) -> str:
    """Numbers in Prometheus' text format; names that end in ``_total`` are counters."""
    lines = []
    for name, value in numbers.items():
        kind = "counter" if name.endswith("_total") else "gauge"
        lines += [f"# TYPE worldmodel_{name} {kind}", f"worldmodel_{name} {value:.17g}"]
    return "\n".join(lines) + "\n"
