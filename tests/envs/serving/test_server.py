"""A step happens at most once; what cannot be done is refused by its code."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from benchmarks.null_world import FAIL, NullBackend
from envs.serving import health
from envs.serving.messages import decode_reply, split_frame
from envs.serving.protocol import Request
from envs.serving.server import WorldServer
from envs.serving.sessions import Limits
from envs.serving.worker import PROVEN, Finished, Job
from envs.serving.world_backend import WorldBackend
from tests.envs.serving.machines import PATIENCE, Clock, Scripted, eventually
from tests.envs.serving.wire import STILL, Wire
from worldmodel import WorldModel

ROOT = Path(__file__).parents[3]


@pytest.fixture()
def null() -> Iterator[Wire]:
    with WorldServer(NullBackend(), "tcp://127.0.0.1:*") as server, Wire(server.url) as wire:
        yield wire


class Held(NullBackend):
    """A null model whose rounds wait until its gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()

    def run(self, jobs: Sequence[Job]) -> list[Finished]:
        assert self.gate.wait(PATIENCE)
        return super().run(jobs)


# ---- at most once --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("times", [1, 2, 10])
@pytest.mark.parametrize("sockets", [1, 10])
def test_the_same_step_many_times_at_once(times: int, sockets: int) -> None:
    backend = NullBackend(seconds=0.02)
    with WorldServer(backend, "tcp://127.0.0.1:*") as server:
        wires = [Wire(server.url) for _ in range(sockets)]
        session = wires[0].create()
        request = os.urandom(16)
        for k in range(times):
            wires[k % sockets].send("step", id=request, session=session, seq=1, arrays=STILL)
        replies = [wires[k % sockets].frames() for k in range(times)]
        wires[0].send("step", id=request, session=session, seq=1, arrays=STILL)
        replies.append(wires[0].frames())
        assert replies[0] is not None
        assert len({tuple(frames or ()) for frames in replies}) == 1
        assert backend.counts[session] == backend.steps == 1
        assert wires[0].step(session, 2).result["info"]["chunk"] == 2
        for wire in wires:
            wire.close()


def test_sequence_numbers(null: Wire) -> None:
    session = null.create()
    assert null.step(session, 2).error.code == "gap"  # type: ignore[union-attr]
    first = null.step(session, 1, 0.25)
    again = null.step(session, 1, 0.25)
    assert again.result == first.result
    np.testing.assert_array_equal(again.arrays["observation"], first.arrays["observation"])
    assert null.step(session, 1, 0.5).error.code == "conflict"  # type: ignore[union-attr]
    assert null.refused("reset", session=session, seq=1) == "conflict"
    null.step(session, 2)
    assert null.step(session, 1, 0.25).error.code == "stale"  # type: ignore[union-attr]
    assert null.step(session, 9).error.code == "gap"  # type: ignore[union-attr]
    assert null.result("attach", session=session)["seq"] == 2


def test_frames_that_were_observed_are_compared_when_they_come_again() -> None:
    """Observed again: the same reply, and nothing runs; with one byte changed: `conflict`."""
    seen: list[Request] = []

    def observed(request: Request) -> np.ndarray:
        seen.append(request)
        return request.arrays.get("frames", np.zeros(1, np.uint8))

    frames = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    other = frames.copy()
    other[-1, -1, -1, -1] ^= 1
    with WorldServer(Scripted(observed), "tcp://127.0.0.1:*") as server, Wire(server.url) as wire:
        session = wire.create()
        for seq, real in ((1, frames), (2, other)):
            asked = {"session": session, "seq": seq, "arrays": {"frames": real}}
            first, again = wire.ask("observe", **asked), wire.ask("observe", **asked)
            assert first.error is None and again.result == first.result
            np.testing.assert_array_equal(again.arrays["observation"], real)
            asked["arrays"] = {"frames": other if seq == 1 else frames}
            assert wire.refused("observe", **asked) == "conflict"
            assert wire.refused("observe", **asked | {"arrays": {"frames": real[:3]}}) == "conflict"
        assert [request.seq for request in seen] == [None, 1, 2]
        assert wire.refused("observe", session=session, seq=1, arrays={"frames": frames}) == "stale"


def test_another_step_while_one_is_being_done() -> None:
    backend = Held()
    with WorldServer(backend, "tcp://127.0.0.1:*") as server, Wire(server.url) as wire:
        session = wire.create()
        backend.gate.clear()
        wire.send("step", session=session, seq=1, arrays=STILL)
        other = {"action": np.float32([1.0])}
        wire.send("step", session=session, seq=1, arrays=other)
        wire.send("step", session=session, seq=2, arrays=STILL)
        refused = [wire.reply().error for _ in range(2)]
        assert [error.code for error in refused if error] == ["conflict", "gap"]
        backend.gate.set()
        assert wire.reply().error is None


def test_create_fork_snapshot_and_close_happen_once(null: Wire) -> None:
    ids = {op: os.urandom(16) for op in ("create", "fork", "snapshot", "discard", "close")}
    created = [null.ask("create", id=ids["create"], args={"seed": 1}) for _ in range(3)]
    assert len({r.result["session"] for r in created}) == 1
    assert null.refused("create", id=ids["create"], args={"seed": 2}) == "conflict"
    session = created[0].result["session"]
    forks = [null.result("fork", id=ids["fork"], session=session, args={"n": 4}) for _ in range(3)]
    assert forks[0] == forks[1] == forks[2]
    shots = [null.result("snapshot", id=ids["snapshot"], session=session) for _ in range(3)]
    assert len({s["snapshot"] for s in shots}) == 1
    assert (null.result("stats")["sessions"], null.result("stats")["snapshots"]) == (5, 1)
    for _ in range(2):
        null.result("discard", id=ids["discard"], args={"snapshot": shots[0]["snapshot"]})
        null.result("close", id=ids["close"], session=session)
    assert (null.result("stats")["sessions"], null.result("stats")["snapshots"]) == (4, 0)
    assert null.refused("close", session=session) == "no_session"


def test_a_failing_model_is_internal_and_changes_nothing(null: Wire) -> None:
    session = null.create()
    null.step(session, 1)
    for _ in range(3):
        reply = null.step(session, 2, FAIL)
        assert reply.error is not None and reply.error.code == "internal"
        assert reply.error.correlation and "Traceback" not in str(reply.error)
    assert null.result("attach", session=session)["info"]["chunk"] == 1
    assert null.step(session, 2).result["info"]["chunk"] == 2


# ---- who runs the model --------------------------------------------------------------------------------------
def test_short_requests_run_where_they_arrive_and_long_ones_never() -> None:
    """A step that has proven to take less than a hand-over is run by the front; one that has once taken longer is not."""
    ran: list[str] = []
    long = threading.Event()

    def model(request: Request) -> np.ndarray:
        ran.append(threading.current_thread().name)
        if long.is_set():
            time.sleep(0.01)
        return np.zeros(1, np.uint8)

    with WorldServer(Scripted(model), "tcp://127.0.0.1:*") as server, Wire(server.url) as wire:
        session, seq = wire.create(), 0

        def by_the_front() -> bool:
            nonlocal seq
            seq += 1
            assert wire.step(session, seq).result["seq"] == seq
            return ran[-1] == "worldmodel-front"

        assert not any(by_the_front() for _ in range(PROVEN))
        eventually(by_the_front)
        long.set()
        by_the_front()
        for _ in range(3):
            assert not by_the_front()
        assert wire.step(session, seq).result["seq"] == seq and len(ran) == 1 + seq  # a retry runs nothing
        other = Wire(server.url)  # the front is there while the model is not
        wire.send("step", session=session, seq=seq + 1, arrays=STILL)
        assert "sessions" in other.result("stats")
        assert wire.reply().error is None
        other.close()


def test_a_short_request_that_fails_is_refused_and_changes_nothing(null: Wire) -> None:
    session = null.create()
    for seq in range(1, 3 * PROVEN):
        null.step(session, seq)
    for _ in range(3):
        assert null.step(session, 3 * PROVEN, FAIL).error.code == "internal"  # type: ignore[union-attr]
    assert null.step(session, 3 * PROVEN).result["info"]["chunk"] == 3 * PROVEN


def test_no_pass_of_the_model_runs_where_requests_arrive(toy: WorldModel) -> None:
    """However often frames that were there already have been quick."""
    where: list[tuple[bool, str]] = []

    class Watched(WorldBackend):
        def run(self, jobs: Sequence[Job]) -> list[Finished]:
            computes = [not self.short(job.request) for job in jobs]
            where.append((any(computes), threading.current_thread().name))
            return super().run(jobs)

    with WorldServer(Watched(toy), "tcp://127.0.0.1:*") as server, Wire(server.url) as wire:
        server.worker._quick.update(step=10 * PROVEN)
        session = wire.create(step_mode="frame")
        for seq in range(1, 30):
            server.worker._quick.update(step=10 * PROVEN)
            assert wire.step(session, seq).error is None
    assert (False, "worldmodel-front") in where
    assert (True, "worldmodel-front") not in where


def test_what_has_begun_is_not_cancelled(null: Wire) -> None:
    """Whoever is told that a request is cancelled gets that answer to it."""
    backend = Held()
    with WorldServer(backend, "tcp://127.0.0.1:*") as server, Wire(server.url) as wire:
        begun = threading.Event()
        one, run = backend._one, backend.gate

        def slow(job: Job) -> Any:
            begun.set()
            assert run.wait(PATIENCE)
            return one(job)

        session = wire.create()
        backend._one = slow  # type: ignore[method-assign]
        step = wire.send("step", session=session, seq=1, arrays=STILL)
        assert begun.wait(PATIENCE)
        run.clear()
        cancel = wire.send("cancel", args={"request": step})
        replies = [wire.reply()]
        run.set()
        replies.append(wire.reply())
        told = {reply.id: reply for reply in replies}
        assert told[cancel].result == {"cancelled": False} and told[step].error is None


def test_arguments_that_are_needed(null: Wire) -> None:
    session = null.create()
    assert null.refused("discard") == "bad_frame"
    assert null.refused("restore", session=session, seq=1) == "bad_frame"
    assert null.step(session, 1).error is None


# ---- limits ---------------------------------------------------------------------------------------------------
def test_leases(clock: Clock) -> None:
    backend = NullBackend()
    with WorldServer(backend, "tcp://127.0.0.1:*") as server, Wire(server.url) as wire:

        def left(sessions: int, snapshots: int) -> bool:
            said = wire.result("stats")
            return bool(said["sessions"] == sessions and said["snapshots"] == snapshots)

        session, other = wire.create(), wire.create()
        snapshot, forgotten = (wire.result("snapshot", session=other)["snapshot"] for _ in range(2))
        held = {"sessions": [session], "snapshots": [snapshot]}
        for _ in range(3):
            clock.ahead += 25.0
            assert wire.result("renew", args=held)["missing"] == []
        eventually(lambda: left(1, 1))  # the others' 60 s are over
        assert wire.step(session, 1).error is None
        assert wire.refused("attach", session=other) == "expired"
        assert wire.refused("restore", session=session, seq=2, args={"snapshot": forgotten}) == "no_session"
        clock.ahead += 50.0
        assert wire.ask("restore", session=session, seq=2, args={"snapshot": snapshot}).error is None
        clock.ahead += 50.0  # being restored renewed it
        assert left(1, 1)
        clock.ahead += 20.0
        eventually(lambda: left(0, 0))
        assert wire.refused("step", session=session, seq=3, arrays=STILL) == "expired"
        assert wire.refused("create", args={"snapshot": snapshot}) == "no_session"
        missing = wire.result("renew", args=held)["missing"]
        assert missing == [session, snapshot]
        eventually(lambda: not backend.counts and not backend.snapshots)


def test_a_snapshot_is_given_back_once() -> None:
    """However many requests discard it at the same time: the memory of others is not given away."""
    limits = Limits(memory=3000)
    with (
        WorldServer(NullBackend(seconds=0.1), "tcp://127.0.0.1:*", limits=limits) as server,
        Wire(server.url) as wire,
    ):
        session = wire.create()
        snapshot = wire.result("snapshot", session=session)["snapshot"]
        for _ in range(3):
            wire.send("discard", args={"snapshot": snapshot})
        for _ in range(3):
            wire.reply()
        wire.create()
        wire.create()
        assert wire.refused("create") == "busy"


def test_sessions_of_a_server_that_is_gone_are_lost(null: Wire) -> None:
    session = null.create()
    with WorldServer(NullBackend(), "tcp://127.0.0.1:*") as server, Wire(server.url) as wire:
        assert wire.refused("step", session=session, seq=1, arrays=STILL) == "session_lost"
        mine = wire.create()
        assert wire.refused("attach", session=mine[:8] + bytes(16)) == "no_session"


def test_memory_and_caps() -> None:
    limits = Limits(memory=5000, sessions=4, snapshots=3)
    with WorldServer(NullBackend(), "tcp://127.0.0.1:*", limits=limits) as server, Wire(server.url) as wire:
        sessions = [wire.create() for _ in range(4)]
        reply = wire.ask("create")
        assert reply.error is not None and reply.error.code == "busy" and reply.error.retry_after
        assert wire.refused("fork", session=sessions[0], args={"n": 2}) == "busy"
        snapshot = wire.result("snapshot", session=sessions[0])["snapshot"]
        assert wire.refused("snapshot", session=sessions[0]) == "busy"  # memory: 5 in all
        wire.result("discard", args={"snapshot": snapshot})
        wire.result("close", session=sessions[1])
        wire.create()
        assert wire.refused("create") == "busy"


def test_a_full_queue_and_deadlines_and_cancellation() -> None:
    backend = Held()
    server = WorldServer(backend, "tcp://127.0.0.1:*", limits=Limits(queue=4), rows=1)
    with server, Wire(server.url) as wire:
        sessions = [wire.create() for _ in range(6)]
        backend.gate.clear()
        sent = [wire.send("step", session=s, seq=1, arrays=STILL) for s in sessions[:2]]
        late = wire.send("step", session=sessions[2], seq=1, arrays=STILL, deadline=0.05)
        dropped = wire.send("step", session=sessions[3], seq=1, arrays=STILL)
        refused = wire.send("step", session=sessions[4], seq=1, arrays=STILL)
        cancel = wire.send("cancel", args={"request": dropped})
        unknown = wire.send("cancel", args={"request": os.urandom(16)})
        replies = {r.id: r for r in (wire.reply() for _ in range(3))}
        assert set(replies) == {refused, cancel, unknown}
        time.sleep(0.1)  # past the deadline of the late one
        backend.gate.set()
        replies |= {r.id: r for r in (wire.reply() for _ in range(4))}
        codes = {k: r.error.code if r.error else "ok" for k, r in replies.items()}
        assert [codes[i] for i in sent] == ["ok", "ok"]
        assert (codes[late], codes[dropped], codes[refused]) == ("deadline", "cancelled", "busy")
        assert replies[cancel].result == {"cancelled": True}
        assert replies[unknown].result == {"cancelled": False}
        for session in sessions[2:]:
            assert wire.step(session, 1).result["info"]["chunk"] == 1


def test_connections_are_dropped_once_where_that_frees_no_memory(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, trimmed = 0, []
    monkeypatch.setattr(health, "resident_bytes", lambda: used)
    monkeypatch.setattr(health, "trim_memory", lambda: trimmed.append(used))
    with WorldServer(NullBackend(), "tcp://127.0.0.1:*") as server, Wire(server.url) as wire:
        session = wire.create()
        port = wire.result("broadcast", session=session)["port"]
        used = 1 << 40
        eventually(lambda: server.transport.counts["rebound"] == 1)
        clock.ahead += 2.0
        eventually(lambda: len(trimmed) == 2)
        time.sleep(0.3)  # some looks
        assert (server.transport.counts["rebound"], len(trimmed)) == (1, 2)
        used = 0
        clock.ahead += 2.0
        assert wire.step(session, 1).error is None
        assert wire.result("broadcast", session=session)["port"] == port
        time.sleep(0.2)
        used = 1 << 40
        eventually(lambda: server.transport.counts["rebound"] == 2)
        clock.ahead += health.RECOVERY
        eventually(lambda: server.transport.counts["rebound"] == 3)


# ---- eyes -----------------------------------------------------------------------------------------------------
def test_viewers_wait_for_changes(null: Wire) -> None:
    session = null.create()
    first = null.ask("next", session=session)
    assert (first.result["at"], first.arrays["frames"].shape) == (1, (4, 16, 16, 3))
    nothing = null.ask("next", session=session, args={"after": 1, "wait": 0.2})
    assert nothing.result["at"] == 1 and not nothing.arrays
    waiting = null.send("next", session=session, args={"after": 1, "jpeg": 90})
    stepped = null.send("step", session=session, seq=1, arrays={"action": np.float32([0.5])})
    replies = {r.id: r for r in (null.reply(), null.reply())}
    seen = replies[waiting]
    assert seen.result["at"] == replies[stepped].result["at"] == 2
    assert seen.result["action"] == "[0.5]"
    assert {"log_prob", "bits_per_dim", "chunk"} <= set(seen.result["info"])
    assert sum(seen.result["sizes"]) == len(seen.arrays["jpeg"])
    assert len(seen.result["sizes"]) == 4
    assert bytes(seen.arrays["jpeg"][:2]) == b"\xff\xd8"
    parked = null.send("next", session=session, args={"after": 2})
    closed = null.send("close", session=session)
    replies = {r.id: r for r in (null.reply(), null.reply())}
    assert replies[closed].error is None
    assert replies[parked].error is not None and replies[parked].error.code == "no_session"
    assert null.refused("next", session=session) == "no_session"


def test_a_broadcast_keeps_the_newest(null: Wire) -> None:
    session = null.create()
    port = null.result("broadcast", session=session)["port"]
    assert null.result("broadcast", session=session)["port"] == port
    sub = null.context.socket(zmq.SUB)
    sub.linger, sub.conflate = 0, True
    sub.subscribe(b"")
    sub.connect(f"tcp://127.0.0.1:{port}")
    seq = 0
    while not sub.poll(50):  # until it is there
        seq += 1
        null.step(session, seq)
    for _ in range(20):
        seq += 1
        null.step(session, seq)
    time.sleep(0.3)
    looks = 0
    while sub.poll(20_000):
        looks += 1
        if decode_reply(split_frame(sub.recv())).result["at"] == seq + 1:
            break
    assert 1 <= looks < 20  # it did not look, so others took the place of most
    assert not sub.poll(200)
    null.result("broadcast", session=session, args={"on": False})
    null.step(session, seq + 1)
    assert not sub.poll(200)
    sub.close(0)


# ---- life ----------------------------------------------------------------------------------------------------------
def get(port: int, page: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{page}", timeout=PATIENCE) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_health_pages() -> None:
    with WorldServer(NullBackend(), "tcp://127.0.0.1:*", health=0) as server, Wire(server.url) as wire:
        assert server.health is not None
        port = server.health.port
        session = wire.create()
        wire.step(session, 1)
        assert get(port, "/healthz") == (200, "ok\n")
        assert get(port, "/readyz") == (200, "ok\n")
        assert get(port, "/secrets")[0] == 404
        status, text = get(port, "/metrics")
        assert status == 200
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        numbers = {name: float(value) for name, value in map(str.split, lines)}
        assert numbers["worldmodel_sessions"] == numbers["worldmodel_steps_total"] == 1
        assert numbers["worldmodel_memory"] > 1e7
        server.worker.stop()
        server.worker.join(PATIENCE)
        assert get(port, "/readyz")[0] == 503
        assert get(port, "/healthz")[0] == 200


def test_probers_that_hang_up_leave_no_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    with WorldServer(NullBackend(), "tcp://127.0.0.1:*", health=0) as server:
        assert server.health is not None
        for end in (b"", b"\r\n"):  # before the request is whole, and before it is answered
            with socket.create_connection(("127.0.0.1", server.health.port)) as prober:
                prober.sendall(b"GET /metrics HTTP/1.0\r\n" + end)
                prober.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
        eventually(lambda: not any("process_request" in thread.name for thread in threading.enumerate()))
        assert get(server.health.port, "/healthz") == (200, "ok\n")
    assert "Traceback" not in capfd.readouterr().err


SERVE = """
import signal, sys
from benchmarks.null_world import NullBackend
from envs.serving.server import WorldServer
server = WorldServer(NullBackend(seconds=0.5), "tcp://127.0.0.1:*", rows=8)
signal.signal(signal.SIGTERM, lambda *_: server.drain())
print(server.url, flush=True)
server.run()
"""


def test_sigterm_under_64_in_flight() -> None:
    """8 rounds of 0.5 s are under way: all 64 are answered, late ones are told, and the server leaves with 0."""
    process = subprocess.Popen([sys.executable, "-c", SERVE], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        with Wire(process.stdout.readline().strip()) as wire:
            parent = wire.create()
            sessions = [parent, *wire.result("fork", session=parent, args={"n": 63})["sessions"]]
            sent = {wire.send("step", session=s, seq=1, arrays=STILL) for s in sessions}
            assert wire.reply().error is None
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            late = wire.send("create")
            replies = [wire.reply() for _ in range(64)]
            assert {r.id for r in replies} - {late} < sent
            codes = [r.error.code if r.error else "ok" for r in replies]
            assert codes.count("ok") == 63 and codes.count("busy") == 1
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.stdout.close()


def test_the_command_serves_and_leaves(tmp_path: Path, toy_path: Path) -> None:
    command = [sys.executable, "-m", "worldmodel", "serve", str(toy_path), "--bind", "tcp://127.0.0.1:*"]
    process = subprocess.Popen([*command, "--health", "0"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        with Wire(line.split()[-1]) as wire:
            assert wire.result("hello")["world"] == "toy"
            assert wire.step(wire.create(), 1).error is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.stderr.close()


def test_large_requests_do_not_pile_up() -> None:
    backend, limits = Held(), Limits(queue_bytes=3000)
    with WorldServer(backend, "tcp://127.0.0.1:*", limits=limits, rows=1) as server, Wire(server.url) as wire:
        sessions = [wire.create() for _ in range(4)]
        large = {"action": np.zeros(250, np.float32)}
        backend.gate.clear()
        for session in sessions:
            wire.send("step", session=session, seq=1, arrays=large)
        error = wire.reply().error
        assert error is not None and error.code == "busy"
        backend.gate.set()
        assert [wire.reply().error for _ in range(3)] == [None] * 3
        assert wire.step(sessions[3], 1).error is None


def test_imaginations_do_not_pile_up() -> None:
    """They hold the frames that they have so far, and those are counted from the start."""
    backend, chunk = Held(), 4 * 16 * 16 * 3
    limits = Limits(queue_bytes=10 * chunk)
    with WorldServer(backend, "tcp://127.0.0.1:*", limits=limits) as server, Wire(server.url) as wire:
        session = wire.create()
        backend.gate.clear()
        plans = [{"action": np.zeros((horizon, 1), np.float32)} for horizon in (6, 6, 2)]
        sent = [wire.send("imagine", session=session, arrays=plan) for plan in plans]
        reply = wire.reply()
        assert reply.id == sent[1] and reply.error is not None and reply.error.code == "busy"
        backend.gate.set()
        assert {wire.reply().id, wire.reply().id} == {sent[0], sent[2]}
        assert wire.refused("imagine", session=session, arrays=plans[1]) == "unsupported"  # taken, that is
