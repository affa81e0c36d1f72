"""Collecting: whatever the workers and interruptions, the same episodes."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from worldmodel.errors import ConfigError, DataError
from worldmodel.training.collect import (
    CollectConfig,
    PolicyShare,
    collect,
    collect_episode,
    pendulum,
    restless_pendulum,
)
from worldmodel.training.episodes import EpisodeDataset, episode_path
from worldmodel.training.policies import POLICIES, make_policy

CARTPOLE = CollectConfig("CartPole-v1", episodes=6, chunks=30, frame_size=(16, 24))


def contents(folder: Path) -> list[dict[str, np.ndarray]]:
    episodes = []
    for path in sorted((folder / "episodes").iterdir()):
        with np.load(path, allow_pickle=False) as file:
            episodes.append({name: file[name] for name in file.files})
    return episodes


def same(a: list[dict[str, np.ndarray]], b: list[dict[str, np.ndarray]]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in x)


def test_episodes_do_not_depend_on_workers_or_gaps(tmp_path: Path) -> None:
    collect(CARTPOLE, tmp_path / "two")
    two = contents(tmp_path / "two")
    collect(replace(CARTPOLE, workers=1, episodes=3), tmp_path / "grown")
    episode_path(tmp_path / "grown", 0).unlink()
    path = episode_path(tmp_path / "grown", 1)
    path.write_bytes(path.read_bytes()[:-200])
    kept = episode_path(tmp_path / "grown", 2).stat().st_mtime_ns
    collect(replace(CARTPOLE, workers=1), tmp_path / "grown")
    assert same(two, contents(tmp_path / "grown"))
    assert episode_path(tmp_path / "grown", 2).stat().st_mtime_ns == kept

    dataset = EpisodeDataset.open(tmp_path / "two")
    assert (dataset.episodes, dataset.frame_size, dataset.frame_skip) == (6, (16, 24), 4)
    assert dataset.action_space == spaces.Discrete(2)
    for index in range(6):
        episode = dataset.episode(index)
        assert episode.terminated[-1] and not episode.terminated[:-1].any() and not episode.truncated.any()
        assert 0 < episode.rewards[-1] <= 4 and (episode.rewards[:-1] == 4).all()
        steps = int(episode.rewards.sum())
        assert all((frame == episode.frames[steps]).all() for frame in episode.frames[steps:])
    with pytest.raises(ConfigError, match="another collection .chunks differ"):
        collect(replace(CARTPOLE, chunks=31), tmp_path / "two")


def test_a_folder_without_episodes_is_free_for_another_collection(tmp_path: Path) -> None:
    config = replace(CARTPOLE, episodes=1, workers=1)
    collect(config, tmp_path)
    episode_path(tmp_path, 0).unlink()
    collect(replace(config, chunks=31), tmp_path)
    assert EpisodeDataset.open(tmp_path).info["collect"]["chunks"] == 31


@contextmanager
def collecting(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process of its own that has begun to collect into ``tmp_path``/d."""
    script = f"""
from pathlib import Path
from dataclasses import replace
from worldmodel.training.collect import collect, pendulum
if __name__ == "__main__":
    collect(replace(pendulum(), episodes=500, chunks=10, frame_size=(16, 16)), Path({str(tmp_path / "d")!r}))
"""
    (tmp_path / "script.py").write_text(script)
    root = str(Path(__file__).parents[2])
    env = os.environ | {"PYTHONPATH": root}
    child = subprocess.Popen(
        [sys.executable, tmp_path / "script.py"],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # whoever runs the tests in the background has it ignored, which children inherit
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 300
    while not episode_path(tmp_path / "d", 1).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    yield child
    assert child.wait(timeout=300) != 0


def test_ctrl_c_leaves_whole_episodes(tmp_path: Path) -> None:
    with collecting(tmp_path) as child:
        child.send_signal(signal.SIGINT)
    found = contents(tmp_path / "d")
    assert 1 < len(found) < 500
    assert not list((tmp_path / "d").rglob("*.tmp"))
    assert json.loads((tmp_path / "d" / "dataset.json").read_text())["complete"] is False


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """They waited for ever for one that could no longer tell them to end."""
    with collecting(tmp_path) as child:
        child.kill()
        child.communicate(timeout=60)  # ends when nobody is left who could write


def test_a_killed_worker_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deadly.py").write_text("""
import os
import gymnasium
from gymnasium.envs.classic_control import CartPoleEnv

class Deadly(CartPoleEnv):
    def step(self, action):
        os._exit(9)

gymnasium.register("Deadly-v0", Deadly)
""")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DataError, match="a worker was killed"):
        collect(replace(CARTPOLE, env="deadly:Deadly-v0"), tmp_path / "data")


def pendulum_env() -> gymnasium.Env[Any, Any]:
    return gymnasium.make("Pendulum-v1", render_mode="rgb_array", max_episode_steps=1000)


def test_the_shipped_recipe_shows_no_torque_and_covers_fast_and_upright() -> None:
    env, config = pendulum_env(), replace(pendulum(), chunks=4)
    episodes = [collect_episode(config, env, i) for i in range(12)]
    for episode in episodes:
        assert episode.frames.shape == (17, 64, 64, 3) and episode.actions.dtype == np.float32
        assert episode.truncated.tolist() == [False, False, False, True]
        assert np.allclose(episode.actions[:, 0], np.clip(episode.actions[:, 0], -2, 2))
    shown = replace(config, hide=())
    assert not np.array_equal(collect_episode(shown, env, 0).frames, episodes[0].frames)
    assert np.array_equal(collect_episode(shown, env, 0).observations, episodes[0].observations)
    assert np.abs([e.observations[0, 2] for e in episodes]).max() > 4
    assert {e.meta["policy"] for e in episodes} == {"random_held", "pendulum_swing"}


def test_the_restless_pendulum_seldom_stays_where_it_is() -> None:
    """Restless episodes turn by 45 degrees in 2 chunks, half of the time; swung-up ones stand at the top."""
    turned = {}
    for config in (pendulum(), restless_pendulum()):
        swung = replace(config, policies=config.policies[1:], chunks=50)
        env = gymnasium.make("Pendulum-v1", disable_env_checker=True, render_mode="rgb_array")
        env.render = lambda: np.zeros((64, 64, 3), dtype=np.uint8)  # type: ignore[method-assign]
        angles = [collect_episode(swung, env, i).observations[::4, :2] for i in range(30)]
        cos = np.concatenate([(a[2:] * a[:-2]).sum(axis=1) for a in angles])
        turned[config.seed] = np.degrees(np.median(np.arccos(np.clip(cos, -1, 1))))
    assert turned[0] < 20 and turned[1] > 35


def test_the_swing_policy_gets_upright() -> None:
    env = gymnasium.make("Pendulum-v1").unwrapped
    upright = []
    for seed in range(8):
        env.reset(seed=seed)
        act = make_policy("pendulum_swing", env.action_space, np.random.default_rng(seed))
        for _ in range(50):
            action = act(env, None)
            for _ in range(4):
                observation, *_ = env.step(action)
        upright.append(observation[0])
    assert np.median(upright) > 0.8


OWN_POLICY = """
import numpy as np

def leaning(action_space, rng):
    flip = rng.random() < 0.5
    return lambda env, observation: np.int64((observation[2] > 0) ^ flip)

def lost(action_space, rng):
    return lambda env, observation: (7, None)

def broken(action_space, rng):
    return lambda env, observation: observation["angle"]
"""


def test_a_policy_of_ones_own_sees_the_simulators_observation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_policies.py").write_text(OWN_POLICY)
    monkeypatch.syspath_prepend(str(tmp_path))  # workers have the path of their parent
    monkeypatch.delitem(sys.modules, "own_policies", raising=False)
    config = replace(CARTPOLE, policies=(PolicyShare("own_policies:leaning"),))
    collect(config, tmp_path / "data")
    dataset = EpisodeDataset.open(tmp_path / "data")
    flips = set()
    for index in range(config.episodes):
        episode = dataset.episode(index)
        before = episode.observations[:: config.frame_skip][: len(episode.actions), 2] > 0
        flips |= set((episode.actions ^ before).tolist())
        assert (
            len(set((episode.actions ^ before).tolist())) == 1
            and episode.meta["policy"] == "own_policies:leaning"
        )
    assert flips == {0, 1}
    for name, words in {
        "lost": "returned \\(7, None\\), expected one of Discrete",
        "broken": "does not act in CartPole-v1: IndexError",
        "absent": "no function 'absent' in own_policies, expected f\\(action_space, rng\\)",
    }.items():
        with pytest.raises(ConfigError, match=words):
            collect(replace(CARTPOLE, policies=(PolicyShare(f"own_policies:{name}"),)), tmp_path / "other")
    with pytest.raises(ConfigError, match="cannot import 'no_such_module'"):
        collect(replace(CARTPOLE, policies=(PolicyShare("no_such_module:act"),)), tmp_path / "other")


def test_a_reward_that_is_not_finite_is_refused() -> None:
    env = pendulum_env()
    step, calls = env.step, []

    def broken(action: Any) -> Any:
        calls.append(1)
        observation, reward, *rest = step(action)
        return observation, math.nan if len(calls) == 10 else reward, *rest

    env.step = broken  # type: ignore[method-assign]
    with pytest.raises(
        DataError, match="Pendulum-v1: episode 3, chunk 2 has the reward nan, expected a finite"
    ):
        collect_episode(replace(pendulum(), chunks=4, wide_starts=0.0), env, 3)


class Words(gymnasium.Env[np.ndarray, dict[str, Any]]):
    """Dict and Text actions, a picture as observation."""

    observation_space = spaces.Box(0, 255, (40, 40, 3), np.uint8)
    action_space = spaces.Dict({"move": spaces.Discrete(3), "say": spaces.Text(5)})

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return self.render(), {}

    def step(self, action: dict[str, Any]) -> Any:
        return self.render(), 1.0, False, False, {}

    def render(self) -> np.ndarray:
        return np.full((40, 40, 3), 7, dtype=np.uint8)


def test_any_environment_with_the_general_policies() -> None:
    for name in ("random", "random_held"):
        config = CollectConfig("Words-v0", chunks=5, policies=(PolicyShare(name),), frame_size=(8, 8))
        first, second = (collect_episode(config, Words(), 3) for _ in range(2))
        assert first.actions["move"].shape == (5,) and first.actions["say"].dtype.kind == "U"
        assert all(np.array_equal(first.actions[k], second.actions[k]) for k in first.actions)
        assert first.observations.shape == (21, 0) and (first.rewards == 4).all()


def test_a_dict_of_actions_within_a_dict_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their episodes held pickles, which nothing here reads."""
    (tmp_path / "nested.py").write_text("""
import gymnasium
from gymnasium import spaces
from gymnasium.envs.classic_control import CartPoleEnv

class Nested(CartPoleEnv):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.action_space = spaces.Dict({"hand": spaces.Dict({"push": self.action_space})})

gymnasium.register("Nested-v0", Nested)
""")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="a Dict within a Dict; wrap the environment"):
        collect(replace(CARTPOLE, env="nested:Nested-v0"), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_wrong_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no policy 'swim'; choose from random"):
        replace(CARTPOLE, policies=(PolicyShare("swim"),))
    with pytest.raises(ConfigError, match="no wide start for CartPole-v1"):
        replace(CARTPOLE, wide_starts=0.5)
    for name, value in (("episodes", 0), ("frame_size", (0, 0))):
        with pytest.raises(ConfigError, match=f"{name} is .*0.*, expected at least 1"):
            replace(CARTPOLE, **{name: value})  # type: ignore[arg-type]
    for unknown in ("NoSuch-v0", "nobodys/NoSuch-v0", "recipe.json"):
        with pytest.raises(ConfigError, match=f"cannot make {unknown}.*give module:NAME-v0.*recipe file"):
            collect(replace(CARTPOLE, env=unknown), tmp_path)
    for name in ("pendulum_swing", "lunar_lander"):
        with pytest.raises(ConfigError, match=f"the policy '{name}' is for another environment"):
            collect(replace(CARTPOLE, policies=(PolicyShare(name),)), tmp_path)
    with pytest.raises(ConfigError, match="finite share above 0"):
        replace(CARTPOLE, policies=(PolicyShare("random", math.nan),))
    with pytest.raises(ConfigError, match="seed is -1"):
        replace(CARTPOLE, seed=-1)
    with pytest.raises(ConfigError, match="cannot hide last_u"):
        collect(replace(CARTPOLE, hide=("last_u",)), tmp_path)
    assert set(POLICIES) >= {"random", "random_held"}
