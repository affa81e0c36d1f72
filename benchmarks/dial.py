"""The solver's one dial, `Sampling.tolerance`: its cost in sweeps, and the error it leaves against the exact inverse."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.ablation import jacobi_and_commit
from benchmarks.baseline import exact
from benchmarks.measure import Row, clocked, ms
from benchmarks.steps import frames_of, noise_of, random_actions, relative
from worldmodel import WorldModel
from worldmodel.flow.flow import Flow, FlowConfig
from worldmodel.packed import pack
from worldmodel.sampling import Sampling
from worldmodel.state import WorldState

TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10, 0.0)


def _row(
    model: str,
    tolerance: float,
    errors: list[float],
    levels: list[float],
    sweeps: list[float],
    spent: list[float],
) -> Row:
    return {
        "model": model,
        "tolerance": tolerance,
        "default": "*" if tolerance == Sampling().tolerance else None,
        "sqrt": tolerance**0.5,
        "error of x~": float(np.mean(errors)),
        "worst": float(np.max(errors)),
        "frames, p99 levels": float(np.percentile(levels, 99)) if levels else None,
        "max": float(np.max(levels)) if levels else None,
        "sweeps": float(np.mean(sweeps)),
        "ms a chunk": ms(spent),
    }


def of_world(world: WorldModel, sessions: int, chunks: int) -> list[Row]:
    """Chunks of a world's own sessions, solved by Jacobi also where its frames are short, at each tolerance."""
    state, _ = world.reset(list(range(sessions)))
    action = random_actions(world, sessions)
    _, features = world._action(action, sessions)
    asked: list[tuple[WorldState, Tensor, Tensor]] = []
    for _ in tqdm(range(chunks), desc="exact inverse", leave=False):
        context = world._room(state, world.spec.sampling)
        _, noisy = exact(world.flow, context, noise_of(world, state), features)
        after, _ = world.step(state, action, decode=False)
        asked.append((state, noisy, frames_of(world, after, noisy)))
        state = after
    rows = []
    for tolerance in tqdm(TOLERANCES, desc="tolerances", leave=False):
        sampling = replace(world.spec.sampling, tolerance=tolerance)
        errors, levels, sweeps, spent = [], [], [], []
        for before, noisy, frames in asked:
            with jacobi_and_commit():
                seconds, (after, chunk) = clocked(world.step, before, action, sampling)
            errors += [relative(a, b) for a, b in zip(after.noisy[:, -1:], noisy, strict=True)]
            levels += (frames.int() - chunk.frames.int()).abs().flatten().tolist()
            sweeps += chunk.sweeps.tolist()
            spent.append(seconds)
        rows.append(_row(world.spec.name, tolerance, errors, levels, sweeps, spent))
    return rows


def long_frames(side: int) -> tuple[Flow, tuple[int, int]]:
    """A flow with random weights, frozen, for frames of side x side tokens."""
    config = FlowConfig(
        in_channels=8, channels=128, top_channels=256, layers_per_block=(2, 2, 4), patch_size=1, head_dim=64, window=8,
        context=4, denoiser_layers=1, denoiser_window=1,
    )  # fmt: skip
    generator, flow = torch.Generator().manual_seed(0), Flow(config)
    for name, p in flow.named_parameters():
        if not name.endswith(("norm.weight", "norm.bias")):
            p.data.normal_(0.0, 0.4 * p.shape[-1] ** -0.5, generator=generator)
    flow.eval().requires_grad_(False)
    pack(flow)
    return flow, (side, side)


@torch.no_grad()
def of_long_frames(side: int, chunks: int) -> list[Row]:
    """Frames of many tokens, which Jacobi is for: random weights, so that there is no picture to compare."""
    flow, grid = long_frames(side)
    name, dim = f"random, {side**2} tokens", flow.config.token_dim
    generator = torch.Generator().manual_seed(1)
    context, asked = flow.deep.start(1, grid, flow.config.window), []
    for _ in tqdm(range(chunks), desc="exact inverse", leave=False):
        w = torch.randn(1, side**2, dim, generator=generator)
        u, noisy = exact(flow, context, w, None)
        asked.append((context, w, noisy))
        context, _ = flow.deep.commit(flow.deep.reserve(context), u, None)
    rows = []
    for tolerance in tqdm(TOLERANCES, desc="tolerances", leave=False):
        errors, sweeps, spent = [], [], []
        for before, w, noisy in asked:
            with jacobi_and_commit():
                seconds, made = clocked(flow.imagine, before, w, None, 0.0, tolerance)
            errors.append(relative(made.x, noisy))
            sweeps += made.sweeps.tolist()
            spent.append(seconds)
        rows.append(_row(name, tolerance, errors, [], sweeps, spent))
    return rows
