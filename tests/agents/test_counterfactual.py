from __future__ import annotations

import numpy as np
import pytest
import torch

from agents import counterfactual
from worldmodel import InputError, WorldModel


def rendered(world: WorldModel, state, frames: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Frames (B, T, F, ...) of what was observed, through noise, denoiser and codec, but not through the flow."""
    shown = []
    for t in range(frames.shape[1]):
        codec = state.codec
        state, _ = world.observe(state, frames[:, t], actions[:, t])
        reach = min(int(state.steps.max()), state.noisy.shape[1])
        context = state.context
        clean = world.flow.denoise(
            state.noisy[:, -reach:], world.grid, None, context.features[:, -reach:], None
        )[:, -1:]
        shown.append(world.codec.decode(world.flow.latents(clean, world.grid), codec)[0].numpy())
    return np.stack(shown, axis=1)


def test_the_same_actions_reproduce_the_clip(world: WorldModel) -> None:
    """Abduct and replay: the flow inverts itself, so frames agree within a grey level and nats within the tolerance."""
    frames = world.starts["frames"][:3]
    actions = world.start_actions(np.arange(3))
    start = world.initial_state([1, 2, 3])
    result = counterfactual(world, start, frames, actions, actions)
    truth = rendered(world, start, frames, actions)
    for clip in (result.factual, result.otherwise):
        assert np.abs(clip.astype(int) - truth).max() <= 1
    np.testing.assert_allclose(result.log_prob_factual, result.log_prob_observed, rtol=1e-4)
    assert np.abs(result.difference.astype(int) - 128).max() <= 1
    np.testing.assert_array_equal(result.observed, frames)


def test_other_actions_change_it(world: WorldModel) -> None:
    frames = world.starts["frames"][:2]
    actions = world.start_actions(np.arange(2))
    start = world.initial_state([1, 2])
    result = counterfactual(world, start, frames, actions, np.stack((actions[0], -actions[1])))
    np.testing.assert_allclose(result.factual[0].astype(int), result.otherwise[0], atol=1)
    assert not np.array_equal(result.factual[1], result.otherwise[1])
    assert np.abs(result.log_prob_factual[1] - result.log_prob_otherwise[1]).min() > 1e-3
    assert result.difference.shape == (2, 8, 32, 32, 3)
    assert result.video(1).shape == (8, 32, 96, 3)
    assert result.reward_otherwise.shape == (2, 2)


def test_one_chunk_is_a_step_with_the_abducted_noise(world: WorldModel) -> None:
    """One chunk: the other one is a step with the other action and the abducted noise."""
    state, _ = world.reset([5])
    action = np.array([[0.7]], np.float32)
    frames = world.starts["frames"][2:3, :1]
    result = counterfactual(world, state, frames, action[:, None], -action[:, None])
    after, chunk = world.step(state, -action, noise=torch.from_numpy(result.noise[:, 0]))
    np.testing.assert_allclose(result.otherwise[:, 0].astype(int), chunk.frames.numpy(), atol=1)
    np.testing.assert_allclose(result.log_prob_otherwise[:, 0], chunk.log_prob.numpy(), rtol=1e-5)


def test_wrong_shapes(world: WorldModel) -> None:
    frames, actions = world.starts["frames"][:2], world.start_actions(np.arange(2))
    state = world.initial_state([0, 1])
    with pytest.raises(InputError, match=r"expected \(2, T, 4, 32, 32, 3\)"):
        counterfactual(world, state, frames[:1], actions[:1], actions[:1])
    with pytest.raises(InputError, match="otherwise have shape"):
        counterfactual(world, state, frames, actions, actions[:, :1])
    with pytest.raises(InputError, match="outside"):
        counterfactual(world, state, frames, actions, actions + 10)
