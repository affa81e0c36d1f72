"""`WorldState.gathered`: the same sessions, with K/V that they share with nobody."""

from __future__ import annotations

import torch

from tests.sessions import actions, close, contents, policy, row, small_world, unchanged, walk
from worldmodel.sampling import Sampling
from worldmodel.state import WorldState


@policy
def test_gathered_sessions_go_on_as_they_would(sampling: Sampling) -> None:
    """Forked, selected and single sessions of several ages; long enough for windows to fill up."""
    world = small_world()
    first = walk(world, world.reset([0])[0], actions(1, 2), sampling)[0].fork(3)
    second = walk(world, world.reset([1, 2])[0], actions(2, 2, 1), sampling)[0]
    third = world.reset([3])[0]
    mixed = WorldState.concat([first, second.select([1]), second.select([0]), third])
    before = contents(mixed)
    gathered = mixed.gathered()
    assert len(mixed.context.cache.cohorts) == 4
    assert [c.rows for c in gathered.context.cache.cohorts] == [5, 1]
    pages = {s.page.kv.data_ptr() for c in mixed.context.cache.cohorts for s in c.segments}
    assert not pages & {s.page.kv.data_ptr() for c in gathered.context.cache.cohorts for s in c.segments}
    plan = actions(6, 7, 2)
    _, chunks, _ = walk(world, gathered, plan, sampling)
    assert unchanged(before, mixed)
    _, expected, _ = walk(world, mixed, plan, sampling)
    for a, b in zip(chunks, expected, strict=True):
        for i in range(6):
            close(world, row(a, i), row(b, i))


def test_a_past_that_is_empty() -> None:
    world = small_world()
    state = WorldState.concat([world.initial_state([0]), world.initial_state([1])]).gathered()
    assert len(state.context.cache.cohorts) == 1
    assert torch.isfinite(world.step(state, actions(2, 1)[:, 0])[1].log_prob).all()
