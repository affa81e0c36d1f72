"""What a step, a batch, a fork, a plan and a training step cost. Each function returns the rows of one table."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.baseline import Baseline, exact
from benchmarks.measure import Row, clocked, flops, interleaved, ms, seconds, timed, torch_alone
from worldmodel import WorldModel, native
from worldmodel import world as world_module
from worldmodel.denoising import clean_frame
from worldmodel.flow import flow as flow_module
from worldmodel.flow.native import NativeFlow
from worldmodel.noise import SAMPLE, normal
from worldmodel.packed import Linear, pack
from worldmodel.state import WorldState
from worldmodel.world import Chunk


def unpacked(module: nn.Module) -> nn.Module:
    """A copy without packed weights."""
    twin = copy.deepcopy(module)
    for child in twin.modules():
        child.__dict__.pop("_waiting", None)
    return twin


def random_actions(world: WorldModel, rows: int, seed: int = 0) -> Any:
    """One random action a session, or None for a world without actions."""
    if world.actions is None:
        return None
    space = world.spec.action_space
    space.seed(seed)
    samples = [space.sample() for _ in range(rows)]
    if isinstance(samples[0], dict):
        return {k: np.stack([s[k] for s in samples]) for k in samples[0]}
    return np.stack(samples)


def walk(
    world: WorldModel, state: WorldState, count: int, label: str, decode: bool = True
) -> tuple[WorldState, list[float], list[Chunk]]:
    """``count`` steps, their seconds, and their chunks."""
    action = random_actions(world, state.rows)
    times, chunks = [], []
    for _ in tqdm(range(count), desc=label, unit="step", leave=False):
        spent, (state, chunk) = clocked(world.step, state, action, decode=decode)
        times.append(spent)
        chunks.append(chunk)
    return state, times, chunks


def by_batch(world: WorldModel, batches: Sequence[int], count: int) -> list[Row]:
    """Latency and throughput of successive steps, window restarts included, against the batch size."""
    rows: list[Row] = []
    for batch in batches:
        state, _ = world.reset(list(range(batch)))
        state, _, _ = walk(world, state, 2, f"batch {batch}")
        _, times, chunks = walk(world, state, count if batch <= 64 else count // 3, f"batch {batch}")
        rate = batch / float(np.median(times))
        rows.append(
            {
                "batch": batch,
                "p50 ms": ms(times),
                "p99 ms": ms(times, 99),
                "steps/s": rate / batch,
                "chunks/s": rate,
                "frames/s": rate * world.chunk_frames,
                "x batch 1": rate / rows[0]["chunks/s"] if rows else 1.0,
                "sweeps": float(np.mean([c.sweeps.double().mean().item() for c in chunks])),
            }
        )
    return rows


def by_context(world: WorldModel, batch: int, repeats: int) -> list[Row]:
    """Latency of a step against the latent frames of context, with the FLOPs that attention's share predicts."""
    action = random_actions(world, batch)
    lengths = [n for n in (1, 2, 4, 8, 12, 15, 20) if n < world.flow.config.window]
    state, states = world.initial_state(list(range(batch))), {}
    for n in range(1, max(lengths) + 1):
        state, _ = world.step(state, action)
        if n in lengths:
            states[n] = state
    calls: dict[str, Callable[[], Any]] = {str(n): partial(world.step, s, action) for n, s in states.items()}
    times = interleaved(calls, repeats, "context")
    counted = {n: flops(partial(world.step, s, action)) for n, s in states.items()}
    first = lengths[0]
    return [
        {
            "context": n,
            "p50 ms": ms(times[str(n)]),
            "x shortest": ms(times[str(n)]) / ms(times[str(first)]),
            "FLOPs x shortest": counted[n] / counted[first],
        }
        for n in lengths
    ]


def deep_block(world: WorldModel, state: WorldState, action: Any, action_gain: bool) -> Callable[[], Any]:
    """A frame of few tokens through the deep block alone, committed, as a step does it."""
    deep, flow = world.flow.deep, world.flow
    _, features = world._action(action, state.rows)
    context = deep.reserve(world._room(state, world.spec.sampling), 2)
    w, two = noise_of(world, state), features is not None and action_gain
    if flow.native is None:
        return torch.no_grad()(lambda: deep.invert(context, w, features, 0.0, two))
    kernels, block = native.library(), deep.transformer.native
    assert kernels is not None and block is not None
    alone = NativeFlow(kernels, [(block, deep.order)])
    acts = None if features is None else features[:, 0]
    return lambda: alone.invert(deep.past(context, context.cache, 1), w, acts, 1 + two, [])


def by_stage(world: WorldModel, batch: int, count: int, peak: float) -> list[Row]:
    """Where a step's time and FLOPs go. ``deep`` of short frames includes the commit, which needs no pass of its own; it
    is timed alone, from the state before, and ``shallow`` is what is left of the flow's time.
    """
    state, _ = world.reset(list(range(batch)))
    state, _, _ = walk(world, state, 3, "warm")
    action, flow = random_actions(world, batch), world.flow
    short = world.grid[0] * world.grid[1] <= flow_module.ONE_BY_ONE
    spent: dict[str, list[float]] = {}
    total: list[float] = []
    alone: list[float] = []
    with ExitStack() as stack:
        stack.enter_context(timed(flow.deep, ["solve", "commit"], spent))
        stack.enter_context(timed(world, ["_room"], spent))
        stack.enter_context(timed(flow, ["imagine"], spent))
        stack.enter_context(timed(world_module, ["clean_frame"], spent))
        stack.enter_context(timed(world.codec, ["decode"], spent))
        stack.enter_context(timed(world.heads, ["see", "forward"], spent))
        walked = state
        for _ in tqdm(range(count), desc="stages", unit="step", leave=False):
            if short:
                alone.append(seconds(deep_block(world, walked, action, True)))
                spent["_room"] = spent["_room"][: len(total)]  # less the one that this needed
            one, (walked, chunk) = clocked(world.step, walked, action)
            total.append(one)
    encoding: dict[str, list[float]] = {}
    with timed(world.codec, ["encode"], encoding):
        for _ in range(max(3, count // 10)):
            world.observe(state, chunk.frames, action)
    mean = {name: sum(t) / count for name, t in spent.items()}
    solve = sum(alone) / count if short else mean["solve"]
    # the window's own commits, of the next window's frames, are part of "window"
    commit = 0.0 if short else max(0.0, mean["commit"] - mean["_room"])
    stages = {
        "window": mean["_room"],
        "deep": solve,
        "commit": commit,
        "shallow": mean["imagine"] - solve - commit,
        "denoise": mean["clean_frame"],
        "heads": mean["see"] + mean["forward"],
        "decode": mean["decode"],
    }
    whole = float(np.mean(total))
    stages["other"] = whole - sum(stages.values())
    deep_flops = stage_flops(world, state, action)
    rows: list[Row] = []
    for name, t in stages.items():
        work = deep_flops.get(name)
        rate = None if work is None or t <= 0 else work / t / 1e9
        rows.append(
            {
                "stage": name,
                "ms": 1e3 * t,
                "share": t / whole,
                "MFLOP": None if work is None else work / 1e6,
                "GFLOP/s": rate,
                "share of peak": None if rate is None else rate / peak,
            }
        )
    rows.append({"stage": "step", "ms": 1e3 * whole, "share": 1.0})
    rows.append({"stage": "encode (observe)", "ms": ms(encoding["encode"])})
    return rows


def stage_flops(world: WorldModel, state: WorldState, action: Any) -> dict[str, int]:
    """FLOPs of the stages of one step."""
    flow = world.flow
    _, features = world._action(action, state.rows)
    noise = normal(state.seeds, state.branches, state.steps, SAMPLE, world.latent_shape).to(world.device)
    w = flow.tokens(noise[:, None])[:, 0]
    context = world._room(state, world.spec.sampling)
    latent = noise[:, None]

    @torch.no_grad()
    def imagine() -> None:
        flow.imagine(context, w, features, 0.0, world.spec.sampling.tolerance, features is not None)

    @torch.no_grad()
    def shallow() -> None:
        for block in flow.shallow_blocks:
            block.invert_frame(w, world.grid)

    every, some = flops(imagine), flops(shallow)
    with torch.no_grad():
        decode = flops(lambda: world.codec.decode(latent, state.codec))
        frames = 1 if flow.denoiser is not None and flow.denoiser.keeps else state.noisy.shape[1]
        known = None if state.context.features is None else state.context.features[:, -frames:]
        denoise = flops(lambda: flow.denoise_newest(state.noisy[:, -frames:], world.grid, None, known))
    return {"deep": every - some, "shallow": some, "decode": decode, "denoise": denoise}


def deep_share(world: WorldModel, batches: Sequence[int], repeats: int) -> list[Row]:
    """FLOP/s of the deep block, frame by frame, as a share of the best float32 matrix product found (torch's, of packed
    weights, the kernels' own), and of torch's own, taken in turns with all.

    Sessions of their own read a past each; branches of one state share it.
    """
    n, kernels = 1024, native.library()
    product = Linear(n, n, bias=False, device=world.device).requires_grad_(False)
    pack(product)
    square = torch.randn(n, n, device=world.device)
    own = None
    if kernels is not None and world.device.type == "cpu":
        own = native.NativePerceptron(kernels, [(product.weight, torch.zeros(n))])
    tiled, half = kernels is not None and bool(kernels.worldmodel_tiled()), square.bfloat16()
    rows: list[Row] = []
    for batch in batches:
        for kind in ("sessions", "branches"):
            state, _ = world.reset(list(range(batch if kind == "sessions" else 1)))
            state, _, _ = walk(world, state, 5, "deep", decode=False)
            state = state.fork(batch) if kind == "branches" else state
            action = random_actions(world, batch)
            ways: dict[str, Callable[[], Any]] = {
                "deep": deep_block(world, state, action, True),
                "product": partial(product, square),
                "plain": partial(torch.mm, square, square),
            }
            if own is not None:
                ways["own"] = partial(own, square)
            if tiled:
                ways["bfloat16"] = partial(torch.mm, half, half)
            median = {way: float(np.median(t)) for way, t in interleaved(ways, repeats, "deep share").items()}
            with torch_alone():
                work = flops(deep_block(world, state, action, True))
            rate = work / median["deep"] / 1e9
            plain = 2 * n**3 / median["plain"] / 1e9
            peak = max(2 * n**3 / t / 1e9 for way, t in median.items() if way not in ("deep", "bfloat16"))
            rows.append(
                {
                    "batch": batch,
                    "of": kind,
                    "GFLOP/s": rate,
                    "peak GFLOP/s": peak,
                    "share of peak": rate / peak,
                    "of torch.mm": rate / plain,
                }
            )
            if tiled:  # a float32 product is several of bfloat16
                done, best = native.SLICES * rate, 2 * n**3 / median["bfloat16"] / 1e9
                rows[-1] |= {"bfloat16 GFLOP/s": done, "share of bfloat16 peak": done / best}
    return rows


def forks(world: WorldModel, branches: int, repeats: int) -> list[Row]:
    """A fork against a copy of the same sessions: time, and bytes a branch relative to the state's own."""
    state, _ = world.reset([0])
    state, _, _ = walk(world, state, 6, "fork")
    times = interleaved(
        {
            "fork": lambda: state.fork(branches),
            "copy": lambda: [copy.deepcopy(state) for _ in range(branches)],
        },
        repeats,
        "fork",
    )
    forked = state.fork(branches)
    return [
        {
            "way": way,
            "branches": branches,
            "ms": ms(times[way]),
            "bytes a branch": held,
            "share of a state": held / state.nbytes,
        }
        for way, held in (("fork", (forked.nbytes - state.nbytes) / branches), ("copy", float(state.nbytes)))
    ]


def planning(world: WorldModel, branches: Sequence[int], depth: int, repeats: int, decode: bool) -> list[Row]:
    """Branch-chunks a second: N branches of one state, ``depth`` chunks deep, forks included, on one core and on all.

    As planners ask for them: without the density under no action.

    The ratio is to one branch at its own best number of threads.
    """
    state, _ = world.reset([0])
    state, _, _ = walk(world, state, 6, "plan")
    before = torch.get_num_threads()
    ways = [(n, threads) for n in branches for threads in sorted({1, os.cpu_count() or 1})]
    actions = {n: random_actions(world, n) for n in branches}

    def plan(n: int, threads: int) -> None:
        torch.set_num_threads(threads)
        walk_on = state.fork(n)
        for _ in range(depth):
            walk_on, _ = world.step(walk_on, actions[n], decode=decode, action_gain=False)

    try:
        times = interleaved(
            {f"{n} {t}": partial(plan, n, t) for n, t in ways}, repeats, "planning", warm=True
        )
    finally:
        torch.set_num_threads(before)
    rates = {(n, t): n * depth / float(np.median(times[f"{n} {t}"])) for n, t in ways}
    first = max(rate for (n, _), rate in rates.items() if n == branches[0])
    return [
        {
            "branches": n,
            "threads": threads,
            "frames": decode,
            "branch-chunks/s": rate,
            "x one branch": rate / first,
        }
        for (n, threads), rate in rates.items()
    ]


def against_baseline(world: WorldModel, count: int, repeats: int) -> list[Row]:
    """A chunk of this project's step and of the plain baseline's, and their errors against the exact inverse.

    Errors are RMS over a latent frame, relative to its RMS, of the noisy latent x~, both samplers fed the exact past;
    frames: the 99th percentile of the difference of decoded frames, in levels of 255.
    """
    plain = unpacked(world.flow)
    codec = unpacked(world.codec) if isinstance(world.codec, nn.Module) else world.codec
    state, begun = world.reset([0])
    action = random_actions(world, 1)
    _, features = world._action(action, 1)
    window = world.flow.config.window
    steps = min(count, window - int(state.context_frames[0]))
    ours, errors, shown = [], [], []
    walked = state
    states = []
    for _ in range(steps):
        states.append(walked)
        walked, chunk = world.step(walked, action)
        reference_u, reference = exact(world.flow, states[-1].context, noise_of(world, states[-1]), features)
        mine = walked.noisy[:, -1:]
        ours.append(relative(mine, reference))
        base = _replay(world, plain, states[-1], window)
        base.step(noise_of(world, states[-1]), features)
        errors.append(relative(base.noisy[-1][:, None], reference))
        different = (frames_of(world, walked, reference).float() - chunk.frames.float()).abs()
        shown.append(float(torch.quantile(different.flatten(), 0.99)))

    def product(decode: bool = True) -> None:
        s = state
        for _ in range(steps):
            s, _ = world.step(s, action, decode=decode)

    def stepped() -> None:
        base = _replay(world, plain, state, window)
        for i in range(steps):
            base.step(noise_of(world, states[i]), features)
            base.decode(codec, base.clean())

    def called() -> None:
        for at in states:
            base = _replay(world, plain, at, window)
            base.step(noise_of(world, at), features)
            base.decode(codec, base.clean())

    def offline() -> None:
        base = _replay(world, plain, state, window)
        for i in range(steps):
            base.step(noise_of(world, states[i]), features)
        base.decode(codec, base.clean())

    ways = {
        "step": product,
        "baseline, a call a chunk": called,
        "baseline, given a state": stepped,
        "baseline, one clip": offline,
    }
    times = interleaved(ways, repeats, "baseline", warm=True)
    own = float(np.median(times["step"]))
    rows = []
    for name, t in times.items():
        each = float(np.median(t)) / steps
        rows.append(
            {
                "sampler": name,
                "ms a chunk": 1e3 * each,
                "chunks/s": 1 / each,
                "time x ours": float(np.median(t)) / own,
                "error": float(np.mean(ours if name == "step" else errors)),
                "likelihood": name == "step",
                "frames, p99 levels": float(np.max(shown)) if name == "step" else None,
            }
        )
    return rows


def _replay(world: WorldModel, plain: nn.Module, state: WorldState, window: int) -> Baseline:
    """A baseline that has seen what the state has."""
    base = Baseline(plain, state.rows, world.grid, window)  # type: ignore[arg-type]
    seen, kept = int(state.context_frames[0]), state.noisy.shape[1]
    u, features = state.context.u[:, -seen:], state.context.features
    noisy = torch.cat((u[:, : max(0, seen - kept)], state.noisy[:, -min(seen, kept) :]), dim=1)
    base.observe(u, noisy, None if features is None else features[:, -seen:])
    return base


def noise_of(world: WorldModel, state: WorldState) -> Tensor:
    """The noise tokens (B, N, D) of the sessions' next chunk."""
    noise = normal(state.seeds, state.branches, state.steps, SAMPLE, world.latent_shape)
    return world.flow.tokens((noise * world.spec.sampling.temperature)[:, None].to(world.device))[:, 0]


def relative(a: Tensor, b: Tensor) -> float:
    """Root mean square of a - b, relative to that of b."""
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


def frames_of(world: WorldModel, after: WorldState, exact_noisy: Tensor) -> Tensor:
    """The frames that the chunk behind the state ``after`` has where its noisy tokens are these, (B, 1, N, D)."""
    swapped = replace(after, noisy=torch.cat((after.noisy[:, :-1], exact_noisy), dim=1), denoiser=None)
    with torch.no_grad():
        latent = world.flow.latents(clean_frame(world.flow, world.grid, swapped)[0], world.grid)
        return world.codec.decode(latent, {})[0]


def environment(world: WorldModel, count: int) -> list[Row]:
    """End-to-end frames a second through `WorldModelEnv`, chunk mode, and `WorldModelVectorEnv`."""
    from envs import WorldModelEnv, WorldModelVectorEnv

    rows = []
    env = WorldModelEnv(world, step_mode="chunk", max_chunks=None)
    env.reset(seed=0)
    action = random_actions(world, 1)[0]
    times = [seconds(lambda: env.step(action)) for _ in tqdm(range(count), desc="environment", leave=False)]
    rows.append(
        {
            "environment": "single",
            "frames/s": world.chunk_frames / float(np.median(times)),
            "p50 ms": ms(times),
        }
    )
    batch = WorldModelVectorEnv(world, num_envs=16, step_mode="chunk", max_chunks=None)
    batch.reset(seed=0)
    actions = random_actions(world, 16)
    times = [seconds(lambda: batch.step(actions)) for _ in range(max(5, count // 8))]
    rows.append(
        {
            "environment": "vector of 16",
            "frames/s": 16 * world.chunk_frames / float(np.median(times)),
            "p50 ms": ms(times),
        }
    )
    return rows
