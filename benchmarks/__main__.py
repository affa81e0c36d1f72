"""``make bench``: what a step, a batch, a fork and a save of a world cost here, as ratios within one run.

Times are medians; the machine may be shared, so quote ratios rather than milliseconds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from worldmodel import Sampling, WorldModel


def seconds(call: Callable[[], Any], repeats: int) -> np.ndarray:
    """Wall-clock seconds of ``repeats`` calls, after one that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return np.array(times)


def steps(world: WorldModel, batch: int, count: int, sampling: Sampling) -> dict[str, float]:
    """Latency and throughput of ``count`` successive steps at one batch size."""
    state, _ = world.reset(list(range(batch)))
    space = world.spec.action_space
    space.seed(0)
    action = np.stack([space.sample() for _ in range(batch)])
    times, sweeps = [], []
    for _ in tqdm(range(count + 2), desc=f"batch {batch}", unit="step", leave=False):
        began = time.perf_counter()
        state, chunk = world.step(state, action, sampling)
        times.append(time.perf_counter() - began)
        sweeps.append(float(chunk.sweeps.double().mean()))
    used = np.array(times[2:])
    return {
        "batch": batch,
        "p50_ms": 1e3 * float(np.median(used)),
        "p99_ms": 1e3 * float(np.percentile(used, 99)),
        "chunks_per_second": batch / float(np.median(used)),
        "frames_per_second": batch * world.chunk_frames / float(np.median(used)),
        "sweeps": float(np.mean(sweeps)),
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--world", default="pendulum", help="a shipped world or a world directory")
    parser.add_argument("--steps", type=int, default=60, help="steps timed at each batch size")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64], help="batch sizes")
    parser.add_argument(
        "--threads", type=int, default=1, help="torch threads; one is fastest for small batches"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    world = WorldModel.load(options.world)
    sampling = world.spec.sampling
    rows = [steps(world, b, options.steps, sampling) for b in options.batches]
    exact = steps(world, 1, options.steps, replace(sampling, tolerance=0.0))
    state, _ = world.reset([0])
    fork = seconds(lambda: state.fork(64), 20)
    forked = state.fork(64)
    result = {
        "world": world.spec.name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "steps": rows,
        "exact_solver_over_default": exact["p50_ms"] / rows[0]["p50_ms"],
        "fork_64_ms": 1e3 * float(np.median(fork)),
        "state_bytes": state.nbytes,
        "bytes_a_branch_over_state": (forked.nbytes - state.nbytes) / 64 / state.nbytes,
    }
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{world.spec.name}, {result['threads']} threads, torch {result['torch']}")
    print(
        f"{'batch':>6} {'p50 ms':>9} {'p99 ms':>9} {'chunks/s':>10} {'frames/s':>10} {'x batch 1':>10} {'sweeps':>7}"
    )
    for row in rows:
        gain = row["chunks_per_second"] / rows[0]["chunks_per_second"]
        print(
            f"{row['batch']:6d} {row['p50_ms']:9.2f} {row['p99_ms']:9.2f} {row['chunks_per_second']:10.1f} "
            f"{row['frames_per_second']:10.1f} {gain:10.2f} {row['sweeps']:7.2f}"
        )
    print(f"exact solver (tolerance 0) takes {result['exact_solver_over_default']:.2f} x the default's time")
    print(
        f"fork of 64: {result['fork_64_ms']:.2f} ms, {100 * result['bytes_a_branch_over_state']:.2f} % of a state's "
        f"{result['state_bytes'] / 1e3:.0f} kB a branch"
    )


if __name__ == "__main__":
    main()
