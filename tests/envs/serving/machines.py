"""Server and client processes for tests that kill, stop and freeze them."""

from __future__ import annotations

import multiprocessing
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection as Pipe
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from envs.serving.client import RemoteEnv
from envs.serving.protocol import Request
from envs.serving.worker import Finished, Job, Outcome

PATIENCE = 60.0  # seconds that a busy machine may take for what takes none


class Clock:
    """A server's clock, which a test puts forward by as many seconds as ``ahead`` says."""

    ahead = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


def eventually(true: Callable[[], bool]) -> None:
    """Wait for something that must come about, however slow the machine is."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """The block is over in ``seconds``, to which comes what a slow or busy machine costs it.

    That is how late a thread wakes up that only sleeps, and three times the processor's time of this process.
    """
    late, over = 0.0, threading.Event()

    def sleeper() -> None:
        nonlocal late
        while not over.is_set():
            slept = time.monotonic()
            time.sleep(0.01)
            late += time.monotonic() - slept - 0.01

    thread = threading.Thread(target=sleeper)
    thread.start()
    began, worked = time.monotonic(), time.process_time()
    try:
        yield
    finally:
        took, worked = time.monotonic() - began, time.process_time() - worked
        over.set()
        thread.join()
    assert took < seconds + late + 3 * worked, f"{took:.2f} s, {late:.2f} s late, {worked:.2f} s of work"


SERVE = [sys.executable, "-m", "worldmodel", "serve"]


@contextmanager
def serving(
    world: Path, bind: str = "tcp://127.0.0.1:*", *options: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`worldmodel serve` in a process of its own, and its address; killed at the end if it still lives."""
    process = subprocess.Popen(
        [*SERVE, str(world), "--bind", bind, *options], stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"on (tcp://\S+)", line):
                yield process, found[1]
                return
        raise AssertionError(f"no server: {lines}")
    finally:
        process.kill()
        process.wait()


@contextmanager
def client(target: Callable[..., None], *arguments: Any) -> Iterator[tuple[BaseProcess, Pipe]]:
    """A client process, forked from one that has imported all it needs; ``target`` gets a pipe as its last argument."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.envs.serving.machines"])
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(*arguments, theirs), daemon=True)
    process.start()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join()
        ours.close()


def step_forever(url: str, seed: int, pipe: Pipe) -> None:
    """Make a session, name it, and step it without end."""
    env = RemoteEnv(url, max_chunks=None)
    env.reset(seed=seed)
    pipe.send(env.session.id)
    while True:
        env.step(np.zeros(1, np.float32))


def wait_for_views(url: str, sessions: int, pipe: Pipe) -> None:
    """Make sessions, name them, and wait for the next change of each."""
    envs = [RemoteEnv(url) for _ in range(sessions)]
    for env in envs:
        env.reset(seed=0)
    connection = envs[0].session.connection
    calls = [
        connection.start("next", 60.0, session=env.session.id, args={"after": 1, "wait": 30.0})
        for env in envs
    ]
    connection.ask("hello")  # the server has them now
    pipe.send([env.session.id for env in envs])
    connection.settle(calls)


def freeze(process: BaseProcess) -> None:
    """Stop a process where it is, its sockets open."""
    assert process.pid is not None
    import os

    os.kill(process.pid, signal.SIGSTOP)


class Scripted:
    """A backend whose observations are a function of the request, for what no model is needed for."""

    action_space = b'{"kind": "Box", "shape": [1], "dtype": "float32", "low": ["-2.0"], "high": ["2.0"]}'
    session_bytes = 1
    going_on = False

    def __init__(
        self, observe: Callable[[Request], np.ndarray], frame_size: tuple[int, int] = (32, 32)
    ) -> None:
        self._observe = observe
        self.facts: dict[str, Any] = {
            "world": "scripted",
            "fingerprint": "0" * 64,
            "frame_size": list(frame_size),
            "chunk_frames": 4,
            "latent_shape": [3, 2, 2],
            "fps": 20.0,
            "sampling": {"guidance": 0.0, "temperature": 1.0, "context": "rolling"},
        }

    def short(self, request: Request) -> bool:
        """Everything is."""
        return True

    def run(self, jobs: Sequence[Job]) -> list[Finished]:
        """All jobs, done."""
        return [(job, self._one(job.request)) for job in jobs]

    def _one(self, request: Request) -> Outcome:
        names = ("log_prob", "bits_per_dim", "action_gain", "sweeps", "residual", "context_frames", "chunk")
        info = {name: 1.0 for name in names}
        frames = self._observe(request)
        result = {"reward": 0.0, "terminated": False, "truncated": False, "info": info}
        return Outcome(result, {"observation": frames}, frames)
