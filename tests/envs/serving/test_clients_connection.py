"""`Connection` against a scripted server: retries, late replies, deadlines and handshakes that fail."""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import zmq
from zmq.auth.thread import ThreadAuthenticator

from envs.serving import connection as module
from envs.serving.connection import ClientKeys, Connection, Unanswered
from envs.serving.messages import decode_request, encode_reply
from envs.serving.protocol import Reply, Request, ServingError
from tests.envs.serving.machines import eventually, within
from tests.envs.serving.proxy import Proxy
from worldmodel import InputError

Answer = Callable[[Request], list[Reply]]


@contextmanager
def scripted(
    answer: Answer,
    configure: Callable[[Any], None] = lambda s: None,
    endpoint: str = "tcp://127.0.0.1:*",
    context: zmq.Context[Any] | None = None,
) -> Iterator[tuple[str, list[Request]]]:
    """A ROUTER that answers each request with the replies of a function; its address, and what it has seen."""
    seen: list[Request] = []
    stop = threading.Event()
    socket = (context or zmq.Context.instance()).socket(zmq.ROUTER)
    socket.linger = 0
    configure(socket)
    socket.bind(endpoint)
    url = socket.last_endpoint.decode()

    def run() -> None:
        while not stop.is_set():
            if socket.poll(10):
                who, *frames = socket.recv_multipart()
                request = decode_request(frames)
                seen.append(request)
                for reply in answer(request):
                    socket.send_multipart([who, *encode_reply(reply)])
        socket.close(0)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield url, seen
    finally:
        stop.set()
        thread.join()


def number(request: Request) -> int:
    return int(request.arrays["action"][0])


def echo(request: Request) -> list[Reply]:
    return [Reply(request.id, {"number": number(request)}, dict(request.arrays))]


def ask(connection: Connection, n: int, **options: Any) -> Reply:
    return connection.ask("step", session=bytes(24), seq=1, arrays={"action": np.array([n])}, **options)


def test_a_reply_answers_its_request_in_any_order() -> None:
    held: list[Reply] = []

    def backwards(request: Request) -> list[Reply]:
        held.extend(echo(request))
        return held[::-1] if len(held) == 8 else []

    with scripted(backwards) as (url, _):
        connection = Connection(url)
        calls = [
            connection.start("step", session=bytes(24), seq=1, arrays={"action": np.array([n])})
            for n in range(8)
        ]
        replies = connection.wait(calls)
        assert [reply.result["number"] for reply in replies] == list(range(8))
        assert [int(reply.arrays["action"][0]) for reply in replies] == list(range(8))
        connection.close()


@pytest.mark.parametrize("trials", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_late_reply_never_pairs_with_a_newer_request(trials: int) -> None:
    """Every request's reply comes late, behind that of the next one, and twice."""
    late: list[Reply] = []

    def answer(request: Request) -> list[Reply]:
        (fresh,) = echo(request)
        out = [*late, fresh, *late]
        late[:] = [fresh]
        return out

    with scripted(answer) as (url, _):
        connection = Connection(url)
        wrong = sum(ask(connection, n).result["number"] != n for n in range(trials))
        connection.close()
    assert wrong == 0


def test_replies_to_requests_given_up_are_dropped() -> None:
    given_up = threading.Event()

    def answer(request: Request) -> list[Reply]:
        if number(request) == 1:
            given_up.wait(60.0)
        return echo(request)

    with scripted(answer) as (url, _):
        connection = Connection(url)
        ask(connection, 0)
        with pytest.raises(ServingError) as failed:
            ask(connection, 1, timeout=0.1)
        assert failed.value.code == "deadline"
        given_up.set()
        assert ask(connection, 2).result["number"] == 2
        connection.close()


def test_the_same_request_goes_out_again_when_its_reply_is_lost() -> None:
    with scripted(echo) as (url, seen), Proxy(url) as proxy:
        connection = Connection(proxy.url)
        ask(connection, 1)
        proxy.lose_replies = True
        call = connection.start("step", session=bytes(24), seq=2, arrays={"action": np.array([2])})
        while not proxy.lost:
            time.sleep(0.01)
        proxy.lose_replies = False
        proxy.cut()
        assert connection.wait([call])[0].result["number"] == 2
        connection.close()
        assert [number(r) for r in seen][:3] == [1, 2, 2]
        assert len({r.id for r in seen}) == 2  # the same one, on a slow machine more often


def test_a_reply_that_the_server_dropped_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_AFTER", 0.1)
    dropped: list[Request] = []

    def answer(request: Request) -> list[Reply]:
        dropped.append(request)
        return echo(request) if len(dropped) == 3 else []

    with scripted(answer) as (url, seen):
        connection = Connection(url)
        assert ask(connection, 5).result["number"] == 5
        connection.close()
        assert len({r.id for r in seen}) == 1


def test_busy_waits_and_asks_again_until_the_deadline() -> None:
    answers = [ServingError("busy", "full", 0.05)] * 2

    def answer(request: Request) -> list[Reply]:
        return [Reply(request.id, error=answers.pop())] if answers else echo(request)

    with scripted(answer) as (url, seen):
        connection = Connection(url)
        assert ask(connection, 1).result["number"] == 1
        assert len(seen) == 3
        answers += [ServingError("busy", "full", 60.0)]
        with pytest.raises(ServingError, match="full") as failed:
            ask(connection, 2)
        assert failed.value.code == "busy"
        connection.close()


def test_no_server_is_an_error_by_the_deadline() -> None:
    connection = Connection("tcp://127.0.0.1:9")
    with within(1.0), pytest.raises(Unanswered, match="no world server answers") as failed:
        connection.ask("hello", timeout=0.3)
    assert failed.value.code == "session_lost"
    connection.close()
    with pytest.raises(ServingError, match="closed"):
        connection.ask("hello")


def test_a_server_that_died_is_session_lost_and_its_successor_is_found() -> None:
    with scripted(echo) as (url, _):
        connection = Connection(url)
        ask(connection, 1)
    with pytest.raises(Unanswered, match="is gone") as failed:
        ask(connection, 2, timeout=2.0)
    assert failed.value.code == "session_lost"
    with scripted(echo, endpoint=url) as (_, seen):
        assert ask(connection, 3).result["number"] == 3
        connection.close()
    assert [number(r) for r in seen] == [3]  # nothing was queued for a server that was not there


SERVER, CLIENT, STRANGER = (zmq.curve_keypair() for _ in range(3))


def curve(socket: Any) -> None:
    socket.curve_server = True
    socket.curve_publickey, socket.curve_secretkey = SERVER
    socket.zap_domain = b"world"


@pytest.mark.parametrize(
    ("keys", "configure"),
    [
        (ClientKeys(STRANGER[0], *CLIENT), curve),
        (ClientKeys(SERVER[0], *STRANGER), curve),
        (None, curve),
        (ClientKeys(SERVER[0], *CLIENT), lambda s: None),
    ],
    ids=["wrong server key", "unknown client key", "no key", "keys for a server without"],
)
@pytest.mark.parametrize("pause", [0.0, 0.3])
def test_a_failed_handshake_raises_within_two_seconds(keys: Any, configure: Any, pause: float) -> None:
    """Whether it fails while somebody waits for it or has failed before anybody asks."""
    context = zmq.Context()
    authenticator = ThreadAuthenticator(context)
    authenticator.start()
    authenticator.thread.authenticator.certs["*"] = {CLIENT[0]: True}  # type: ignore[attr-defined]
    try:
        with scripted(echo, configure, context=context) as (url, seen):
            connection = Connection(url, keys)
            time.sleep(pause)
            with within(2.0), pytest.raises(Unanswered, match="the handshake failed") as failed:
                connection.ask("hello")
            assert failed.value.code == "unauthorized"
            connection.close()
            assert seen == []
    finally:
        authenticator.stop()
        context.term()


def test_a_server_that_never_shakes_hands_raises_within_two_seconds() -> None:
    """As with a dead ZAP handler: the TCP connection stands, and nothing more happens."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        connection = Connection(f"tcp://127.0.0.1:{listener.getsockname()[1]}")
        with within(2.0), pytest.raises(Unanswered, match="the handshake failed"):
            connection.ask("hello")
        connection.close()


def test_a_known_server_that_does_not_shake_hands_is_gone_and_not_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It stands still: the wire is there, no handshake ends, and reconnections fail as often as they like."""
    monkeypatch.setattr(module, "HANDSHAKE", 0.1)
    with scripted(echo) as (url, _), Proxy(url) as proxy:
        connection = Connection(proxy.url)
        ask(connection, 1)
        proxy.hold_replies = True
        proxy.cut()
        for _ in range(4):
            call = connection.start("hello", 0.3)
            connection.settle([call])
            proxy.cut()
            assert call.reply is not None and call.reply.error is not None
            assert call.reply.error.code == "session_lost"
        proxy.hold_replies = False
        assert ask(connection, 2).result["number"] == 2
        connection.close()


def test_what_is_held_is_renewed_while_a_long_request_is_waited_for() -> None:
    renewed: list[Request] = []
    waiting: list[Request] = []

    def answer(request: Request) -> list[Reply]:
        if request.op != "renew":
            waiting.append(request)
            return []
        renewed.append(request)
        done = echo(waiting[0]) if len(renewed) == 3 else []
        return [Reply(request.id, {"lease": 0.2, "missing": []}), *done]

    with scripted(answer) as (url, _):
        connection = Connection(url, timeout=20.0)
        connection.lease = 0.2
        with connection._lock:  # as any request has it: the thread that renews in the background waits for it
            connection.hold(bytes(24))
            assert ask(connection, 1).result["number"] == 1
            assert not connection._calls
        assert {request.args["sessions"][0] for request in renewed} == {bytes(24)}
        connection.close()


def test_a_closed_connection_keeps_no_descriptors() -> None:
    Connection("tcp://127.0.0.1:9").close()
    before = len(os.listdir("/proc/self/fd"))
    closed = [Connection("tcp://127.0.0.1:9") for _ in range(10)]
    for connection in closed:
        connection.close()
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= before)


def test_errors_go_through_pickle() -> None:
    for error in (ServingError("busy", "full", 0.5), Unanswered("internal", "no", None, "abc")):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error) and str(again) == str(error)
        assert vars(again) == vars(error)


def test_a_wire_cut_during_the_handshake_is_no_refusal() -> None:
    with scripted(echo) as (url, _), Proxy(url) as proxy:
        proxy.hold_replies = True  # the server's greeting does not arrive: the handshake waits
        connection = Connection(proxy.url)
        time.sleep(0.2)
        proxy.cut()
        proxy.hold_replies = False
        assert ask(connection, 7).result["number"] == 7
        connection.close()


@pytest.mark.parametrize("url", ["http://x", "tcp://", "tcp://127.0.0.1", 7])
def test_malformed_addresses(url: Any) -> None:
    with pytest.raises(InputError, match="expected tcp://host:port"):
        Connection(url)
