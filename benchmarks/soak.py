"""``make soak``: a served world under clients that come, play, leave, and are killed at random, for half an hour.

Every frame that a client gets is compared with that of a local environment with the same seed and actions: they must be
equal bit for bit, whoever shared a batch. The server's sessions, memory and descriptors are looked at
throughout. Prints its figures; ends with status 1 where a frame differs, where sessions or snapshots are left
over, or where memory or descriptors grow.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection as Pipe
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from envs.serving.client import RemoteEnv
from envs.serving.connection import Connection

SEEDS, STEPS = 6, 40  # trajectories that clients play, and their lengths
GROWTH = 50 << 20  # bytes that the server may grow by after the first tenth
Course = dict[int, np.ndarray]


def levels_off(frames: np.ndarray, known: np.ndarray) -> list[int]:
    """For each of the frames (F, height, width, 3) uint8, the most that a value differs from the known one."""
    return [int(x) for x in np.abs(frames.astype(np.int16) - known).max(axis=(1, 2, 3))]


def actions(seed: int) -> np.ndarray:
    """(STEPS, 1) float32 in [-2, 2]: what a client of this seed does."""
    return np.random.default_rng(seed).uniform(-2, 2, (STEPS, 1)).astype(np.float32)


def courses(world: str) -> Course:
    """What every seed's course shows, (STEPS + 1, F, height, width, 3) uint8, from a local environment."""
    from envs.world_env import WorldModelEnv

    env = WorldModelEnv(world, max_chunks=None)
    known = {}
    for seed in tqdm(range(SEEDS), desc="local", unit="episode"):
        first = env.reset(seed=seed)[0]
        known[seed] = np.stack([first, *(env.step(action)[0] for action in actions(seed))])
    return known


def play(url: str, seed: int, known: np.ndarray, pipe: Pipe) -> None:
    """Play one course, sometimes forking, going back or watching; tell of every frame how far off it was."""
    rng = random.Random(os.getpid())
    env = RemoteEnv(url, max_chunks=None, timeout=60.0)
    first = env.reset(seed=seed)[0]
    pipe.send(levels_off(first, known[0]))
    for t, action in enumerate(actions(seed)):
        if rng.random() < 0.05:
            snapshot = env.snapshot()
            env.step(action)
            env.restore(snapshot)
        if rng.random() < 0.05:
            children = env.fork(2)
            children[0].step(action)
        pipe.send(levels_off(env.step(action)[0], known[t + 1]))
    env.close()


def server_facts(pid: int, connection: Connection) -> dict[str, float]:
    """Memory in bytes, descriptors, sessions and snapshots of the server."""
    said = connection.ask("stats", 60.0).result
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return {
        "rss": pages * os.sysconf("SC_PAGE_SIZE"),
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "sessions": said["sessions"],
        "snapshots": said["snapshots"],
        "steps": said["steps_total"],
    }


class Crowd:
    """Clients in processes of their own, most of which are killed some time; ``counts`` says what they saw."""

    def __init__(self, url: str, known: Course, size: int) -> None:
        self.counts = Counter[str]()
        self._url = url
        self._known = known
        self._size = size
        self._rng = random.Random(0)
        self._alive: dict[BaseProcess, tuple[Pipe, float]] = {}
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["envs.serving.client", "tqdm"])

    def tend(self) -> None:
        """Kill those whose time has come, hear the others, and fill up."""
        now = time.monotonic()
        for process, (pipe, dies) in list(self._alive.items()):
            if now > dies and process.is_alive():
                process.kill()
                self._alive[process] = pipe, float("inf")
                self.counts["killed"] += 1
            with contextlib.suppress(EOFError, OSError):
                while pipe.poll():
                    self._heard(pipe.recv())
            if not process.is_alive():
                process.join()
                self.counts["failed"] += process.exitcode not in (0, -9)
                pipe.close()
                del self._alive[process]
        while len(self._alive) < self._size:
            self._begin(now)

    def _begin(self, now: float) -> None:
        seed = self._rng.randrange(SEEDS)
        ours, theirs = self._context.Pipe(duplex=False)
        arguments = (self._url, seed, self._known[seed], theirs)
        process = self._context.Process(target=play, args=arguments, daemon=True)
        process.start()
        theirs.close()
        mortal = self._rng.random() < 0.7
        self._alive[process] = ours, now + self._rng.uniform(0.5, 20.0) if mortal else float("inf")
        self.counts["clients"] += 1

    def _heard(self, off: list[int]) -> None:
        self.counts["frames"] += len(off)
        self.counts["mismatches"] += len(off) - off.count(0)
        self.counts["levels_off"] = max(self.counts["levels_off"], *off)

    def end(self) -> None:
        """Kill all."""
        for process in self._alive:
            process.kill()
            process.join()


@contextlib.contextmanager
def served(world: str, lease: float) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`worldmodel serve` in a process of its own, and its address."""
    command = [sys.executable, "-m", "worldmodel", "serve", world, "--bind", "tcp://127.0.0.1:*"]
    server = subprocess.Popen([*command, "--lease", str(lease)], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        for line in server.stderr:
            if found := re.search(r"on (tcp://\S+)", line):
                threading.Thread(target=server.stderr.read, daemon=True).start()  # a full pipe would stop it
                yield server, found[1]
                return
        raise SystemExit(f"error: `{' '.join(command)}` did not serve; run it to see why")
    finally:
        server.kill()


def soak(world: str, minutes: float, clients: int, lease: float) -> dict[str, Any]:
    """Run it; see the module."""
    known, samples, seconds = courses(world), [], round(60 * minutes)
    with served(world, lease) as (server, url), contextlib.closing(Connection(url)) as connection:
        crowd, began = Crowd(url, known, clients), time.monotonic()
        try:
            for second in tqdm(range(seconds), desc="soak", unit="s"):
                while time.monotonic() < began + second + 1:
                    crowd.tend()
                    time.sleep(0.05)
                if second % 10 == 9:
                    samples.append(server_facts(server.pid, connection))
        finally:
            crowd.end()
        time.sleep(1.5 * lease)
        samples.append(server_facts(server.pid, connection))
        server.terminate()
        status = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = server.wait(120.0)
    counted = ("clients", "killed", "failed", "frames", "mismatches", "levels_off")
    facts = {"world": world, "minutes": minutes, **{name: crowd.counts[name] for name in counted}}
    return {**facts, **trends(samples), "server_exit_status": status}


def trends(samples: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Of what was seen of the server: medians of the halves, after the first tenth, and the end."""
    settled, end = samples[len(samples) // 10 : -1] or samples, samples[-1]
    middle = (len(settled) + 1) // 2
    halves = [settled[:middle], settled[middle:] or settled]
    rss, descriptors = ([float(np.median([s[k] for s in h])) for h in halves] for k in ("rss", "descriptors"))
    return {
        "steps": end["steps"],
        "sessions_most": max(s["sessions"] for s in samples),
        "snapshots_most": max(s["snapshots"] for s in samples),
        "sessions_left": end["sessions"],
        "snapshots_left": end["snapshots"],
        "rss_mb_first_and_second_half": [x / 2**20 for x in rss],
        "rss_mb_end": end["rss"] / 2**20,
        "descriptors_first_and_second_half": descriptors,
        "descriptors_end": end["descriptors"],
    }


def faults(result: dict[str, Any]) -> list[str]:
    """What is not as it should be."""
    rss, descriptors = result["rss_mb_first_and_second_half"], result["descriptors_first_and_second_half"]
    checks = {
        "frames differ": result["mismatches"] > 0,
        "clients failed": result["failed"] > 0,
        "sessions are left over": result["sessions_left"] > 0,
        "snapshots are left over": result["snapshots_left"] > 0,
        "memory grows": (rss[1] - rss[0]) * 2**20 > GROWTH,
        "descriptors grow": descriptors[1] > 1.5 * descriptors[0] + 16,
        "the server did not end well": result["server_exit_status"] != 0,
    }
    return [name for name, bad in checks.items() if bad]


def main() -> int:
    """Run it and print the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--world", default="pendulum", help="a shipped world or a world directory")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=6, help="how many play at a time")
    parser.add_argument(
        "--lease", type=float, default=10.0, help="seconds; what a killed client leaves lives so long"
    )
    options = parser.parse_args()
    result = soak(options.world, options.minutes, options.clients, options.lease)
    for name, value in result.items():
        print(f"{name:34s} {value}")
    bad = faults(result)
    print("all is well" if not bad else f"NOT WELL: {', '.join(bad)}")
    return len(bad)


if __name__ == "__main__":
    sys.exit(main())
