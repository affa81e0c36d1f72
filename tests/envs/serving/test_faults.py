"""Clients, servers and wires that die, freeze or lie, each as often as the list of accidents asks."""

from __future__ import annotations

import contextlib
import hashlib
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from gymnasium.error import ResetNeeded

from envs import RemoteEnv, RemoteVectorEnv, WorldModelEnv, WorldModelVectorEnv
from envs.serving.connection import Connection, Unanswered
from envs.serving.messages import encode_request
from envs.serving.protocol import Request, ServingError, new_id
from envs.serving.server import WorldServer
from envs.serving.sessions import Limits
from envs.serving.world_backend import WorldBackend
from tests.envs.serving.machines import (
    PATIENCE,
    Clock,
    Scripted,
    client,
    eventually,
    freeze,
    serving,
    step_forever,
    wait_for_views,
    within,
)
from tests.envs.serving.proxy import Proxy
from worldmodel import WorldModel

ZERO = np.zeros(1, np.float32)


def repeated(fast: int, slow: int) -> pytest.MarkDecorator:
    """A number of trials: a few by default, all that the list asks for under ``slow``."""
    return pytest.mark.parametrize("trials", [fast, pytest.param(slow, marks=pytest.mark.slow)])


@repeated(4, 100)
def test_a_client_killed_mid_step(toy: WorldModel, clock: Clock, trials: int) -> None:
    """The session has taken whole steps, those that a local one takes, and is gone when its lease is over."""
    rng = random.Random(0)
    local, course = WorldModelEnv(toy, max_chunks=None), []
    course.append(local.reset(seed=5)[0])
    limits = Limits(lease=3600.0)
    with WorldServer(WorldBackend(toy), "tcp://127.0.0.1:*", limits=limits) as server:
        watcher = Connection(server.url)
        for _ in range(trials):
            with client(step_forever, server.url, 5) as (process, pipe):
                session = pipe.recv()
                time.sleep(rng.uniform(0.0, 0.1))
                process.kill()
                process.join()
            while watcher.ask("stats").result["queued"]:
                time.sleep(0.005)
            there = watcher.ask("attach", session=session)
            while len(course) <= there.result["seq"]:
                course.append(local.step(ZERO)[0])
            np.testing.assert_array_equal(there.arrays["observation"], course[there.result["seq"]])
        assert watcher.ask("stats").result["sessions"] == trials
        clock.ahead += limits.lease
        eventually(lambda: watcher.ask("stats").result["sessions"] == 0)
        watcher.close()


def test_a_frozen_client_is_seen_within_four_seconds(toy: WorldModel) -> None:
    with WorldServer(WorldBackend(toy), "tcp://127.0.0.1:*") as server:
        stepper = Connection(server.url)
        with client(wait_for_views, server.url, 32) as (process, pipe):
            sessions = pipe.recv()
            freeze(process)
            began = time.monotonic()
            with within(6.0):  # 4 s, and what a busy machine costs
                for session in sessions:
                    stepper.ask("step", session=session, seq=1, arrays={"action": ZERO})
                    if server.metrics().get("messages_unreachable_total"):
                        break
                    time.sleep(0.25)
            print(f"seen after {time.monotonic() - began:.2f} s")
        stepper.close()
        assert server.metrics()["messages_unreachable_total"] > 0


def test_a_server_killed_mid_step_and_its_successor(toy_path: Path) -> None:
    with serving(toy_path) as (process, url):
        env = RemoteEnv(url)
        first, _ = env.reset(seed=0)
        env.session.connection.timeout = 3.0
        call = env.session.start_step(ZERO)
        process.kill()
        with within(3.5):
            env.session.connection.settle([call])
        with pytest.raises(Unanswered) as failed:
            env.session.accept(call)
        assert failed.value.code == "session_lost"
        with pytest.raises(Unanswered, match="resume"):
            env.step(ZERO)
        env.session.connection.timeout = 60.0
    with serving(toy_path, url):
        with pytest.raises(ServingError) as failed:
            env.resume()
        assert failed.value.code == "session_lost"
        with pytest.raises(ResetNeeded):
            env.step(ZERO)
        np.testing.assert_array_equal(env.reset(seed=0)[0], first)
        env.step(ZERO)
        env.close()


def test_sigterm_with_64_steps_in_flight(toy_path: Path) -> None:
    with serving(toy_path) as (process, url):
        env = RemoteVectorEnv(url, 64)
        env.reset(seed=0)
        calls = [session.start_step(ZERO) for session in env.sessions]
        for connection in env._connections:
            connection.ask("hello")  # the calls are with the server now
        process.send_signal(signal.SIGTERM)
        for session, call in zip(env.sessions, calls, strict=True):
            session.connection.settle([call])
            session.accept(call)
        assert process.wait(PATIENCE) == 0
        env._close_connections()


@repeated(10, 200)
def test_a_lost_reply_is_asked_for_again_and_the_world_steps_once(
    toy: WorldModel, toy_server: WorldServer, trials: int
) -> None:
    with Proxy(toy_server.url) as proxy:
        local, remote = WorldModelEnv(toy, max_chunks=None), RemoteEnv(proxy.url, max_chunks=None)
        local.reset(seed=0), remote.reset(seed=0)
        for trial in range(trials):
            lost, proxy.lose_replies = proxy.lost, True
            call = remote.session.start_step(ZERO)
            while proxy.lost == lost:
                time.sleep(0.001)
            proxy.lose_replies = False
            proxy.cut()
            remote.session.connection.settle([call])
            turn = remote.session.accept(call)
            np.testing.assert_array_equal(turn.observation, local.step(ZERO)[0])
            assert remote.session.seq == trial + 1
        remote.close()


def test_an_interrupted_step_is_resumed(toy: WorldModel, toy_server: WorldServer) -> None:
    """A reply that comes too late: the step was taken, once, and resume shows it."""
    with Proxy(toy_server.url) as proxy:
        local, remote = WorldModelEnv(toy), RemoteEnv(proxy.url)
        local.reset(seed=0), remote.reset(seed=0)
        proxy.hold_replies, remote.session.connection.timeout = True, 0.5
        with pytest.raises(Unanswered) as failed:
            remote.step(ZERO)
        assert failed.value.code == "deadline"
        proxy.hold_replies, remote.session.connection.timeout = False, 60.0
        np.testing.assert_array_equal(remote.resume()[0], local.step(ZERO)[0])
        for _ in range(3):
            np.testing.assert_array_equal(remote.step(ZERO)[0], local.step(ZERO)[0])
        proxy.hold_replies, remote.session.connection.timeout = True, 0.5
        with pytest.raises(Unanswered):
            remote.step(ZERO)
        proxy.hold_replies, remote.session.connection.timeout = False, 60.0
        np.testing.assert_array_equal(remote.reset(seed=0)[0], local.reset(seed=0)[0])
        remote.close()


def checksummed(request: Request) -> np.ndarray:
    """(4, 64, 64, 3) uint8: each frame noise of its session and step, with its own checksum in the first 16 bytes."""
    seed = int.from_bytes(
        hashlib.blake2b(repr((request.session, request.seq)).encode()).digest()[:8], "little"
    )
    frames = np.random.default_rng(seed).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    for frame in frames.reshape(4, -1):
        frame[:16] = np.frombuffer(hashlib.blake2b(frame[16:].tobytes(), digest_size=16).digest(), np.uint8)
    return frames


def mismatches(frames: np.ndarray) -> int:
    flat = frames.reshape(-1, 64 * 64 * 3)
    sums = [hashlib.blake2b(frame[16:].tobytes(), digest_size=16).digest() for frame in flat]
    return sum(frame[:16].tobytes() != own for frame, own in zip(flat, sums, strict=True))


@repeated(1_000, 100_000)
def test_frames_with_a_checksum_each(trials: int) -> None:
    """Over 8 sessions at once, and a wire that is cut now and then."""
    backend = Scripted(checksummed, (64, 64))
    with WorldServer(backend, "tcp://127.0.0.1:*") as server, Proxy(server.url) as proxy:
        env = RemoteVectorEnv(proxy.url, 8, max_chunks=None)
        env.reset(seed=0)
        seen, wrong, last = 0, 0, np.zeros(0)
        while seen < trials:
            observations = env.step(np.zeros((8, 1), np.float32))[0]
            wrong += mismatches(observations) + int(np.array_equal(observations, last))
            seen, last = seen + 32, observations
            if seen % 6400 == 0:
                proxy.cut()
        env.close()
    print(f"{seen} frames, {wrong} mismatches")
    assert wrong == 0


def test_a_client_that_never_reads(capsys: pytest.CaptureFixture[str]) -> None:
    """Others get all their replies; their p99 is printed, with it and without."""
    frames = np.zeros((4, 256, 256, 3), np.uint8)
    with WorldServer(Scripted(lambda _: frames, (256, 256)), "tcp://127.0.0.1:*") as server:
        good = RemoteEnv(server.url, max_chunks=None)
        good.reset()

        def p99(count: int) -> float:
            times = []
            for _ in range(count):
                began = time.perf_counter()
                assert good.step(ZERO)[0].shape == frames.shape
                times.append(time.perf_counter() - began)
            return 1e3 * float(np.percentile(times, 99))

        alone = p99(300)
        greedy = zmq.Context.instance().socket(zmq.DEALER)
        greedy.linger, greedy.rcvhwm = 0, 1
        greedy.connect(server.url)
        stop = threading.Event()

        def pester() -> None:
            session, _ = good.session.id, greedy.send_multipart(encode_request(Request("create", new_id())))
            while not stop.is_set():
                request = Request("attach", new_id(), session)
                with contextlib.suppress(zmq.Again):
                    greedy.send_multipart(encode_request(request), zmq.DONTWAIT)
                time.sleep(0.002)

        pestering = threading.Thread(target=pester)
        pestering.start()
        beside = p99(300)
        stop.set()
        pestering.join()
        greedy.close(0)
        with capsys.disabled():
            print(f"\nothers' p99: {alone:.1f} ms alone, {beside:.1f} ms beside a client that never reads")
        good.close()


def test_a_slot_that_is_not_settled_holds_back_the_others(toy: WorldModel, toy_server: WorldServer) -> None:
    options: dict[str, Any] = {"num_envs": 3, "termination_threshold": 2.0}
    remote, native = RemoteVectorEnv(toy_server.url, **options), WorldModelVectorEnv(toy, **options)
    actions = np.zeros((3, 1), np.float32)
    remote.reset(seed=0), native.reset(seed=0)
    remote.sessions[1].unsettled = True
    with pytest.raises(Unanswered, match=r"slots \[1\] .* reset"):
        remote.step(actions)
    assert [session.unsettled for session in remote.sessions] == [False, True, False]
    assert not remote._connections[0]._calls
    remote.reset(seed=0, options={"reset_mask": np.array([False, True, False])})
    native.reset(seed=0, options={"reset_mask": np.array([False, True, False])})
    np.testing.assert_allclose(remote.step(actions)[1], native.step(actions)[1], atol=1e-4)
    remote.close()


def test_where_one_slot_cannot_start_the_others_are_taken_in(
    toy_server: WorldServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = RemoteVectorEnv(toy_server.url, 3)
    remote.reset(seed=0)
    failing = ServingError("unsupported", "no")
    monkeypatch.setattr(remote.sessions[2], "start_step", lambda _: (_ for _ in ()).throw(failing))
    with pytest.raises(ServingError, match="no"):
        remote.step(np.zeros((3, 1), np.float32))
    assert [(session.seq, session.unsettled) for session in remote.sessions] == [
        (1, False),
        (1, False),
        (0, False),
    ]
    assert not remote._connections[0]._calls
    monkeypatch.undo()
    remote.reset(seed=0)
    remote.close()


def test_closing_many_slots_of_a_dead_server_takes_no_time() -> None:
    frames = np.zeros((4, 32, 32, 3), np.uint8)
    with WorldServer(Scripted(lambda _: frames), "tcp://127.0.0.1:*") as server:
        env = RemoteVectorEnv(server.url, 20)
        env.reset(seed=0)
    with within(1.0):
        env.close()


@repeated(2, 20)
def test_a_vector_environment_outlives_cut_wires(
    toy: WorldModel, toy_server: WorldServer, trials: int
) -> None:
    with Proxy(toy_server.url) as proxy:
        remote, straight = RemoteVectorEnv(proxy.url, 4), RemoteVectorEnv(toy_server.url, 4)
        remote.reset(seed=0), straight.reset(seed=0)
        for trial in range(trials):
            threading.Timer(0.01 * (trial % 5), proxy.cut).start()
            actions = np.zeros((4, 1), np.float32)
            a: Any = remote.step(actions)
            b: Any = straight.step(actions)
            np.testing.assert_array_equal(a[0], b[0])
        remote.close()
        straight.close()
