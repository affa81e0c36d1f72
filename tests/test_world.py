"""The verbs of a world: exact likelihoods, exact state, and inputs that are checked before anything moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from gymnasium import spaces
from torch import Tensor

from tests.toy import BOX, toy_world
from worldmodel.codec.conv import PIXEL_SCALE, ConvCodec
from worldmodel.errors import InputError, WorldModelError
from worldmodel.flow.affine import standard_normal_log_prob
from worldmodel.noise import OBSERVE, SCORE, normal
from worldmodel.sampling import Sampling
from worldmodel.state import WorldState
from worldmodel.world import Chunk, WorldModel

POLICIES = {
    "reencode": Sampling(tolerance=1e-8, context="reencode"),
    "rolling": Sampling(tolerance=1e-8, context="rolling"),
}
policy = pytest.mark.parametrize("sampling", POLICIES.values(), ids=POLICIES)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> WorldModel:
    """Windows of 6 chunks, re-encoded to 3; 4 tokens of 3 dimensions a chunk."""
    return toy_world(tmp_path_factory.mktemp("world") / "toy")


def actions(rows: int, horizon: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-2, 2, (rows, horizon, 1)).astype(np.float32)


def pictures(world: WorldModel, rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, *world.frames_shape), dtype=np.uint8)


def features(world: WorldModel, a: np.ndarray) -> Tensor:
    """Actions (B, T, 1) to features (B, T, E), written out: bounds of +-2 to +-1."""
    assert world.actions is not None
    packed = torch.from_numpy(a / 2.0).float()
    return world.actions(packed, torch.ones(packed.shape[:2], dtype=torch.bool))


def walk(
    world: WorldModel, state: WorldState, a: np.ndarray, sampling: Sampling | None = None
) -> tuple[WorldState, list[Chunk], Tensor]:
    """Step through actions (B, T, 1): the state, the chunks, and the noisy tokens (B, T, N, D)."""
    chunks, noisy = [], []
    for t in range(a.shape[1]):
        state, chunk = world.step(state, a[:, t], sampling)
        chunks.append(chunk)
        noisy.append(state.noisy[:, -1])
    return state, chunks, torch.stack(noisy, dim=1) if noisy else torch.empty(0)


def same_chunk(a: Chunk, b: Chunk) -> bool:
    """Bit for bit, every field."""
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(Chunk)]
    return all((x is None and y is None) or torch.equal(x, y) for x, y in pairs)


def contents(state: WorldState) -> list[Tensor]:
    """Every tensor of a state, with the keys and values in view, copied."""
    kept = [t.clone() for t in state._tensors().values()]
    return kept + [s.kv.clone() for c in state.context.cache.cohorts for s in c.segments]


def unchanged(before: list[Tensor], state: WorldState) -> bool:
    after = contents(state)
    return len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# ---- likelihood --------------------------------------------------------------------------------------------
def test_steps_add_up_to_the_density_of_the_clip_in_one_pass(world: WorldModel) -> None:
    a = actions(3, 6)
    state, chunks, noisy = walk(world, world.initial_state([1, 2, 3]), a)
    whole = world.flow(noisy, world.grid, None, features(world, a))
    assert torch.allclose(state.log_prob, whole.log_prob.double().sum(1), rtol=1e-4)
    assert torch.equal(state.log_prob, sum(c.log_prob for c in chunks))
    for t, chunk in enumerate(chunks):
        assert torch.allclose(chunk.log_prob, whole.log_prob[:, t].double(), rtol=1e-4, atol=1e-4)
        assert (world.flow.tokens(chunk.noise[:, None])[:, 0] - whole.z[:, t]).abs().max() < 1e-4
        assert chunk.context_frames.tolist() == [t] * 3


def test_real_and_imagined_chunks_share_one_density(world: WorldModel) -> None:
    """Observe, step, observe, step with no action: the same one pass over the same noisy tokens."""
    a = actions(2, 4)
    state, noisy = world.initial_state([4, 5]), []
    for t in range(4):
        if t % 2 == 0:
            state, chunk = world.observe(state, pictures(world, 2, t), a[:, t])
            assert chunk.sweeps.tolist() == [0, 0]
        else:
            state, chunk = world.step(state, None if t == 3 else a[:, t])
        noisy.append(state.noisy[:, -1])
    given = features(world, a)
    given[:, 3] = 0.0
    whole = world.flow(torch.stack(noisy, dim=1), world.grid, None, given)
    assert torch.allclose(state.log_prob, whole.log_prob.double().sum(1), rtol=1e-4)
    assert chunk.action_gain.tolist() == [0.0, 0.0]


def test_past_the_window_the_density_is_of_the_frames_kept(world: WorldModel) -> None:
    """Re-encoding: chunk t is conditional on the last frames in its context, as one pass over them says."""
    horizon, window, keep = 14, 6, 3
    a = actions(2, horizon)
    _, chunks, noisy = walk(world, world.initial_state([1, 2]), a)
    oldest = length = 0
    for t, chunk in enumerate(chunks):
        if length == window:
            oldest, length = t - keep, keep
        assert chunk.context_frames.tolist() == [length] * 2
        clip = slice(oldest, t + 1)
        whole = world.flow(noisy[:, clip], world.grid, None, features(world, a)[:, clip])
        assert torch.allclose(chunk.log_prob, whole.log_prob[:, -1].double(), rtol=1e-4, atol=1e-4)
        length += 1


def test_map_and_rate(world: WorldModel) -> None:
    _, chunks, _ = walk(world, world.initial_state([1, 2]), actions(2, 2))
    for chunk in chunks:
        assert chunk.log_prob_map.shape == (2, *world.latent_shape[1:])
        assert torch.allclose(chunk.log_prob_map.double().sum((1, 2)), chunk.log_prob, rtol=1e-5)
        assert torch.allclose(chunk.bits_per_dim, -chunk.log_prob / (12 * np.log(2)))


def test_the_map_is_laid_out_on_the_latent_grid(world: WorldModel) -> None:
    """A picture whose bottom right quarter alone is shocking is unlikely there."""
    state = world.initial_state([1])
    x = torch.zeros(1, *world.latent_shape)
    x[:, :, 1, 1] = 50.0
    _, chunk = world._commit(
        state,
        world._room(state.context, world.spec.sampling),
        world.flow.tokens(x[:, None]),
        None,
        torch.zeros(1, 1),
        0.0,
    )
    assert chunk.log_prob_map[0].flatten().argmin() == 3


def test_action_gain_is_the_difference_of_two_densities(world: WorldModel) -> None:
    a = actions(2, 5)
    state, chunks, noisy = walk(world, world.initial_state([1, 2]), a)
    given = features(world, a)
    for t in range(5):
        without = given.clone()
        without[:, t] = 0.0
        clip = slice(0, t + 1)
        gain = (
            world.flow(noisy[:, clip], world.grid, None, given[:, clip]).log_prob[:, t]
            - world.flow(noisy[:, clip], world.grid, None, without[:, clip]).log_prob[:, t]
        )
        assert torch.allclose(chunks[t].action_gain, gain.double(), rtol=1e-3, atol=1e-4)
    assert max(c.action_gain.abs().max() for c in chunks) > 0.01


@pytest.mark.parametrize("weight", [0.5, 3.0])
def test_guided_log_prob_is_the_density_of_the_guided_sampler(world: WorldModel, weight: float) -> None:
    """log N(noise drawn) - log|d sample / d noise|: the noise is known, sigma from the two passes."""
    guided = Sampling(guidance=weight, tolerance=0.0)
    a = actions(2, 3)
    state, _, _ = walk(world, world.initial_state([1, 2]), a[:, :2])
    noise = torch.randn(2, *world.latent_shape, generator=torch.Generator().manual_seed(0))
    after, chunk = world.step(state, a[:, 2], guided, noise=noise)
    noisy, given = after.noisy[:, -3:], features(world, a)
    without = given.clone()
    without[:, 2] = 0.0
    u, shallow = world.flow.shallow_forward(noisy, world.grid)
    sigma_c, sigma_u = (
        world.flow.deep.clip_parameters(u, world.grid, None, f).sigma[:, -1] for f in (given, without)
    )
    s = torch.minimum(sigma_c / sigma_u, torch.ones(())).square()
    sigma = sigma_c / (1 + weight - weight * s).sqrt()
    z = world.flow.tokens(noise[:, None])[:, 0]
    expected = (standard_normal_log_prob(z) - sigma.log() + shallow[:, -1]).sum((1, 2)).double()
    assert chunk.guided_log_prob is not None
    assert torch.allclose(chunk.guided_log_prob, expected, rtol=1e-4, atol=1e-3)
    assert (chunk.guided_log_prob - chunk.log_prob).abs().min() > 1e-3
    whole = world.flow(noisy, world.grid, None, given).log_prob[:, -1].double()
    assert torch.allclose(chunk.log_prob, whole, rtol=1e-4, atol=1e-4)
    _, plain = world.step(state, a[:, 2])
    assert plain.guided_log_prob is None


# ---- the solver inside a session ---------------------------------------------------------------------------
def exactly(world: WorldModel, a: np.ndarray, noise: list[Tensor], sampling: Sampling) -> Tensor:
    """The same session token by token: noisy tokens (B, T, N, D)."""
    deep, given = world.flow.deep, features(world, a)
    context = deep.start(len(a), world.grid, 6, features=8)
    u = []
    for t in range(a.shape[1]):
        context = deep.reserve(deep.make_room(context, 3 if sampling.context == "reencode" else None))
        w = world.flow.tokens(noise[t][:, None])[:, 0]
        u.append(deep.solve(context, w, given[:, t : t + 1], 0.0, 0.0, exact=True).v[:, None])
        context, _ = deep.commit(context, u[-1], given[:, t : t + 1])
    return world.flow.shallow_inverse(torch.cat(u, dim=1), world.grid, 0.0, exact=True)[0]


@policy
@pytest.mark.parametrize("tolerance", [1e-10, 1e-8, 1e-4])
def test_twenty_steps_equal_the_token_by_token_inverse(
    world: WorldModel, sampling: Sampling, tolerance: float
) -> None:
    """At the solver's tolerance (relative mean square), and no worse at the end than at the beginning."""
    a, horizon = actions(2, 20), 20
    rng = torch.Generator().manual_seed(3)
    noise = [torch.randn(2, *world.latent_shape, generator=rng) for _ in range(horizon)]
    state, noisy = world.initial_state([1, 2]), []
    for t in range(horizon):
        state, chunk = world.step(state, a[:, t], replace(sampling, tolerance=tolerance), noise=noise[t])
        noisy.append(state.noisy[:, -1])
        solved = (chunk.residual < tolerance) | (chunk.sweeps == 4)
        assert solved.all() and (chunk.sweeps >= 1).all() and (chunk.sweeps <= 4).all()
    exact = exactly(world, a, noise, sampling)
    error = (torch.stack(noisy, dim=1) - exact).square().mean((0, 2, 3)) / exact.square().mean((0, 2, 3))
    assert error.max() < max(10 * tolerance, 1e-10)
    assert error[10:].max() <= 10 * error[:10].max().clamp_min(1e-13)
    if sampling.context == "reencode":
        features_ = features(world, a)
        tokens = world.flow.tokens(torch.stack(noise, dim=1))
        sampled = world.flow.sample(tokens, world.grid, features=features_, exact=True)
        assert (sampled - exact).abs().max() < 1e-5


@policy
def test_the_state_after_a_step_is_that_of_the_tokens_accepted(world: WorldModel, sampling: Sampling) -> None:
    """A coarse solver leaves a coarse chunk, but the keys, values and likelihood are exact for that chunk."""
    coarse = replace(sampling, tolerance=0.5)
    a = actions(1, 9)
    state, deep = world.initial_state([1]), world.flow.deep
    given, noisy = features(world, a), []
    for t in range(9):
        state, _ = world.step(state, a[:, t], coarse)
        noisy.append(state.noisy[:, -1])
    context = deep.start(1, world.grid, 6, features=8)
    for t in range(9):
        context = deep.reserve(deep.make_room(context, 3 if sampling.context == "reencode" else None))
        u, _ = world.flow.shallow_forward(noisy[t][:, None], world.grid)
        context, _ = deep.commit(context, u, given[:, t : t + 1])
    mine, theirs = (
        torch.cat([s.kv for s in c.cache.cohorts[0].segments], dim=-2) for c in (state.context, context)
    )
    assert mine.shape == theirs.shape and (mine - theirs).abs().max() < 1e-4


def test_inferred_noise_reproduces_the_chunk(world: WorldModel) -> None:
    a = actions(2, 4)
    state, _, _ = walk(world, world.initial_state([1, 2]), a[:, :3])
    frames = pictures(world, 2)
    noise = world.infer_noise(state, frames, a[:, 3])
    seen, chunk = world.observe(state, frames, a[:, 3])
    made, imagined = world.step(state, a[:, 3], Sampling(tolerance=0.0), noise=noise)
    assert (seen.noisy[:, -1] - made.noisy[:, -1]).abs().max() < 1e-4
    assert torch.allclose(chunk.log_prob, imagined.log_prob, rtol=1e-4)
    assert (noise - imagined.noise).abs().max() < 1e-4
    # the same noise under another action is another chunk
    _, other = world.step(state, -a[:, 3], Sampling(tolerance=0.0), noise=noise)
    assert (other.latent - imagined.latent).abs().max() > 1e-3


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


def near_tie(world: WorldModel, latent: Tensor) -> Tensor:
    """(B, F, height, width, 3) bool: before rounding, the pixel is within 1e-3 of half a level."""
    assert isinstance(world.codec, ConvCodec)
    output = rearrange(world.codec.decoder(latent), "b (f c) height width -> b f c height width", c=3)
    pixels = output * PIXEL_SCALE + world.codec.background
    return rearrange((pixels.frac().abs() - 0.5).abs() < 1e-3, "b f c height width -> b f height width c")


def close(world: WorldModel, a: Chunk, b: Chunk) -> None:
    """Across batch shapes: uint8 frames equal (but for ties of rounding), everything else to 1e-4."""
    differs = a.frames != b.frames
    assert not (differs & ~near_tie(world, a.latent)).any()
    assert differs.sum() <= 2 and ((a.frames.int() - b.frames.int()).abs() <= 1).all()
    for name in ("log_prob", "action_gain", "reward", "termination", "latent", "noise", "log_prob_map"):
        assert torch.allclose(getattr(a, name), getattr(b, name), rtol=1e-4, atol=1e-4), name
    assert torch.equal(a.sweeps, b.sweeps) and torch.equal(a.context_frames, b.context_frames)


def row(chunk: Chunk, i: int) -> Chunk:
    values = {f.name: getattr(chunk, f.name) for f in fields(Chunk)}
    return Chunk(**{k: None if v is None else v[i : i + 1] for k, v in values.items()})


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


# ---- score -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("length", [0, 2, 6, 8])
def test_score_is_observe_without_the_consequences(world: WorldModel, length: int) -> None:
    a = actions(2, length + 2)
    state, _, _ = walk(world, world.initial_state([1, 2]), a[:, :length])
    before, frames = contents(state), pictures(world, 2)
    score = world.score(state, frames, a[:, length])
    many = world.score(state, frames, a[:, length], draws=5)
    assert unchanged(before, state)
    after, chunk = world.observe(state, frames, a[:, length])
    assert torch.equal(score.log_prob, chunk.log_prob) and torch.equal(score.rate, -chunk.log_prob)
    assert torch.allclose(score.bits_per_dim, chunk.bits_per_dim)
    assert torch.equal(score.action_gain, chunk.action_gain)
    assert torch.allclose(score.noise_square, chunk.noise.double().square().mean((1, 2, 3)))
    assert (many.log_prob >= -many.rate - 1e-9).all()  # log-mean-exp is at least the mean
    assert (many.log_prob != score.log_prob).all()
    assert torch.equal(after.log_prob, state.log_prob + chunk.log_prob)
    # a session that was never scored goes the same way, bit for bit
    fresh, _, _ = walk(world, world.initial_state([1, 2]), a[:, :length])
    fresh, _ = world.observe(fresh, frames, a[:, length])
    _, mine = world.step(after, a[:, -1])
    _, theirs = world.step(fresh, a[:, -1])
    assert same_chunk(mine, theirs)


def test_score_averages_over_its_draws(world: WorldModel) -> None:
    """Each draw recomputed by hand from its own noise."""
    a = actions(1, 3)
    state, _, noisy = walk(world, world.initial_state([1]), a[:, :2])
    frames = pictures(world, 1)
    latent, _ = world.codec.encode(torch.from_numpy(frames), {})
    values = []
    for draw in range(4):
        key = (state.seeds, state.branches, state.steps, SCORE if draw else OBSERVE)
        x = latent[:, 0] + 0.3 * normal(*key, world.latent_shape, draw)
        clip = torch.cat((noisy, world.flow.tokens(x[:, None])), dim=1)
        values.append(world.flow(clip, world.grid, None, features(world, a)).log_prob[:, -1].double())
    stacked = torch.stack(values)
    score = world.score(state, frames, a[:, 2], draws=4)
    assert torch.allclose(score.log_prob, stacked.exp().mean(0).log(), rtol=1e-4)
    assert torch.allclose(score.rate, -stacked.mean(0), rtol=1e-4)
    with pytest.raises(InputError, match="draws is 0"):
        world.score(state, frames, a[:, 2], draws=0)


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


# ---- starts and rollouts -----------------------------------------------------------------------------------
def test_reset_begins_with_real_clips(world: WorldModel) -> None:
    state, chunks = world.reset([5, 6], starts=[2, 4])
    assert len(chunks) == 2 and state.steps.tolist() == [2, 2]
    assert np.array_equal(chunks[1].frames.numpy(), world.starts["frames"][[2, 4], 1])
    _, again = world.reset([5, 6])
    _, once = world.reset([6])
    assert np.array_equal(again[0].frames[1].numpy(), once[0].frames[0].numpy())
    picked = {world.reset([s])[1][0].frames.numpy().tobytes() for s in range(60)}
    assert len(picked) == 5
    for starts in ([0], [0, 5], [-1, 0]):
        with pytest.raises(InputError, match="indices into a bank of 5"):
            world.reset([5, 6], starts=starts)


def test_rollout_is_repeated_steps(world: WorldModel) -> None:
    a = actions(2, 4)
    state = world.initial_state([1, 2])
    end, chunks = world.rollout(state, a)
    stepped, expected, _ = walk(world, state, a)
    assert all(same_chunk(x, y) for x, y in zip(chunks, expected, strict=True))
    assert torch.equal(end.log_prob, stepped.log_prob)


SPACES = {
    "discrete": spaces.Discrete(3),
    "multidiscrete": spaces.MultiDiscrete([3, 2]),
    "dict": spaces.Dict({"move": spaces.Discrete(3), "force": BOX}),
}


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_worlds_of_every_action_space(space: spaces.Space[Any], tmp_path: Path) -> None:
    made = toy_world(tmp_path / "w", space)
    space.seed(1)
    sampled = [[space.sample() for _ in range(3)] for _ in range(2)]
    if isinstance(space, spaces.Dict):
        batch: Any = {k: np.array([[s[k] for s in clip] for clip in sampled]) for k in space}
    else:
        batch = np.array(sampled)
    state, _ = made.reset([1, 2])
    state, chunks = made.rollout(state, batch)
    assert len(chunks) == 3 and state.steps.tolist() == [5, 5]
    assert all(c.action_gain.abs().max() > 0 for c in chunks)
    before = contents(state)
    with pytest.raises(InputError):
        made.step(state, np.zeros((2, 7)))
    assert unchanged(before, state)


# ---- bad input ---------------------------------------------------------------------------------------------
BAD_ACTIONS: dict[str, Any] = {
    "not batched": np.zeros(1, np.float32),
    "one row too few": np.zeros((1, 1), np.float32),
    "too wide": np.zeros((2, 2), np.float32),
    "NaN": np.array([[0.0], [np.nan]], np.float32),
    "out of range": np.array([[0.0], [2.5]], np.float32),
    "text": "left",
    "a dict": {"torque": 0.0},
}
BAD_FRAMES: dict[str, Callable[[np.ndarray], Any]] = {
    "one row too few": lambda f: f[:1],
    "one frame too few": lambda f: f[:, :3],
    "another size": lambda f: f[:, :, :16],
    "channels first": lambda f: np.moveaxis(f, -1, 2),
    "float32": lambda f: f.astype(np.float32) / 255,
    "int64": lambda f: f.astype(np.int64),
    "one clip": lambda f: f[0],
    "grey": lambda f: f[..., :1],
    "text": lambda f: "frames",
    "None": lambda f: None,
    "ragged": lambda f: [[1], [1, 2]],
}


@pytest.fixture
def session(world: WorldModel) -> WorldState:
    return walk(world, world.initial_state([1, 2]), actions(2, 4))[0]


def refused(world: WorldModel, state: WorldState, call: Callable[[], Any], kind: type = InputError) -> None:
    """One line of the package's own class; the state is what it was, and goes on bit for bit."""
    before = contents(state)
    with pytest.raises(kind) as error:
        call()
    assert isinstance(error.value, WorldModelError)
    assert str(error.value) and "\n" not in str(error.value)
    assert unchanged(before, state)
    fresh, _, _ = walk(world, world.initial_state([1, 2]), actions(2, 4))
    a = actions(2, 3, seed=5)
    _, mine, _ = walk(world, state, a)
    _, theirs, _ = walk(world, fresh, a)
    assert all(same_chunk(x, y) for x, y in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("action", BAD_ACTIONS.values(), ids=BAD_ACTIONS)
def test_bad_actions(world: WorldModel, session: WorldState, action: Any) -> None:
    refused(world, session, lambda: world.step(session, action))
    with pytest.raises(InputError):
        world.observe(session, pictures(world, 2), action)
    with pytest.raises(InputError):
        world.score(session, pictures(world, 2), action)


@pytest.mark.parametrize("spoil", BAD_FRAMES.values(), ids=BAD_FRAMES)
def test_bad_frames(world: WorldModel, session: WorldState, spoil: Callable[[np.ndarray], Any]) -> None:
    frames, a = spoil(pictures(world, 2)), actions(2, 1)[:, 0]
    refused(world, session, lambda: world.observe(session, frames, a))
    with pytest.raises(InputError):
        world.score(session, frames, a)
    with pytest.raises(InputError):
        world.infer_noise(session, frames, a)


def test_bad_noise(world: WorldModel, session: WorldState) -> None:
    good, a = torch.zeros(2, *world.latent_shape), actions(2, 1)[:, 0]
    bad = good.clone()
    bad[1, 0, 0, 0] = float("nan")
    for noise in (good[:1], good[:, :1], bad):
        refused(world, session, lambda noise=noise: world.step(session, a, noise=noise))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("guidance", -1.0),
        ("guidance", float("nan")),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("tolerance", -1e-9),
        ("context", "forget"),
    ],
)
def test_bad_sampling(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=field):
        Sampling(**{field: value})


def test_a_likelihood_that_is_not_finite_is_an_error(world: WorldModel, session: WorldState) -> None:
    """Noise that is finite but absurd overflows: nothing is committed."""
    noise = torch.full((2, *world.latent_shape), 1e30)
    a = actions(2, 1)[:, 0]
    refused(world, session, lambda: world.step(session, a, noise=noise), WorldModelError)


def test_a_world_without_actions_takes_none(world: WorldModel) -> None:
    silent = WorldModel(world.spec, world.flow, world.codec, None, world.heads, world.starts)
    with pytest.raises(InputError, match="takes no actions"):
        silent.step(silent.initial_state([1]), np.zeros((1, 1)))
