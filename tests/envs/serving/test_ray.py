"""Two replicas behind one address, one of them killed. Ray takes seconds to start, so all of it is slow."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from envs import RemoteEnv, RemoteVectorEnv, WorldModelEnv
from envs.serving.protocol import ServingError
from envs.serving.server import WorldServer
from tests.envs.serving.machines import eventually
from worldmodel import WorldModel

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow
ZERO = np.zeros(1, np.float32)


@pytest.fixture(scope="module")
def served(toy_path: Path) -> Iterator[tuple[WorldServer, Any]]:
    from envs.serving.ray import RayBackend

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    backend = RayBackend(str(toy_path), 2)
    with WorldServer(backend, "tcp://127.0.0.1:*") as server:
        yield server, backend
    backend.close()
    ray.shutdown()


def pairs(toy: WorldModel, url: str, count: int) -> list[tuple[WorldModelEnv, RemoteEnv]]:
    """Local and remote environments at the same point."""
    made = [
        (WorldModelEnv(toy, max_chunks=None), RemoteEnv(url, max_chunks=None, timeout=300.0))
        for _ in range(count)
    ]
    for seed, (local, remote) in enumerate(made):
        np.testing.assert_array_equal(local.reset(seed=seed)[0], remote.reset(seed=seed)[0])
    return made


def test_sessions_are_spread_and_match_local_ones(toy: WorldModel, served: tuple[WorldServer, Any]) -> None:
    server, backend = served
    both = pairs(toy, server.url, 4)
    assert backend.shares == [2, 2]
    for _ in range(3):
        for local, remote in both:
            np.testing.assert_array_equal(local.step(ZERO)[0], remote.step(ZERO)[0])
    local, remote = both[0]
    snapshot, there = local.snapshot(), remote.snapshot()
    for ours, theirs in zip(local.fork(2), remote.fork(2), strict=True):
        np.testing.assert_array_equal(ours.step(ZERO)[0], theirs.step(ZERO)[0])
        theirs.close()
    for local, remote in both[:2]:  # the second one is on the other replica
        local.reset(seed=9, options={"snapshot": snapshot})
        remote.reset(seed=9, options={"snapshot": there})
        np.testing.assert_array_equal(local.step(ZERO)[0], remote.step(ZERO)[0])
    assert len(both[0][1].imagine(np.zeros((3, 1)))) == 3
    for _, remote in both:
        remote.close()


def test_a_replica_killed(toy: WorldModel, served: tuple[WorldServer, Any]) -> None:
    """Resting sessions go on as if nothing had been; one that was busy may be lost, and says so; none is half."""
    server, backend = served
    both = pairs(toy, server.url, 4)
    for local, remote in both:
        local.step(ZERO), remote.step(ZERO)
    snapshots = [remote.snapshot() for _, remote in both]
    eventually(lambda: not backend.going_on)  # all rest, and are copied
    busy = RemoteVectorEnv(server.url, 4, max_chunks=None, timeout=300.0)
    busy.reset(seed=0)
    calls = [session.start_step(ZERO) for session in busy.sessions]
    os.kill(backend.pids[0], signal.SIGKILL)
    codes = []
    for session, call in zip(busy.sessions, calls, strict=True):
        session.connection.settle([call])
        try:
            session.accept(call)
        except ServingError as error:
            codes.append(error.code)
    print(f"{len(codes)} of 4 busy sessions lost, 4 of 4 resting ones restored")
    assert set(codes) <= {"session_lost"}
    for local, remote in both:
        for _ in range(3):
            np.testing.assert_array_equal(local.step(ZERO)[0], remote.step(ZERO)[0])
    for (_, remote), snapshot in zip(both, snapshots, strict=True):
        remote.restore(snapshot)
        remote.close()
    busy.reset(seed=0)
    busy.step(np.zeros((4, 1), np.float32))
    busy.close()


def test_both_replicas_killed_at_once(toy: WorldModel, served: tuple[WorldServer, Any]) -> None:
    server, backend = served
    both = pairs(toy, server.url, 3)
    for _ in range(2):
        while len(backend.pids) < 2:
            time.sleep(0.1)
        eventually(lambda: not backend.going_on)  # all rest, and are copied
        for pid in backend.pids:
            os.kill(pid, signal.SIGKILL)
        for local, remote in both:
            np.testing.assert_array_equal(local.step(ZERO)[0], remote.step(ZERO)[0])
    for _, remote in both:
        remote.close()
