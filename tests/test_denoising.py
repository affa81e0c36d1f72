"""Denoising by the flow's own score: where the answer is known, and against finite differences of the exact density."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.sessions import actions, walk
from tests.toy import BOX, TEXT, TOLD, toy_flow, toy_world, write_picture_toy
from worldmodel.denoising import by_score, clean_frame
from worldmodel.errors import ConfigError
from worldmodel.flow.affine import Affine, guide
from worldmodel.flow.flow import Flow
from worldmodel.packed import pack
from worldmodel.parallel import spread
from worldmodel.sampling import Sampling
from worldmodel.state import WorldState
from worldmodel.training.flow import FlowTraining
from worldmodel.training.parallel import Ranks
from worldmodel.world import WorldModel

PROMPTS = ("a red corgi", "the cat sleeps")


def test_a_flow_without_denoiser_layers_has_no_denoiser() -> None:
    flow = toy_flow(denoiser_layers=0)
    assert flow.denoiser is None and flow.denoiser_reach == 1
    assert not [k for k in flow.state_dict() if "denoiser" in k]


def gaussian(flow: Flow) -> None:
    """Make the density of ``flow`` a Gaussian whose mean and deviations the prompt alone decides."""
    with torch.no_grad():
        for block in flow.shallow:
            block.transformer.proj_out.weight.zero_()
            block.transformer.proj_out.bias.zero_()
        flow.deep.transformer.proj_in.weight.zero_()
    pack(flow)


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_of_a_gaussian_it_is_the_posterior_mean(tmp_path: Path, guidance: float) -> None:
    """Clean data N(m, s^2 - n^2) under a prompt, noise N(0, n^2): E[x | x~] = m + (1 - n^2 / s^2) (x~ - m). With guidance
    x~ comes from another Gaussian, and the data under the prompt is the same.
    """
    pytest.importorskip("diffusers")
    world = WorldModel.load(write_picture_toy(tmp_path / "world"))
    gaussian(world.flow)
    state = world.initial_state([3, 4], PROMPTS)
    after, chunk = world.step(state, None, Sampling(guidance=guidance, tolerance=0.0))

    def density(captions: tuple[str, ...]) -> Affine:
        assert world.prompts is not None
        text = world.prompts(captions)
        first, other = (
            world.flow.deep.clip_parameters(u, world.grid, text, None)
            for u in (after.context.u, torch.randn_like(after.context.u))
        )
        assert torch.equal(first.mu, other.mu)  # it is a Gaussian
        return first

    conditional = density(PROMPTS)
    sampler = conditional if guidance == 0 else guide(conditional, density(("", "")), guidance)
    noisy, noise = after.noisy, world.flow.config.noise_std
    if guidance:
        assert chunk.guided_log_prob is not None and (sampler.mu - conditional.mu).abs().max() > 0.05
        assert not torch.allclose(
            by_hand(noisy, sampler, noise), by_hand(noisy, conditional, noise), atol=1e-2
        )
    clean = world.flow.tokens(chunk.latent[:, None])
    assert (clean - noisy).abs().max() > 0.05
    torch.testing.assert_close(clean, by_hand(noisy, conditional, noise), rtol=0, atol=1e-5)


def by_hand(noisy: Tensor, density: Affine, noise: float) -> Tensor:
    return density.mu + (1 - (noise / density.sigma).square()) * (noisy - density.mu)


def finite_differences(flow: Flow, grid: tuple[int, int], x: Tensor, features: Tensor | None) -> Tensor:
    """The gradient of the last frame's log-density with regard to that frame, by central differences in float64."""
    exact, step = copy.deepcopy(flow).double(), 1e-5
    moves = step * torch.eye(x[0, -1].numel(), dtype=torch.float64).reshape(-1, *x.shape[2:])
    clips = x.double().repeat(2 * len(moves), 1, 1, 1)
    clips[:, -1] += torch.cat((moves, -moves))
    told = None if features is None else features.double().repeat(len(clips), 1, 1)
    up, down = exact(clips, grid, None, told).log_prob[:, -1].chunk(2)
    return ((up - down) / (2 * step)).reshape(x.shape[2:])


def test_it_is_the_gradient_of_the_exact_density_given_past_and_actions(tmp_path: Path) -> None:
    world = toy_world(tmp_path / "world", BOX, denoiser_layers=0)
    state, _, x = walk(world, world.initial_state([5]), actions(1, 3))
    score = finite_differences(world.flow, world.grid, x, state.context.features[:, -3:])
    sigma = world.flow.config.noise_std
    clean = world.flow.tokens(state.latent[:, None])[0, 0]
    assert score.abs().max() > 0.5
    torch.testing.assert_close(clean.double(), x[0, -1] + sigma**2 * score, rtol=0, atol=1e-5)
    alone = finite_differences(world.flow, world.grid, x[:, -1:], None)
    assert (alone - score).abs().max() > 1e-3  # the past counts


def test_after_a_restart_of_the_window_the_past_is_what_is_left_of_it(tmp_path: Path) -> None:
    world = toy_world(tmp_path / "world", BOX, denoiser_layers=0)
    steps = world.flow.config.window + 1
    state, _, x = walk(world, world.initial_state([5]), actions(1, steps))
    count = state.context.frames[0]
    assert count == world.flow.config.context + 1 < steps
    features = state.context.features[:, -count:]
    score = finite_differences(world.flow, world.grid, x[:, -count:], features)
    clean = world.flow.tokens(state.latent[:, None])[0, 0]
    expected = x[0, -1] + world.flow.config.noise_std**2 * score
    torch.testing.assert_close(clean.double(), expected, rtol=0, atol=1e-5)


def test_sessions_of_unlike_lengths_are_denoised_as_if_alone(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    world = toy_world(tmp_path / "world", TEXT, denoiser_layers=0)
    first, _ = world.step(world.initial_state([1], PROMPTS[:1]))
    second, _ = world.step(world.step(world.initial_state([2], PROMPTS[1:]))[0])
    together, _ = clean_frame(world.flow, world.grid, WorldState.concat((second, first, second)))
    for row, state in zip(together, (second, first, second), strict=True):
        alone = by_score(world.flow, world.grid, state)
        assert torch.equal(row[None], alone)
        torch.testing.assert_close(world.flow.tokens(state.latent[:, None]), alone, rtol=0, atol=1e-6)


def test_it_leaves_no_trace(tmp_path: Path) -> None:
    """The weights stay frozen, nothing given back can be differentiated, and a replay is the same to the bit."""
    pytest.importorskip("transformers")
    world = toy_world(tmp_path / "world", TOLD, denoiser_layers=0)
    begin = world.initial_state([1, 2], PROMPTS)
    told = {"prompt": np.array(PROMPTS), "action": np.ones((2, 1), np.float32)}
    after, chunk = world.step(begin, told)
    again, repeated = world.step(begin, told)
    assert torch.equal(chunk.latent, repeated.latent) and torch.equal(chunk.frames, repeated.frames)
    assert not any(p.requires_grad or p.grad is not None for p in world.flow.parameters())
    tensors = (chunk.latent, chunk.log_prob, after.noisy, after.latent, after.context.u, again.context.u)
    assert not any(t.requires_grad for t in tensors)


def test_whatever_mode_others_are_in(tmp_path: Path) -> None:
    """In inference mode it differentiates all the same; and threads at once leave torch's settings alone."""
    world = toy_world(tmp_path / "world", BOX, denoiser_layers=0)
    state = world.initial_state([1, 2])
    plain = world.step(state, np.ones((2, 1), np.float32))[1]
    with torch.inference_mode():
        after, chunk = world.step(state, np.ones((2, 1), np.float32))
        again = world.step(after, np.ones((2, 1), np.float32))[1]
    assert torch.equal(chunk.latent, plain.latent)
    assert torch.equal(world.step(after, np.ones((2, 1), np.float32))[1].latent, again.latent)
    settings = torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.mem_efficient_sdp_enabled
    before = [enabled() for enabled in settings]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: world.step(state, np.ones((2, 1), np.float32)), range(16)))
    assert [enabled() for enabled in settings] == before


@pytest.mark.parametrize("window", [1, 2, 4])
def test_what_is_kept_knows_no_more_than_the_state(tmp_path: Path, window: int) -> None:
    """A window shorter than the denoiser's reach: saved, or beside a session that keeps nothing, frames are the same."""
    world = toy_world(tmp_path / "world", BOX, window=window, context=1, denoiser_layers=3, denoiser_window=2)
    push = np.ones((1, 1), np.float32)
    state, _ = world.reset([1])
    for _ in range(5):
        state, _ = world.step(state, push)
    world.save_state(state, tmp_path / "state.safetensors")
    other, _ = world.reset([2])
    chunk = world.step(state, push)[1]
    loaded = world.step(world.load_state(tmp_path / "state.safetensors"), push)[1]
    beside = world.step(WorldState.concat([state, other]), push.repeat(2, 0))[1]
    for same in (loaded.latent, beside.latent[:1]):
        torch.testing.assert_close(same, chunk.latent, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_near(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    full = WorldModel.load(write_picture_toy(tmp_path / "full"))
    half = WorldModel.load(write_picture_toy(tmp_path / "half", dtype="bfloat16"))
    state, _ = full.step(full.initial_state([0], PROMPTS[:1]))
    exact, rough = (by_score(w.flow, w.grid, state) for w in (full, half))
    assert rough.dtype == torch.float32
    assert (exact - rough).abs().max() < 0.02 < (exact - state.noisy).abs().max()


def test_what_needs_a_denoiser_or_all_heads_is_refused(tmp_path: Path) -> None:
    world = toy_world(tmp_path / "world", BOX, denoiser_layers=0)
    with pytest.raises(ConfigError, match="needs all heads in one process; start 1 of them"):
        spread(world, Ranks(size=2), guided=False)
    with pytest.raises(ConfigError, match="needs all heads in one process; start 2 of them"):
        spread(world, Ranks(size=4), guided=True)
    with pytest.raises(ConfigError, match="denoiser_layers is 0, expected at least 1"):
        FlowTraining(world.flow.config, length=4)
