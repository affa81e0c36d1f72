from __future__ import annotations

import numpy as np
import pytest
import torch

from agents import counterfactual
from worldmodel import InputError, WorldModel


def test_the_same_actions_reproduce_the_clip(world: WorldModel) -> None:
    """Abduct and replay: the flow inverts itself, so latents and nats agree within the solver's tolerance."""
    frames = world.starts["frames"][:3]
    actions = world.start_actions(np.arange(3))
    start = world.initial_state([1, 2, 3])
    result = counterfactual(world, start, frames, actions, actions)
    np.testing.assert_array_equal(result.observed, frames)
    np.testing.assert_allclose(result.log_prob_factual, result.log_prob_observed, rtol=1e-4)
    np.testing.assert_allclose(result.factual.astype(int), result.otherwise, atol=1)
    assert np.abs(result.difference.astype(int) - 128).max() <= 1
    observed = replayed = start
    for t in range(frames.shape[1]):
        observed, real = world.observe(observed, frames[:, t], actions[:, t])
        noise = torch.from_numpy(result.noise[:, t])
        replayed, chunk = world.step(replayed, actions[:, t], noise=noise)
        latent = world.flow.tokens(real.latent[:, None])
        torch.testing.assert_close(replayed.noisy[:, -1:], latent, atol=1e-4, rtol=1e-3)
        np.testing.assert_allclose(chunk.frames.numpy().astype(int), result.factual[:, t], atol=1)


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
