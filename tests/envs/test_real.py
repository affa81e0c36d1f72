"""Real environments by chunks."""

from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env

import envs
from envs.recorder import RecordChunks
from tests.toy import write_toy
from worldmodel import InputError

pytest.importorskip("pygame")


def pendulum(**options: object) -> envs.ChunkedEnv:
    return envs.ChunkedEnv("Pendulum-v1", frame_size=(32, 32), hide=("last_u",), **options)


def test_spaces_are_those_of_the_world(tmp_path: Path) -> None:
    real, imagined = pendulum(), envs.WorldModelEnv(write_toy(tmp_path / "toy"))
    assert real.observation_space == imagined.observation_space
    assert real.action_space == imagined.action_space


def test_a_chunk_is_four_steps_of_one_action() -> None:
    real, bare = pendulum(), gymnasium.make("Pendulum-v1")
    first, info = real.reset(seed=3)
    observation, _ = bare.reset(seed=3)
    assert (first == first[0]).all()
    np.testing.assert_array_equal(info["observation"], observation)
    for value in (2.0, -1.0, 0.5):
        action = np.array([value], dtype=np.float32)
        frames, reward, terminated, truncated, info = real.step(action)
        steps = [bare.step(action) for _ in range(4)]
        assert reward == pytest.approx(sum(float(step[1]) for step in steps))
        np.testing.assert_array_equal(info["observation"], steps[-1][0])
        assert not (terminated or truncated)
        assert frames in real.observation_space
        assert (frames[0] != frames[3]).any()
    real.close()


def test_hidden_attributes_come_back() -> None:
    real = pendulum()
    real.reset(seed=0)
    action = np.array([1.5], dtype=np.float32)
    hidden = real.step(action)[0]
    assert real.unwrapped.last_u == 1.5  # type: ignore[attr-defined]
    shown = envs.ChunkedEnv("Pendulum-v1", frame_size=(32, 32))
    shown.reset(seed=0)
    assert (shown.step(action)[0] != hidden).any()


def test_an_episode_ends_inside_a_chunk() -> None:
    real = envs.ChunkedEnv("CartPole-v1", frame_size=(40, 60), max_episode_steps=6)
    real.reset(seed=0)
    assert not any(real.step(0)[2:4])
    frames, reward, terminated, truncated, _ = real.step(1)
    assert (reward, terminated, truncated) == (2.0, False, True)
    np.testing.assert_array_equal(frames[2], frames[3])
    assert (frames[0] != frames[1]).any()


def test_check_env() -> None:
    env = gymnasium.make("CartPole-v1", render_mode="rgb_array")
    check_env(envs.ChunkedEnv(env), skip_render_check=True, skip_close_check=True)
    assert isinstance(envs.ChunkedEnv(env).action_space, spaces.Discrete)
    check_env(pendulum(), skip_render_check=True, skip_close_check=True)
    spec = pendulum(frame_skip=2).spec
    assert spec is not None and gymnasium.make(spec).observation_space.shape == (2, 32, 32, 3)


def test_recording(tmp_path: Path) -> None:
    real = RecordChunks(pendulum(), tmp_path / "real.webm")
    real.reset(seed=0)
    real.step(real.action_space.sample())
    assert len(real.frames) == 8
    real.close()
    assert (tmp_path / "real.webm").stat().st_size > 0


def test_bad_input() -> None:
    for make in (
        lambda: envs.ChunkedEnv("Atlantis-v3"),
        envs.ChunkedEnv("Pendulum-v1", hide=("moon",)).reset,
        lambda: envs.ChunkedEnv(gymnasium.make("Pendulum-v1")),
        lambda: envs.ChunkedEnv("Pendulum-v1", nonsense=1),
    ):
        with pytest.raises(InputError) as caught:
            make()
        assert "\n" not in str(caught.value)
