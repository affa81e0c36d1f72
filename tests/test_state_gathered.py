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
    assert not pages(mixed) & pages(gathered)
    plan = actions(6, 7, 2)
    _, chunks, _ = walk(world, gathered, plan, sampling)
    assert unchanged(before, mixed)
    _, expected, _ = walk(world, mixed, plan, sampling)
    for a, b in zip(chunks, expected, strict=True):
        for i in range(6):
            close(world, row(a, i), row(b, i))


def pages(state: WorldState) -> set[int]:
    """Where all K/V that a state keeps alive lie, those of the next window too."""
    found = (s for cache in state.caches().values() for c in cache.cohorts for s in c.segments)
    return {segment.page.kv.untyped_storage().data_ptr() for segment in found}


def test_one_session_of_a_batch_keeps_nothing_of_it_alive_while_the_next_window_is_made_ready() -> None:
    world = small_world()
    seeds = 4
    state, plan = world.reset(list(range(seeds)))[0], actions(seeds, world.flow.config.window + 2)
    ready = 0
    for t in range(plan.shape[1]):
        state, _ = world.step(state, plan[:, t])
        alone = state.select([1]).gathered()
        assert not pages(state) & pages(alone)
        ready += any(c.segments for c in alone.context.ahead.cache.cohorts) if alone.context.ahead else 0
    assert ready
    again, _ = world.step(alone, plan[1:2, -1])
    expected, _ = world.step(state.select([1]), plan[1:2, -1])
    assert torch.allclose(again.log_prob, expected.log_prob)


def test_a_past_that_is_empty() -> None:
    world = small_world()
    state = WorldState.concat([world.initial_state([0]), world.initial_state([1])]).gathered()
    assert len(state.context.cache.cohorts) == 1
    assert torch.isfinite(world.step(state, actions(2, 1)[:, 0])[1].log_prob).all()
