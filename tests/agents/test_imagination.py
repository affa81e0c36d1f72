from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces

pytest.importorskip("stable_baselines3")
from stable_baselines3.common.vec_env import VecCheckNan

from agents.evaluation.trial import Progress, TrialConfig
from agents.imagination import (
    ImaginedVecEnv,
    Observer,
    PolicyAgent,
    chunks_learned,
    evaluate_imagination,
    policy_space,
    to_world,
    train_policy,
)
from tests.toy import BOX
from worldmodel import InputError, WorldModel
from worldmodel.files import config_to_dict, load_tensors
from worldmodel.training.collect import CollectConfig, PolicyShare


def test_slots_are_the_vector_environments(world: WorldModel) -> None:
    """Latents standardised, rewards scaled, the last latent of an episode kept for the critic."""
    env = ImaginedVecEnv(world, slots=3, horizon=2, seed=7)
    env.batch.options = replace(env.batch.options, termination_threshold=2.0)  # a toy ends at random
    checked = VecCheckNan(env, raise_exception=True)
    seen = checked.reset()
    assert env.observation_space.contains(seen[0])
    latents = env.batch.last_chunk.latent.numpy()
    np.testing.assert_allclose(seen, env.observer(latents))
    actions = np.array([[-1.0], [0.0], [1.0]], np.float32)
    _, rewards, done, infos = checked.step(actions)
    raw = env.batch.last_chunk.reward.numpy()
    np.testing.assert_allclose(rewards, np.clip(raw / env.reward_scale, -10, 10), rtol=1e-5)
    assert not done.any()
    seen, _, done, infos = checked.step(actions)
    assert done.all()
    for row in range(3):
        assert infos[row]["TimeLimit.truncated"]
        assert not np.array_equal(infos[row]["terminal_observation"], seen[row])
    assert env.get_attr("num_envs", [0, 2]) == [3, 3]


def test_actions_of_a_policy_fill_the_range() -> None:
    space = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 10.0], np.float32))
    assert policy_space(space) == spaces.Box(-1.0, 1.0, (2,), np.float32)
    got = to_world(space, np.array([[-1.0, -1.0], [0.0, 0.5], [9.0, 1.0]], np.float32))
    np.testing.assert_allclose(got, [[-2.0, 0.0], [0.0, 7.5], [2.0, 10.0]])
    assert got.dtype == np.float32
    steps = spaces.Box(-2, 2, (1,), np.int64)
    got = to_world(steps, np.array([[-0.9], [-0.2], [0.2], [0.9]], np.float32))
    np.testing.assert_array_equal(got, [[-2], [0], [0], [2]])
    for refused in (spaces.Box(-np.inf, np.inf, (1,)), spaces.Dict({"push": BOX})):
        with pytest.raises(InputError, match="a policy cannot act in"):
            policy_space(refused)


def test_a_policy_makes_every_choice() -> None:
    """It counts from 0, whatever the world's own choices are numbered from."""
    for space in (
        spaces.Discrete(3, start=1),
        spaces.MultiDiscrete([2, 3], start=[1, -1]),
        spaces.MultiDiscrete([[2, 3], [4, 2]]),
    ):
        own = policy_space(space)
        assert isinstance(own, spaces.Discrete | spaces.MultiDiscrete) and not np.any(own.start)
        own.seed(0)
        drawn = to_world(space, np.array([own.sample() for _ in range(100)]))
        assert all(space.contains(action) for action in drawn)
        flat = drawn.reshape(100, -1)
        assert [len(np.unique(column)) for column in flat.T] == np.ravel(getattr(space, "nvec", 3)).tolist()


def test_a_policy_learns_to_choose(discrete: WorldModel, tmp_path: Path) -> None:
    policy = train_policy(discrete, 10_000, tmp_path / "policy.safetensors", minutes=1e-6)
    action = PolicyAgent(discrete, policy).act(discrete.starts["frames"][0, 0])
    assert discrete.spec.action_space.contains(action)


def test_the_observer_standardises_real_clips(world: WorldModel) -> None:
    observer = Observer(world)
    frames = world.starts["frames"]
    _, chunks = world.observe_clip(
        world.initial_state(list(range(len(frames)))), frames, world.start_actions(np.arange(len(frames)))
    )
    seen = np.concatenate([observer(c.latent.numpy()) for c in chunks])
    np.testing.assert_allclose(seen.mean(0), 0.0, atol=1e-4)
    assert (seen.std(0) <= 1.1).all()


def test_a_policy_that_is_trained_on_meets_other_episodes(
    world: WorldModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[np.ndarray] = []
    reset = ImaginedVecEnv.reset

    def noted(env: ImaginedVecEnv) -> np.ndarray:
        begun.append(reset(env))
        return begun[-1]

    monkeypatch.setattr(ImaginedVecEnv, "reset", noted)
    for chunks in (1024, 2048):
        train_policy(world, chunks, tmp_path / "policy.safetensors")
    assert len(begun) == 2 and not np.array_equal(*begun)


def test_a_policy_is_kept_and_trained_on(world: WorldModel, tmp_path: Path) -> None:
    """Stopped after an update it continues; in reality it acts on the codec's latents."""
    path = tmp_path / "policy.safetensors"
    assert chunks_learned(world, path) == 0
    policy = train_policy(world, 1024, path)
    assert chunks_learned(world, path) == 1024
    before = load_tensors(path)
    again = train_policy(world, 1024, path)
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    agent = PolicyAgent(world, policy)
    agent.reset()
    clip = world.starts["frames"][0]
    actions = [agent.act(frames) for frames in clip]
    assert all(BOX.contains(a) for a in actions)
    agent.reset()
    np.testing.assert_array_equal(agent.act(clip[0]), actions[0])


def test_a_policy_of_another_length_is_not_judged(world: WorldModel, tmp_path: Path) -> None:
    """PPO learns 1024 chunks at a time, which is what the figures say."""
    pytest.importorskip("pygame")
    own = copy.copy(world)
    made = CollectConfig("Pendulum-v1", frame_size=(32, 32), policies=(PolicyShare("random"),))
    own.spec = replace(world.spec, environment=config_to_dict(made))
    config = TrialConfig(starts=1, chunks=1, policy_chunks=1025, bootstrap=2)
    for asked, learned in ((1025, 2048), (1, 1024)):
        progress = Progress(tmp_path / f"{asked}.json", {})
        numbers = evaluate_imagination(own, replace(config, policy_chunks=asked), progress)
        assert numbers["imagined_chunks"] == learned
    assert chunks_learned(own, tmp_path / "policy-1.safetensors") == 1024


def test_learning_stops_in_time(world: WorldModel, tmp_path: Path) -> None:
    train_policy(world, 10_000, tmp_path / "policy.safetensors", minutes=1e-6)
    assert 0 < chunks_learned(world, tmp_path / "policy.safetensors") < 1024
