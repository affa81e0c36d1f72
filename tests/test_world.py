"""The verbs of a world: exact likelihoods, an exact inverse, scores and starts."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from tests.sessions import (
    actions,
    contents,
    features,
    pictures,
    policy,
    same_chunk,
    small_world,
    unchanged,
    walk,
)
from tests.toy import BOX, toy_world
from worldmodel import native
from worldmodel.errors import InputError, WorldModelError
from worldmodel.flow.affine import standard_normal_log_prob
from worldmodel.flow.window import make_room
from worldmodel.noise import OBSERVE, SCORE, normal
from worldmodel.sampling import Sampling
from worldmodel.world import WorldModel


@pytest.fixture(scope="module")
def world() -> WorldModel:
    """Windows of 6 chunks, re-encoded to 3; 4 tokens of 3 dimensions a chunk."""
    return small_world()


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
        world.flow.deep.reserve(world._room(state, world.spec.sampling)),
        world.flow.tokens(x[:, None]),
        None,
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
        context = deep.reserve(make_room(deep, context, 3 if sampling.context == "reencode" else None))
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
        context = deep.reserve(make_room(deep, context, 3 if sampling.context == "reencode" else None))
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
    latent = world.observe(state, frames, a[:, 3])[1].latent
    score = world.score(state, frames, a[:, 3], noise=torch.zeros_like(noise))
    made, imagined = world.step(state, a[:, 3], Sampling(tolerance=0.0), noise=noise)
    assert (world.flow.tokens(latent[:, None])[:, -1] - made.noisy[:, -1]).abs().max() < 1e-4
    assert torch.allclose(score.log_prob, imagined.log_prob, rtol=1e-4)
    assert (noise - imagined.noise).abs().max() < 1e-4
    # the same noise under another action is another chunk
    _, other = world.step(state, -a[:, 3], Sampling(tolerance=0.0), noise=noise)
    assert (other.latent - imagined.latent).abs().max() > 1e-3


@pytest.mark.parametrize(
    "sampling",
    [Sampling(tolerance=0.0, guidance=2.0), Sampling(tolerance=0.0, context="rolling")],
    ids=["guided", "rolling"],
)
def test_noise_is_the_samplers_own(world: WorldModel, sampling: Sampling) -> None:
    """Under guidance or another rule of the window, noise given back or inferred makes the chunk again."""
    a = actions(2, 10)
    state, _, _ = walk(world, world.initial_state([1, 2]), a[:, :9], sampling)
    _, chunk = world.step(state, a[:, 9], sampling)
    _, again = world.step(state, a[:, 9], sampling, noise=chunk.noise)
    assert (chunk.latent - again.latent).abs().max() < 1e-4
    frames = pictures(world, 2)
    noise = world.infer_noise(state, frames, a[:, 9], sampling)
    after, real = world.observe(state, frames, a[:, 9], sampling)
    made, _ = world.step(state, a[:, 9], sampling, noise=noise)
    assert (world.flow.tokens(real.latent[:, None])[:, -1] - made.noisy[:, -1]).abs().max() < 1e-3
    assert torch.equal(real.context_frames, chunk.context_frames)
    assert (real.guided_log_prob is None) == (sampling.guidance == 0)
    plain = world.score(state, frames, a[:, 9], sampling=replace(sampling, guidance=0.0))
    score = world.score(state, frames, a[:, 9], sampling=sampling)
    assert torch.equal(score.noise, real.noise) and torch.equal(score.log_prob, plain.log_prob)
    assert torch.equal(score.noise_square, plain.noise_square)  # of the model, whoever samples
    assert (sampling.guidance == 0) == torch.equal(score.noise, plain.noise)


@policy
def test_forks_of_a_window_of_one_frame(
    tmp_path: Path, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rolled window of one frame leaves nothing that is shared."""
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr(native, "_found", lambda: None)
        for guidance in (0.0, 1.0):
            world = toy_world(tmp_path / f"{kernels}{guidance}", window=1, context=1)
            rule = replace(sampling, guidance=guidance)
            state, chunks, _ = walk(world, world.initial_state([1]), actions(1, 2), rule)
            a = np.repeat(actions(1, 2, 1), 2, axis=0)
            _, forked, _ = walk(world, state.fork(2), a, rule)
            _, alone, _ = walk(world, state, a[:1], rule)
            for mine, theirs in zip(alone, forked, strict=True):
                assert torch.allclose(mine.log_prob, theirs.log_prob[:1], rtol=1e-4)


def test_what_fails_leaves_no_trace(world: WorldModel) -> None:
    """The pages of the past too: the next step goes on in place, as if nothing had been tried."""
    a = actions(1, 4)
    state, _, _ = walk(world, world.initial_state([1]), a[:, :3])
    page = state.context.cache.cohorts[0].segments[-1].page
    before = page.claimed
    broken = copy.deepcopy(world)
    for parameter in broken.heads.parameters():
        parameter.fill_(float("nan"))
    latent = torch.full((1, *world.latent_shape), float("nan"))
    for fail in (
        lambda: world.score(state, latent, a[:, 3]),
        lambda: broken.step(state, a[:, 3]),
        lambda: broken.observe(state, pictures(world, 1), a[:, 3]),
    ):
        with pytest.raises(WorldModelError, match="not finite"):
            fail()
        assert page.claimed == before
    after, _ = world.step(state, a[:, 3])
    assert after.context.cache.cohorts[0].segments[-1].page is page


def test_noise_and_actions_of_another_kind(world: WorldModel) -> None:
    state, a = world.initial_state([1]), actions(1, 1)
    noise = torch.zeros(1, *world.latent_shape)
    assert same_chunk(
        world.step(state, a[:, 0], noise=noise.double())[1], world.step(state, a[:, 0], noise=noise)[1]
    )
    for wrong in (noise.numpy(), noise.long(), noise[0], noise + float("inf")):
        with pytest.raises(InputError, match="noise has"):
            world.step(state, a[:, 0], noise=wrong)
    with pytest.raises(InputError, match="actions of shape none, expected"):
        world.rollout(state, None)
    with pytest.raises(InputError, match="with 2 chunks at least"):
        world.observe_clip(state, pictures(world, 1)[:, None].repeat(2, 1), a)


def test_a_chunk_is_not_the_callers_array(world: WorldModel) -> None:
    frames = pictures(world, 1)
    kept = frames.copy()
    _, chunk = world.observe(world.initial_state([1]), frames, actions(1, 1)[:, 0])
    frames[:] = 0
    assert np.array_equal(chunk.frames.numpy(), kept)
    flipped = world.observe(world.initial_state([1]), kept[:, ::-1], actions(1, 1)[:, 0])[1]
    assert np.array_equal(flipped.frames.numpy(), kept[:, ::-1])


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
    if length == 2:  # scoring gave its slots back: the chunk was appended in place
        pages = [s.context.cache.cohorts[0].segments[-1].page for s in (state, after)]
        assert pages[0] is pages[1]
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


def test_score_of_a_latent_and_of_given_noise(world: WorldModel) -> None:
    """The latent spares the codec; given noise takes the place of the session's own; maps and means add up."""
    a = actions(2, 3)
    state, _, _ = walk(world, world.initial_state([1, 2]), a[:, :2])
    frames = pictures(world, 2)
    latent, _ = world.codec.encode(torch.from_numpy(frames), {})
    score = world.score(state, frames, a[:, 2], draws=3)
    same = world.score(state, latent[:, 0], a[:, 2], draws=3)
    assert torch.equal(same.log_prob, score.log_prob) and torch.equal(same.noise, score.noise)
    assert torch.allclose(score.log_prob_map.double().sum((1, 2)), -score.rate, rtol=1e-4)
    own = normal(state.seeds, state.branches, state.steps, OBSERVE, world.latent_shape)
    given = world.score(state, latent[:, 0], a[:, 2], noise=own)
    assert torch.equal(given.log_prob, world.score(state, frames, a[:, 2]).log_prob)
    assert torch.equal(given.noise, world.observe(state, frames, a[:, 2])[1].noise)
    clean = world.score(state, latent[:, 0], a[:, 2], noise=torch.zeros_like(own))
    assert (clean.log_prob != given.log_prob).all()
    for wrong in ({"noise": own[:1]}, {"noise": own, "draws": 2}):
        with pytest.raises(InputError, match="noise"):
            world.score(state, frames, a[:, 2], **wrong)


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


# ---- pixels left out -----------------------------------------------------------------------------------------
def test_without_pixels_everything_else_is_the_same(world: WorldModel) -> None:
    a = actions(2, 3)
    state, _, _ = walk(world, world.initial_state([1, 2]), a)
    after, shown = world.step(state, a[:, 0])
    blind, chunk = world.step(state, a[:, 0], decode=False)
    assert chunk.frames.shape == (2, 0, *world.frames_shape[1:]) and chunk.frames.dtype == torch.uint8
    for name in ("latent", "log_prob", "action_gain", "reward", "termination", "noise"):
        assert torch.equal(getattr(chunk, name), getattr(shown, name))
    _, next_shown = world.step(after, a[:, 1])
    _, next_blind = world.step(blind, a[:, 1])
    assert torch.equal(next_shown.frames, next_blind.frames)
    _, chunks = world.rollout(state, a, decode=False)
    assert [c.frames.shape[1] for c in chunks] == [0, 0, 0]


def test_a_codec_that_decodes_in_a_stream_skips_nothing(world: WorldModel) -> None:
    state = replace(world.initial_state([1]), codec={"feature": torch.zeros(1, 2)})
    with pytest.raises(InputError, match="every chunk must be decoded"):
        world.step(state, actions(1, 1)[:, 0], decode=False)


@policy
def test_memory_of_a_long_session_is_flat(world: WorldModel, sampling: Sampling) -> None:
    """Past the window the bytes of a state, and of the pages it holds on to, repeat; `make bench` walks far longer."""
    state, held = world.initial_state([1]), []
    for action in actions(1, 60).transpose(1, 0, 2):
        state, _ = world.step(state, action, sampling)
        pages = {
            s.page.kv.untyped_storage().data_ptr(): s.page.kv.untyped_storage().nbytes()
            for cache in state.caches().values()
            for c in cache.cohorts
            for s in c.segments
        }
        held.append((state.nbytes, sum(pages.values())))
    assert max(held[30:]) <= max(held[:30])
