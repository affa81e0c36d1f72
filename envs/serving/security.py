"""Keys on disk, and who may connect: CURVE, with a ZAP handler that reads the allowed keys anew when they change.

A key store is a directory (mode 0700): ``NAME.secret`` (JSON, mode 0600) and ``NAME.public`` for each key pair made
here, and ``allowed/NAME.public`` for each client that may connect. Every key is 40 characters of Z85.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq
import zmq.utils.z85 as z85

from worldmodel.errors import InputError

log = logging.getLogger(__name__)

ZAP_ADDRESS = "inproc://zeromq.zap.01"
ZAP_DOMAIN = b"worldmodel"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_KEY = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
MAX_FILE = 4096
REFRESH = 0.1  # seconds for which nobody looks at the allowed keys again


@dataclass(frozen=True)
class KeyPair:
    """A CURVE key pair, Z85 text."""

    public: bytes
    secret: bytes


def check_key(text: str, what: str) -> bytes:
    """A public key as Z85 bytes.

    Raises:
        InputError: not 40 characters of Z85.
    """
    if not _KEY.fullmatch(text):
        raise InputError(f"{what}: expected a key of 40 Z85 characters, got {len(text)} characters")
    return text.encode("ascii")


def read_secret(path: str | Path) -> KeyPair:
    """The key pair in a ``.secret`` file.

    Raises:
        InputError: missing, malformed, or readable by others.
    """
    path = Path(path)
    try:
        if path.stat().st_mode & 0o077:
            raise InputError(f"{path} can be read by others; chmod 600 {path}")
        data = json.loads(_read(path))
        return KeyPair(check_key(data["public"], str(path)), check_key(data["secret"], str(path)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} is no key file ({error!r:.80}); make one with `worldmodel keys new`"
        ) from error


def read_public(path: str | Path) -> bytes:
    """The key in a ``.public`` file; raises as `read_secret`."""
    try:
        return check_key(_read(Path(path)).strip(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no public key ({error!r:.80})") from error


def _read(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise InputError(f"{path} is larger than a key file")
    return data.decode("ascii")


class KeyStore:
    """The keys in a directory, which is made if it is not there."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self._allowed = self.folder / "allowed"
        try:
            for path in (self.folder, self._allowed):
                path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise InputError(f"cannot use {self.folder} for keys: {error}") from error
        self._stamp: tuple[tuple[str, int, int], ...] | None = None
        self._looked = -math.inf
        self._known: dict[bytes, str] = {}
        self._lock = threading.Lock()

    def new(self, name: str) -> KeyPair:
        """Make a key pair: ``NAME.secret`` and ``NAME.public``.

        Raises:
            InputError: a bad name, one that is taken, or a folder that cannot be written.
        """
        path = self.folder / f"{_name(name)}.secret"
        public, secret = zmq.curve_keypair()
        text = json.dumps({"public": public.decode(), "secret": secret.decode()}) + "\n"
        try:
            with open(path, "x", encoding="ascii", opener=_private) as file:
                file.write(text)
        except FileExistsError as error:
            raise InputError(f"{path} exists; choose another name") from error
        except OSError as error:
            raise _unwritable(path, error) from error
        _write(self.folder / f"{name}.public", public)
        return KeyPair(public, secret)

    def server(self) -> KeyPair:
        """The server's own pair, ``server.secret``; made at first use."""
        path = self.folder / "server.secret"
        return read_secret(path) if path.exists() else self.new("server")

    def allow(self, name: str, public: bytes) -> None:
        """Let a client in, from its next connection on; an older key of that name is replaced; raises as `new`."""
        _write(self._allowed / f"{_name(name)}.public", public)
        self._looked = -math.inf

    def revoke(self, name: str) -> None:
        """Shut a client out, from its next request on.

        Raises:
            InputError: no such client, or a folder that cannot be written.
        """
        path = self._allowed / f"{_name(name)}.public"
        try:
            path.unlink()
        except FileNotFoundError as error:
            known = ", ".join(sorted(self.allowed().values())) or "none"
            raise InputError(f"{name} is not allowed anyway (allowed: {known})") from error
        except OSError as error:
            raise _unwritable(path, error) from error
        self._looked = -math.inf

    def allowed(self) -> dict[bytes, str]:
        """Public key (Z85) to name, of all who may connect; files are read again only after a change."""
        with self._lock:
            if time.monotonic() - self._looked < REFRESH:
                return self._known
            self._looked = time.monotonic()
            files = sorted(self._allowed.glob("*.public"))
            stamps = []
            for file in files:
                try:
                    status = file.stat()
                except FileNotFoundError:  # revoked just now
                    continue
                stamps.append((file.name, status.st_mtime_ns, status.st_ino))
            if tuple(stamps) != self._stamp:
                known = {}
                for file in files:
                    try:
                        known[read_public(file)] = file.stem
                    except InputError as error:
                        log.warning("left out: %s", error)
                self._known, self._stamp = known, tuple(stamps)
            return self._known


def _name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise InputError(f"{name!r:.80} is no name for a key; use letters, digits, - and _")
    return name


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _write(path: Path, public: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="ascii", opener=_private) as file:
            file.write(public.decode() + "\n")
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot write {path}: {error.strerror}; expected a folder of your own, see --keys")


def is_loopback(url: str) -> bool:
    """Whether a bind address is reachable from this machine alone."""
    host = url.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class ZapHandler:
    """Answers libzmq's question who may connect (RFC 27), in a thread of its own that is begun again should it die.

    Without an answer every CURVE key would be let in; with a dead handler, none.
    """

    def __init__(self, context: zmq.Context[Any], store: KeyStore) -> None:
        self.denied = 0
        self.restarts = -1
        self._context = context
        self._store = store
        self._allowed: Set[bytes] = frozenset()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self.watch()

    @property
    def alive(self) -> bool:
        """Whether handshakes are answered."""
        return self._thread is not None and self._thread.is_alive()

    def watch(self) -> None:
        """Begin the thread, again if it has died; call it every now and then."""
        if not self.alive and not self._stopping.is_set():
            self.restarts += 1
            ready = threading.Event()
            self._thread = threading.Thread(
                target=self._run, args=(ready,), name="worldmodel-zap", daemon=True
            )
            self._thread.start()
            ready.wait(2.0)

    def revoked(self) -> bool:
        """Whether a key was shut out since the last call; the connections it has are for the caller to end."""
        try:
            before, self._allowed = self._allowed, self._store.allowed().keys()
        except Exception:  # the handshakes tell
            return False
        return bool(before - self._allowed)

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(2.0)

    def _run(self, ready: threading.Event) -> None:
        socket = self._context.socket(zmq.ROUTER)
        socket.linger = 0
        try:
            while True:
                try:
                    socket.bind(ZAP_ADDRESS)
                    break
                except zmq.ZMQError:  # the last one's socket is still closing
                    time.sleep(0.01)
            ready.set()
            while not self._stopping.is_set():
                if socket.poll(200):
                    self._answer(socket)
        finally:
            socket.close(0)

    def _answer(self, socket: zmq.Socket[bytes]) -> None:
        """One question; whatever goes wrong with it is a refusal, never the end of the thread."""
        frames = socket.recv_multipart()
        if len(frames) < 4:
            return
        try:
            user = self._user(frames[2:])
        except Exception:
            log.exception("a handshake could not be checked, so it is refused")
            user = None
        self.denied += user is None
        status = [b"400", b"not allowed", b"", b""] if user is None else [b"200", b"OK", user, b""]
        socket.send_multipart([*frames[:2], b"1.0", frames[3], *status])

    def _user(self, question: list[bytes]) -> bytes | None:
        version, _, domain, _, _, mechanism, *credentials = question
        if (version, domain, mechanism) != (b"1.0", ZAP_DOMAIN, b"CURVE") or len(credentials) != 1:
            return None
        key: bytes = z85.encode(credentials[0])
        return key if key in self._store.allowed() else None
