"""Keys on disk, and a server that lets in whom it should and nobody else, whatever happens to its handler."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq
import zmq.utils.monitor
from typer.testing import CliRunner

from benchmarks.null_world import NullBackend
from envs.serving import security
from envs.serving.connection import ClientKeys, Connection
from envs.serving.health import HealthPages
from envs.serving.security import (
    KeyPair,
    KeyStore,
    ZapHandler,
    check_key,
    is_loopback,
    read_public,
    read_secret,
)
from envs.serving.server import WorldServer
from tests.envs.serving.wire import STILL, Wire
from worldmodel.cli import app
from worldmodel.errors import InputError


# ---- files ----------------------------------------------------------------------------------------------------
def test_a_store_keeps_keys_to_its_owner(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys")
    pair = store.new("alice")
    assert read_secret(store.folder / "alice.secret") == pair
    assert read_public(store.folder / "alice.public") == pair.public
    store.allow("alice", pair.public)
    files = [f for f in store.folder.rglob("*") if f.is_file()]
    assert len(files) == 3
    assert {f.stat().st_mode & 0o777 for f in files} == {0o600}
    assert {f.stat().st_mode & 0o777 for f in (store.folder, store.folder / "allowed")} == {0o700}


def test_a_pair_is_made_once(tmp_path: Path) -> None:
    store = KeyStore(tmp_path)
    first = store.new("alice")
    with pytest.raises(InputError, match="exists"):
        store.new("alice")
    assert read_secret(tmp_path / "alice.secret") == first
    assert store.server() == KeyStore(tmp_path).server()


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", ".hidden", "a b", "x" * 65, "a\n"])
def test_names_cannot_lead_elsewhere(tmp_path: Path, name: str) -> None:
    store = KeyStore(tmp_path)
    for call in (store.new, store.revoke, lambda n: store.allow(n, b"x" * 40)):
        with pytest.raises(InputError):
            call(name)


def test_secrets_that_others_can_read_are_refused(tmp_path: Path) -> None:
    store = KeyStore(tmp_path)
    store.new("alice")
    (tmp_path / "alice.secret").chmod(0o640)
    with pytest.raises(InputError, match="chmod 600"):
        read_secret(tmp_path / "alice.secret")


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"public": 1, "secret": 2}', "\xff", "x" * 5000])
def test_damaged_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.secret"
    path.write_bytes(text.encode("latin-1"))
    path.chmod(0o600)
    for read in (read_secret, read_public):
        with pytest.raises(InputError) as caught:
            read(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError):
        read_secret(tmp_path / "missing.secret")
    with pytest.raises(InputError):
        check_key("x" * 39, "key")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    store = KeyStore(tmp_path)
    store.allow("alice", store.new("alice").public)
    monkeypatch.setattr(security, "_private", denied)
    monkeypatch.setattr(Path, "unlink", denied)
    for call in (store.new, store.revoke, lambda name: store.allow(name, b"x" * 40)):
        with pytest.raises(InputError, match=r"^cannot write .*: Permission denied; .*$"):
            call("alice" if call == store.revoke else "bob")


def test_a_damaged_allowed_file_shuts_out_nobody_else(tmp_path: Path) -> None:
    store = KeyStore(tmp_path)
    pair = store.new("alice")
    store.allow("alice", pair.public)
    (tmp_path / "allowed" / "bad.public").write_text("not a key")
    assert KeyStore(tmp_path).allowed() == {pair.public: "alice"}


def test_allow_and_revoke_are_seen_by_another_process(tmp_path: Path) -> None:
    mine, theirs = KeyStore(tmp_path), KeyStore(tmp_path)
    pair = theirs.new("alice")
    assert mine.allowed() == {}
    theirs.allow("alice", pair.public)
    assert _soon(lambda: mine.allowed() == {pair.public: "alice"})
    theirs.revoke("alice")
    assert _soon(lambda: mine.allowed() == {})
    with pytest.raises(InputError, match="not allowed"):
        theirs.revoke("alice")


def test_the_command_line(tmp_path: Path) -> None:
    def run(*words: str) -> str:
        return (
            CliRunner().invoke(app, ["keys", *words, "--keys", str(tmp_path)], catch_exceptions=False).stdout
        )

    public = run("new", "alice").strip()
    assert read_secret(tmp_path / "alice.secret").public.decode() == public
    run("allow", "alice")
    run("allow", "bob", str(tmp_path / "alice.public"))
    assert run("list").split() == ["bob", public]  # one key, its last name
    run("revoke", "bob")
    assert run("list").split() == ["alice", public]


# ---- addresses --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("tcp://127.0.0.1:5555", True),
        ("tcp://127.8.9.1:1", True),
        ("tcp://localhost:1", True),
        ("tcp://[::1]:1", True),
        ("tcp://0.0.0.0:1", False),
        ("tcp://*:1", False),
        ("tcp://192.168.1.2:1", False),
        ("tcp://127.0.0.1.example.org:1", False),
        ("tcp://[::]:1", False),
        ("ipc:///run/x", False),
        ("tcp://eth0:1", False),
    ],
)
def test_what_is_loopback(url: str, expected: bool) -> None:
    assert is_loopback(url) is expected


def test_beyond_the_loopback_only_with_keys(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="keys"):
        WorldServer(NullBackend(), "tcp://0.0.0.0:*")
    with WorldServer(NullBackend(), "tcp://0.0.0.0:*", keys=KeyStore(tmp_path)) as server:
        assert server.ready()


def test_an_address_of_ipv6(tmp_path: Path) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    store = KeyStore(tmp_path)
    pair = store.new("alice")
    store.allow("alice", pair.public)
    for url, keys in (("tcp://[::1]:*", None), ("tcp://[::]:*", store)):
        with WorldServer(NullBackend(), url, keys=keys) as server:
            assert server.url.startswith(url[:-1])
            port, public = server.url.rpartition(":")[2], server.public_key
            curve = None if public is None else ClientKeys(public, pair.public, pair.secret)
            connection = Connection(f"tcp://[::1]:{port}", curve)
            session = connection.ask("create").result["session"]
            assert connection.ask("broadcast", session=session).result["port"]
            server._inbox.ask(server.transport.rebind)
            assert connection.ask("hello").result["protocol"] == 1
            connection.close()


def test_a_taken_address_is_one_line() -> None:
    with (
        WorldServer(NullBackend(), "tcp://127.0.0.1:*") as server,
        pytest.raises(InputError, match="cannot bind"),
    ):
        WorldServer(NullBackend(), server.url)
    for wrong in ("tcp://127.0.0.1:http", "127.0.0.1:5555", "foo", "tcp://127.0.0.1"):
        with pytest.raises(InputError, match="expected tcp://address:port"):
            WorldServer(NullBackend(), wrong)
    with pytest.raises(InputError, match="up to 65535"):
        WorldServer(NullBackend(), "tcp://127.0.0.1:99999")


@pytest.mark.parametrize("with_keys", [False, True])
def test_a_server_that_cannot_be_made_holds_nothing(tmp_path: Path, with_keys: bool) -> None:
    """Not for the garbage collector, which would wait for its open sockets without end."""
    keys = KeyStore(tmp_path) if with_keys else None
    with WorldServer(NullBackend(), "tcp://127.0.0.1:*", health=0) as server:
        assert server.health is not None
        taken = server.health.port
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        threads = set(threading.enumerate())
        with pytest.raises(InputError, match="choose another --health") as refused:
            WorldServer(NullBackend(), url, keys=keys, health=taken)
        assert set(threading.enumerate()) == threads
        with WorldServer(
            NullBackend(), url, keys=keys
        ) as again:  # while the traceback refers to the other one
            assert again.ready() and refused


@pytest.mark.parametrize("port", [99999, -1])
def test_a_health_port_that_is_none_is_one_line(port: int) -> None:
    with pytest.raises(InputError, match="choose another --health"):
        HealthPages(port, lambda: True, lambda: True, dict)


@pytest.mark.parametrize(
    "options", [["--memory", "inf"], ["--memory", "1e300"], ["--lease", "inf"], ["--memory", "0"]], ids=str
)
def test_limits_that_are_none_are_one_line(options: list[str]) -> None:
    with pytest.raises(InputError, match="expected finite numbers"):
        CliRunner().invoke(app, ["serve", *options], catch_exceptions=False, standalone_mode=False)


# ---- handshakes ---------------------------------------------------------------------------------------------------
@pytest.fixture()
def store(tmp_path: Path) -> KeyStore:
    store = KeyStore(tmp_path)
    for name in ("alice", "bob"):
        store.allow(name, store.new(name).public)
    return store


@pytest.fixture()
def server(store: KeyStore) -> Iterator[WorldServer]:
    with WorldServer(NullBackend(), "tcp://127.0.0.1:*", keys=store) as server:
        yield server


def client(server: WorldServer, store: KeyStore, name: str) -> Wire:
    return Wire(server.url, read_secret(store.folder / f"{name}.secret"), server.public_key)


def _soon(check: object, seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if check():  # type: ignore[operator]
            return True
        time.sleep(0.02)
    return False


def handshake(wire: Wire, url: str, seconds: float = 20.0) -> str:
    """How the first handshake of a new connection of this client ends; silence is waited for that long."""
    socket = wire.fresh()
    monitor = socket.get_monitor_socket()
    socket.connect(url)
    end, result = time.monotonic() + seconds, "silence"
    try:
        while (left := end - time.monotonic()) > 0:
            if not monitor.poll(int(1000 * left)):
                break
            event = zmq.utils.monitor.recv_monitor_message(monitor)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                result = "in"
                break
            if event & (zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL):
                result = "refused"
                break
            if event & (zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_DISCONNECTED):
                result = "refused"
    finally:
        socket.disable_monitor()
        socket.close(0)
    return result


def test_an_allowed_key_gets_in(server: WorldServer, store: KeyStore) -> None:
    with client(server, store, "alice") as alice:
        assert alice.result("hello")["auth"] == "curve"
        assert handshake(alice, server.url) == "in"


def test_keys_that_do_not_get_in(server: WorldServer, store: KeyStore) -> None:
    stranger = KeyPair(*zmq.curve_keypair())
    other_server = zmq.curve_keypair()[0]
    alice = read_secret(store.folder / "alice.secret")
    wires = {
        "unknown client key": Wire(server.url, stranger, server.public_key),
        "wrong server key": Wire(server.url, alice, other_server),
        "no key": Wire(server.url),
    }
    for name, wire in wires.items():
        assert handshake(wire, server.url, 2.0) in ("refused", "silence"), name
        wire.socket.sndtimeo = 500
        with contextlib.suppress(zmq.Again):
            wire.send("hello")
    assert handshake(wires["unknown client key"], server.url) == "refused"
    time.sleep(0.3)
    for name, wire in wires.items():
        assert wire.frames(0.1) is None, name
        wire.close()
    assert server.transport.counts["received"] == 0
    assert server.zap is not None and server.zap.denied > 0
    with client(server, store, "alice") as good:
        good.result("hello")


def test_a_key_is_shut_out_while_it_is_connected_and_let_in_again(
    server: WorldServer, store: KeyStore
) -> None:
    with client(server, store, "alice") as alice, client(server, store, "bob") as bob:
        session = alice.create()
        store.revoke("alice")
        assert _soon(lambda: alice.ask("hello").error is not None)
        assert alice.refused("hello") == "unauthorized"
        assert alice.refused("step", session=session, seq=1, arrays=STILL) == "unauthorized"
        assert handshake(alice, server.url, 2.0) != "in"
        bob.result("hello")
        store.allow("alice", read_public(store.folder / "alice.public"))
        assert _soon(lambda: alice.ask("hello").error is None)
        assert alice.step(session, 1).error is None  # the session waited


def sessions_of_another_key(server: WorldServer, store: KeyStore, tries: int) -> None:
    """Key B on key A's session: every op, a thousand times, and not once a hit."""
    with client(server, store, "alice") as alice, client(server, store, "bob") as bob:
        session = alice.create()
        snapshot = alice.result("snapshot", session=session)["snapshot"]
        frames = {"frames": np.zeros((4, 16, 16, 3), np.uint8)}
        attempts = [
            ("step", {"session": session, "seq": 1, "arrays": STILL}),
            ("reset", {"session": session, "seq": 1}),
            ("observe", {"session": session, "seq": 1, "arrays": frames}),
            ("restore", {"session": session, "seq": 1, "args": {"snapshot": snapshot}}),
            ("attach", {"session": session}),
            ("snapshot", {"session": session}),
            ("fork", {"session": session, "args": {"n": 2}}),
            ("score", {"session": session, "arrays": frames}),
            ("imagine", {"session": session, "arrays": {"action": np.zeros((2, 1))}}),
            ("next", {"session": session}),
            ("broadcast", {"session": session}),
            ("close", {"session": session}),
            ("discard", {"args": {"snapshot": snapshot}}),
            ("create", {"args": {"snapshot": snapshot}}),
        ]
        for i in range(tries):
            op, fields = attempts[i % len(attempts)]
            assert bob.refused(op, **fields) == "no_session", op
        assert bob.result("renew", args={"sessions": [session]})["missing"] == [session]
        assert bob.result("sessions")["sessions"] == []
        sent = alice.send("step", session=session, seq=1, arrays=STILL)
        assert bob.result("cancel", args={"request": sent}) == {"cancelled": False}
        assert alice.reply().error is None
        assert alice.result("attach", session=session)["seq"] == 1


def test_another_keys_session_does_not_exist(server: WorldServer, store: KeyStore) -> None:
    sessions_of_another_key(server, store, 1000)


def test_request_ids_of_one_key_mean_nothing_to_another(server: WorldServer, store: KeyStore) -> None:
    with client(server, store, "alice") as alice, client(server, store, "bob") as bob:
        same = os.urandom(16)
        first = alice.result("create", id=same)["session"]
        second = bob.result("create", id=same)["session"]
        assert first != second
        assert alice.result("create", id=same)["session"] == first


def test_another_connection_of_the_same_key_goes_on(server: WorldServer, store: KeyStore) -> None:
    with client(server, store, "alice") as one:
        session = one.create()
        one.step(session, 1)
    with client(server, store, "alice") as two:
        assert two.result("attach", session=session)["seq"] == 1
        assert two.step(session, 2).error is None


# ---- the handler -----------------------------------------------------------------------------------------------------
def test_the_handler_survives_exceptions(
    server: WorldServer, store: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> dict[bytes, str]:
        raise RuntimeError("no disk")

    with client(server, store, "alice") as alice:
        with monkeypatch.context() as patch:
            assert server.zap is not None
            patch.setattr(server.zap, "_store", type("Broken", (), {"allowed": staticmethod(broken)}))
            assert handshake(alice, server.url) == "refused"
        assert handshake(alice, server.url) == "in"
        assert server.zap.restarts == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_handler_lets_nobody_in_and_is_begun_again(
    server: WorldServer, store: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server.zap is not None
    zap: ZapHandler = server.zap

    def dies(*_: object) -> None:
        raise SystemExit

    with client(server, store, "alice") as alice:
        alice.result("hello")
        with monkeypatch.context() as patch:
            patch.setattr(ZapHandler, "watch", lambda self: None)
            patch.setattr(zap, "_answer", dies)
            assert handshake(alice, server.url, 2.0) != "in"
            assert not zap.alive
            assert not server.ready()
            assert handshake(alice, server.url, 2.0) != "in"
            alice.result("hello")  # who is in stays in
        assert _soon(lambda: zap.alive and server.ready())
        assert zap.restarts == 1
        assert handshake(alice, server.url) == "in"
