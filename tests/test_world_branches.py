"""The state is all there is: replays, forks, batches and randomness."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.sessions import (
    actions,
    close,
    pictures,
    policy,
    row,
    same_chunk,
    small_world,
    walk,
)
from worldmodel.sampling import Sampling
from worldmodel.state import WorldState
from worldmodel.world import Chunk, WorldModel


@pytest.fixture(scope="module")
def world() -> WorldModel:
    """Windows of 6 chunks, re-encoded to 3; 4 tokens of 3 dimensions a chunk."""
    return small_world()


# ---- the state is all there is -----------------------------------------------------------------------------
@policy
def test_going_back_and_forth_is_bit_exact(world: WorldModel, sampling: Sampling) -> None:
    """Continue from an old state after newer ones were written: the same frames and likelihoods, bit for
    bit.
    """
    a = actions(2, 12)
    states, chunks = [world.initial_state([1, 2])], []
    for t in range(12):
        state, chunk = world.step(states[-1], a[:, t], sampling)
        states.append(state)
        chunks.append(chunk)
    for t in (0, 3, 5, 6, 7, 11):
        branch, _ = world.step(states[t], -a[:, t], sampling)  # a branch that writes to the same pages
        world.step(branch, a[:, t], sampling)
        state = states[t]
        for later in range(t, 12):
            state, chunk = world.step(state, a[:, later], sampling)
            assert same_chunk(chunk, chunks[later])
        assert torch.equal(state.log_prob, states[-1].log_prob)


@policy
def test_fork_equals_replay_bit_for_bit(world: WorldModel, sampling: Sampling) -> None:
    a, after = actions(1, 4), actions(3, 5, seed=9)

    def play(disturb: bool) -> list[Chunk]:
        state, _, _ = walk(world, world.initial_state([7]), a, sampling)
        if disturb:  # others are forked and stepped first: no influence
            walk(world, state.fork(2), after[:2], sampling)
            world.score(state, pictures(world, 1), a[:, 0])
        forked = state.fork(3)
        assert forked.nbytes < 1.5 * state.nbytes + 1000
        _, chunks, _ = walk(world, forked, after, sampling)
        walk(world, state, a, sampling)
        return chunks

    assert all(same_chunk(x, y) for x, y in zip(play(False), play(True), strict=True))


def test_fork_of_one_continues_the_session(world: WorldModel) -> None:
    a = actions(2, 8)
    state, _, _ = walk(world, world.initial_state([7, 8]), a[:, :4])
    _, plain, _ = walk(world, state, a[:, 4:])
    _, forked, _ = walk(world, state.fork(1), a[:, 4:])
    assert all(same_chunk(x, y) for x, y in zip(plain, forked, strict=True))


@policy
def test_children_of_a_fork_are_sessions_of_their_own(world: WorldModel, sampling: Sampling) -> None:
    """Child i of n is child i of any n; child 0 is the parent; no two children share noise."""
    a = actions(1, 9)
    state, _, _ = walk(world, world.initial_state([7]), a[:, :3], sampling)
    five, two, parent = state.fork(5), state.fork(2), state
    for t in range(3, 9):
        action = a[:, t]
        five, many = world.step(five, np.repeat(action, 5, 0), sampling)
        two, few = world.step(two, np.repeat(action, 2, 0), sampling)
        parent, alone = world.step(parent, action, sampling)
        close(world, row(many, 0), alone)
        close(world, row(many, 0), row(few, 0))
        close(world, row(many, 1), row(few, 1))
        distance = torch.cdist(many.noise.flatten(1), many.noise.flatten(1)) + 10 * torch.eye(5)
        assert distance.min() > 0.1


def test_forks_of_forks_are_all_different(world: WorldModel) -> None:
    state, _, _ = walk(world, world.initial_state([7]), actions(1, 1))
    tree = state.fork(2).fork(2)
    later, _ = world.step(tree.select([0]), actions(1, 1)[:, 0])
    tree, chunk = world.step(tree, np.zeros((4, 1), np.float32))
    distance = torch.cdist(chunk.noise.flatten(1), chunk.noise.flatten(1)) + 10 * torch.eye(4)
    assert distance.min() > 0.1
    # a child forked off later does not repeat the noise of one forked off earlier
    _, one = world.step(later.fork(2).select([1]), np.zeros((1, 1), np.float32))
    _, again = world.step(tree, np.zeros((4, 1), np.float32))
    assert (again.noise - one.noise).flatten(1).norm(dim=1).min() > 0.1


@policy
def test_each_slot_of_a_batch_equals_its_solo_run(world: WorldModel, sampling: Sampling) -> None:
    """Also where contexts are of unequal length, past the window, after forks and real chunks."""
    a = actions(5, 12)
    lengths = [0, 1, 4, 6, 9]
    solo = []
    for i, length in enumerate(lengths):
        state = world.initial_state([100 + i])
        if length:
            state, _ = world.observe(state, pictures(world, 1, i), a[i : i + 1, 0])
            state, _, _ = walk(world, state, a[i : i + 1, 1:length], sampling)
        solo.append(state)
    batch = WorldState.concat(solo)
    assert batch.context_frames.tolist() == [s.context_frames.item() for s in solo]
    for t in range(9):
        batch, together = world.step(batch, a[:, t], sampling)
        for i in range(5):
            solo[i], alone = world.step(solo[i], a[i : i + 1, t], sampling)
            close(world, row(together, i), alone)
    scored = world.score(batch, pictures(world, 5), a[:, 9], draws=2)
    for i in range(5):
        alone_score = world.score(solo[i], pictures(world, 5)[i : i + 1], a[i : i + 1, 9], draws=2)
        assert torch.allclose(scored.log_prob[i : i + 1], alone_score.log_prob, rtol=1e-4, atol=1e-4)
    some, mixed = world.step(batch.select([3, 0, 3]), a[[3, 0, 3], 10], sampling)
    for slot, i in enumerate((3, 0, 3)):
        close(world, row(mixed, slot), world.step(solo[i], a[i : i + 1, 10], sampling)[1])
    assert some.rows == 3


def test_a_session_of_a_started_batch_equals_its_solo_run(world: WorldModel) -> None:
    a = actions(4, 8)
    _, together, _ = walk(world, world.initial_state([1, 2, 3, 4]), a)
    for i in range(4):
        _, alone, _ = walk(world, world.initial_state([1 + i]), a[i : i + 1])
        for x, y in zip(together, alone, strict=True):
            close(world, row(x, i), y)


# ---- randomness --------------------------------------------------------------------------------------------
def test_global_generators_are_not_used(world: WorldModel) -> None:
    def session() -> tuple[WorldState, Chunk]:
        state, _ = world.reset([3, 4])
        world.score(state, pictures(world, 2), actions(2, 1)[:, 0], draws=3)
        state, _ = world.step(state.fork(2), actions(4, 1)[:, 0], Sampling(guidance=1.0))
        return world.step(state.select([0, 3]).reseed([1, 2]), actions(2, 1)[:, 0])

    torch_state, numpy_state = torch.random.get_rng_state(), np.random.get_state()
    _, first = session()
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state[1])
    torch.manual_seed(123)
    np.random.seed(123)
    _, second = session()
    torch.random.set_rng_state(torch_state)
    np.random.set_state(numpy_state)
    assert same_chunk(first, second)


def test_seeds_matter_and_temperature_zero_ignores_them(world: WorldModel) -> None:
    a = actions(2, 3)
    a[1] = a[0]
    _, warm, _ = walk(world, world.initial_state([1, 2]), a)
    assert (warm[0].latent[0] - warm[0].latent[1]).abs().max() > 0.1
    cold = Sampling(temperature=0.0, tolerance=0.0)
    _, chunks, _ = walk(world, world.initial_state([1, 2]), a, cold)
    for chunk in chunks:
        assert torch.equal(chunk.frames[0], chunk.frames[1])
        assert torch.allclose(chunk.latent[0], chunk.latent[1], atol=1e-5)
        assert chunk.noise.abs().max() < 1e-4
    _, again, _ = walk(world, world.initial_state([1, 2]), a, cold)
    assert all(same_chunk(x, y) for x, y in zip(chunks, again, strict=True))


def test_reseeding_changes_the_future_and_not_the_past(world: WorldModel) -> None:
    a = actions(1, 4)
    state, _, _ = walk(world, world.initial_state([1]), a[:, :3])
    other = state.reseed([99])
    assert torch.equal(other.log_prob, state.log_prob)
    _, x = world.step(state, a[:, 3])
    _, y = world.step(other, a[:, 3])
    assert (x.noise - y.noise).abs().max() > 0.1
