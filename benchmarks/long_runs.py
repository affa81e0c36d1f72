"""One session for a long time: its latency, with where the slow steps come from, and its memory."""

from __future__ import annotations

import gc
import os
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.measure import Row, ms, synchronise
from benchmarks.steps import random_actions, walk
from worldmodel import WorldModel
from worldmodel.state import WorldState

SLOW = 1.5
"""A step is slow that takes so many times the median."""

WAITED = 0.25
"""A step was kept waiting whose wall clock runs ahead of its CPU clock by this share of the median step."""

WAITING = "kept waiting by other processes"


def resident() -> int:
    """Bytes of this process in memory now (the most there ever were, where the system does not tell)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _ahead(state: WorldState) -> int:
    return 0 if state.context.ahead is None else state.context.ahead.frames[0]


def _cause(before: WorldState, after: WorldState, collected: bool) -> str:
    if collected:
        return "garbage collected"
    if after.context.frames[0] <= before.context.frames[0]:
        return "window restarted"
    return "next window's frames encoded" if _ahead(after) > _ahead(before) else "nothing of these"


def latency(world: WorldModel, count: int) -> list[Row]:
    """``count`` steps of one session, decode and likelihood included: all, and by what happened in them."""
    state, _ = world.reset([0])
    state, _, _ = walk(world, state, 20, "warm")
    action = random_actions(world, 1)
    wall, cpu, causes = np.zeros(count), np.zeros(count), []
    collections: list[str] = []

    def collecting(phase: str, _: dict[str, Any]) -> None:
        collections.append(phase)

    gc.callbacks.append(collecting)
    try:
        for i in tqdm(range(count), desc="latency", unit="step", leave=False):
            collections.clear()
            synchronise()
            began, spent = time.perf_counter(), time.process_time()
            after, _ = world.step(state, action)
            synchronise()
            wall[i], cpu[i] = time.perf_counter() - began, time.process_time() - spent
            causes.append(_cause(state, after, bool(collections)))
            state = after
    finally:
        gc.callbacks.remove(collecting)
    return by_cause(wall, cpu, causes)


def by_cause(wall: np.ndarray, cpu: np.ndarray, causes: list[str]) -> list[Row]:
    """The table of `latency`, from seconds by the wall clock and by the CPU's, and what happened in each step."""
    median = float(np.median(wall))
    told = np.array(
        [WAITING if w - c > WAITED * median else cause for w, c, cause in zip(wall, cpu, causes, strict=True)]
    )
    rows: list[Row] = []
    for name in ("all", *sorted(set(told))):
        chosen = wall if name == "all" else wall[told == name]
        rows.append(
            {
                "steps in which": name,
                "steps": len(chosen),
                "p50 ms": ms(chosen),
                "p99 ms": ms(chosen, 99),
                "p99/p50": ms(chosen, 99) / (1e3 * median),
                f"over {SLOW} p50": int((chosen > SLOW * median).sum()),
                "CPU p99/p50": ms(cpu, 99) / ms(cpu) if name == "all" else None,
            }
        )
    return rows


def memory(world: WorldModel, count: int, samples: int = 10) -> list[Row]:
    """One session of ``count`` steps: the bytes of its state, of the pages under it, and of the process, over time."""
    state, _ = world.reset([0])
    action = random_actions(world, 1)

    def stepped(state: WorldState, count: int, label: str) -> WorldState:
        for _ in tqdm(range(count), desc=label, unit="step", leave=False):  # no chunk is kept
            state, _ = world.step(state, action)
        return state

    state = stepped(state, 2 * world.flow.config.window, "warm")
    rows: list[Row] = []
    for sample in range(samples + 1):
        if sample:
            state = stepped(state, count // samples, f"memory {sample}/{samples}")
        storages = {
            s.page.kv.untyped_storage().data_ptr(): s.page.kv.untyped_storage().nbytes()
            for cache in state.caches().values()
            for c in cache.cohorts
            for s in c.segments
        }
        rows.append(
            {
                "steps": sample * (count // samples),
                "frames of context": state.context.frames[0],
                "state kB": state.nbytes / 1e3,
                "pages kB": sum(storages.values()) / 1e3,
                "process MB": resident() / 1e6,
                "objects": len(gc.get_objects()),
            }
        )
    return rows
