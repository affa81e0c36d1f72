"""Each acceleration switched off, one at a time; the switches live here and nowhere else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.measure import Row, interleaved, ms, torch_alone
from benchmarks.steps import random_actions, unpacked, walk
from worldmodel import WorldModel, native, packed
from worldmodel.flow import flow as flow_module
from worldmodel.flow.context import Context
from worldmodel.flow.deep import Committed, DeepBlock
from worldmodel.flow.denoiser import Denoiser
from worldmodel.flow.flow import Flow
from worldmodel.state import WorldState

Switch = Callable[[], AbstractContextManager[None]]

Way = tuple[WorldModel, Switch, dict[str, Any]]
"""Whose weights, under which switch, and what is asked of a step."""


@contextmanager
def jacobi_and_commit() -> Iterator[None]:
    """Jacobi over the frame and a commit after it, also for frames of few tokens."""
    kept = flow_module.ONE_BY_ONE
    flow_module.ONE_BY_ONE = 0
    try:
        yield
    finally:
        flow_module.ONE_BY_ONE = kept


@contextmanager
def one_stream() -> Iterator[None]:
    """The pass without the action as a pass of its own."""
    kept = DeepBlock.invert

    def apart(
        self: DeepBlock,
        context: Context,
        w: Tensor,
        features: Tensor | None,
        guidance: float = 0.0,
        want: bool = False,
    ) -> tuple[Context, Tensor, Committed]:
        result = kept(self, context, w, features, guidance, False)
        if want:
            self._run(self.to_own(result[1]), context, context.cache, None)
        return result

    DeepBlock.invert = apart  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        DeepBlock.invert = kept  # type: ignore[method-assign]


def plain_weights(world: WorldModel) -> WorldModel:
    """The world with torch's own linear maps and convolutions."""
    twin = copy.copy(world)
    for part in ("flow", "codec", "actions", "heads"):
        value = getattr(world, part)
        setattr(twin, part, None if value is None else unpacked(value))
    return twin


def float32_weights(world: WorldModel) -> WorldModel:
    """The world with all its weights packed in float32 by torch, also those that float16 represents."""
    twin, fits = copy.copy(world), packed._fits_half
    for part in ("flow", "codec", "actions", "heads"):
        setattr(twin, part, copy.deepcopy(getattr(world, part)))
    packed._fits_half = lambda weight: False
    try:
        with torch_alone():
            state, _ = twin.reset([0])  # at first use, copies pack again
            twin.step(state, random_actions(twin, 1))
    finally:
        packed._fits_half = fits
    return twin


def without_tiles(world: WorldModel) -> WorldModel:
    """The world with the kernels of processors that have no matrix unit."""
    twin, levels = copy.copy(world), native.LEVELS
    for part in ("flow", "codec", "actions", "heads"):
        setattr(twin, part, copy.deepcopy(getattr(world, part)))
    native.LEVELS = {k: tuple(b for b in builds if b != "_amx") for k, builds in levels.items()}
    native._found.cache_clear()
    try:
        state, _ = twin.reset([0])  # at first use, copies pack again
        twin.step(state, random_actions(twin, 1))
    finally:
        native.LEVELS = levels
        native._found.cache_clear()
    return twin


@contextmanager
def nothing_kept() -> Iterator[None]:
    """The denoiser run over all frames that the newest depends on, instead of keeping their K/V."""
    kept = Denoiser.newest_and_kept

    def anew(self: Denoiser, noisy: Tensor, grid: Any, features: Any, counts: Any, _: Any) -> Any:
        return kept(self, noisy, grid, features, counts, None)

    Denoiser.newest_and_kept = anew  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        Denoiser.newest_and_kept = kept  # type: ignore[method-assign]


@contextmanager
def window_denoised() -> Iterator[None]:
    """All remembered frames denoised at each step by torch, of which the newest is taken."""
    newest, keeps = Flow.denoise_newest, Denoiser.__dict__["keeps"]
    Flow.denoise_newest = lambda self, *args: self.denoise(*args)[:, -1:]  # type: ignore[method-assign]
    Denoiser.keeps = property(lambda self: False)  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        Flow.denoise_newest = newest  # type: ignore[method-assign]
        Denoiser.keeps = keeps  # type: ignore[method-assign]


def both(first: Switch, second: Switch) -> Switch:
    """Two switches at once."""

    @contextmanager
    def together() -> Iterator[None]:
        with first(), second():
            yield

    return together


def ablation(world: WorldModel, batches: list[int], steps: int, repeats: int) -> list[Row]:
    """Milliseconds a step with everything, and the factor that each switch costs."""
    plain, full = plain_weights(world), float32_weights(world)
    untiled: dict[str, Way] = {}
    if native.build() == "AMX":
        untiled["no matrix unit"] = (without_tiles(world), nullcontext, {})
    rows = []
    for batch in batches:
        less: dict[str, Any] = {"decode": False}
        ways: dict[str, Way] = {
            "everything": (world, nullcontext, {}),
            **untiled,
            "the denoiser keeps no K/V": (world, nothing_kept, {}),
            "Jacobi and commit": (world, jacobi_and_commit, {}),
            "no kernels of its own": (world, torch_alone, {}),
            "and packed in float32": (full, torch_alone, {}),
            "and weights not packed": (plain, torch_alone, {}),
            "no kernels, the window denoised": (world, both(torch_alone, window_denoised), {}),
            "no kernels, Jacobi and commit": (world, both(torch_alone, jacobi_and_commit), {}),
            "no kernels, two passes for the action gain": (world, both(torch_alone, one_stream), {}),
            "none of these": (plain, both(torch_alone, both(jacobi_and_commit, window_denoised)), {}),
            "without pixels (decode=False)": (world, nullcontext, less),
            "and without the action gain": (world, nullcontext, less | {"action_gain": False}),
        }
        state, _ = world.reset(list(range(batch)))
        action = random_actions(world, batch)

        def steps_of(
            way: Way,
            state: WorldState = state,
            action: Any = action,
        ) -> None:
            model, switch, wanted = way
            with switch():
                for _ in range(steps):
                    state, _ = model.step(state, action, **wanted)

        times = interleaved(
            {n: partial(steps_of, w) for n, w in ways.items()}, repeats, f"ablation {batch}", warm=True
        )
        base = float(np.median(times["everything"]))
        rows += [
            {
                "batch": batch,
                "way": name,
                "ms a step": ms(t) / steps,
                "x everything": float(np.median(t)) / base,
            }
            for name, t in times.items()
        ]
    return rows


def forks_copied(world: WorldModel, branches: int, repeats: int) -> list[Row]:
    """Planning over a shared past against planning over copies of it."""
    state, _ = world.reset([0])
    state, _, _ = walk(world, state, 6, "forks")
    action = random_actions(world, branches)

    def plan(start: Callable[[], WorldState]) -> None:
        s = start()
        for _ in range(5):
            s, _ = world.step(s, action, decode=False, action_gain=False)

    times = interleaved(
        {
            "shared past": lambda: plan(lambda: state.fork(branches)),
            "copied past": lambda: plan(
                lambda: WorldState.concat([copy.deepcopy(state) for _ in range(branches)])
            ),
            "gathered past": lambda: plan(lambda: state.select([0] * branches)),
        },
        repeats,
        "forks",
    )
    base = float(np.median(times["shared past"]))
    return [
        {"way": n, "branches": branches, "ms a chunk": ms(t) / 5, "x shared": float(np.median(t)) / base}
        for n, t in times.items()
    ]
