"""The tools of Gymnasium's users, run on a world as they are."""

import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import RecordVideo

import envs
from tests.toy import write_toy
from worldmodel import WorldModel
from worldmodel.checkpoint import SHIPPED

ID = "worldmodel/Pendulum-v0"
MODES: list[dict[str, Any]] = [
    {"step_mode": "chunk"},
    {"step_mode": "frame"},
    {"observation": "latent"},
    {"guidance": 1.0, "temperature": 0.7, "context": "rolling"},
]
SPACES = {
    "discrete": spaces.Discrete(3),
    "multi_discrete": spaces.MultiDiscrete([2, 3]),
    "dict": spaces.Dict({"move": spaces.Box(-1, 1, (2,), np.float32), "fire": spaces.Discrete(2)}),
}


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("render_mode", ["rgb_array", "rgb_array_list"])
def test_gymnasium_check_env_through_make(toy_path: Path, mode: dict[str, Any], render_mode: str) -> None:
    env = gymnasium.make(ID, world=toy_path, render_mode=render_mode, **mode)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(unbounded|infinity|unwrapped).*")
        check_env(env.unwrapped)
    env.close()


@pytest.mark.parametrize("kind", SPACES)
def test_gymnasium_check_env_of_other_actions(tmp_path: Path, kind: str) -> None:
    world = WorldModel.load(write_toy(tmp_path / kind, SPACES[kind]))
    check_env(envs.WorldModelEnv(world), skip_render_check=True)


def test_ids() -> None:
    assert ID in gymnasium.registry
    assert envs.env_id("pendulum") == ID
    assert envs.env_id("push-t_small") == "worldmodel/PushTSmall-v0"
    for name in (path.parent.name for path in SHIPPED.glob("*/world.json")):
        assert envs.env_id(name) in gymnasium.registry


def test_make_imports_the_module(toy_path: Path) -> None:
    env = gymnasium.make(f"envs:{ID}", world=toy_path, max_chunks=3)
    assert isinstance(env.unwrapped, envs.WorldModelEnv)
    assert isinstance(gymnasium.make_vec(ID, 2, world=toy_path), envs.WorldModelVectorEnv)


def test_spaces_without_weights(tmp_path: Path) -> None:
    world = write_toy(tmp_path / "bare")
    for file in [*world.glob("*.safetensors"), world / "starts.npz"]:
        file.unlink()
    env = envs.WorldModelEnv(world)
    assert env.observation_space == spaces.Box(0, 255, (4, 32, 32, 3), np.uint8)
    assert env.action_space == spaces.Box(-2, 2, (1,), np.float32)
    assert envs.WorldModelEnv(world, step_mode="frame").observation_space.shape == (32, 32, 3)
    assert envs.WorldModelEnv(world, observation="latent").observation_space.shape == (3, 2, 2)
    assert envs.WorldModelVectorEnv(world, 5).observation_space.shape == (5, 4, 32, 32, 3)


def test_weights_are_shared_in_a_process(toy_path: Path) -> None:
    first, second = (envs.WorldModelEnv(str(toy_path), guidance=g).world for g in (0.0, 1.0))
    assert first.flow is second.flow
    assert (first.spec.sampling.guidance, second.spec.sampling.guidance) == (0.0, 1.0)


@pytest.mark.parametrize("mode", MODES[:3], ids=str)
def test_stable_baselines3_check_env(toy: WorldModel, mode: dict[str, Any]) -> None:
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        checker.check_env(envs.WorldModelEnv(toy, render_mode="rgb_array", **mode))


@pytest.mark.parametrize("mode", MODES[:3], ids=str)
def test_torchrl_check_env_specs(toy: WorldModel, mode: dict[str, Any]) -> None:
    libs = pytest.importorskip("torchrl.envs.libs.gym")
    utils = pytest.importorskip("torchrl.envs.utils")
    env = libs.GymWrapper(envs.WorldModelEnv(toy, **mode))
    utils.check_env_specs(env)
    rollout = env.rollout(3)
    key = "pixels" if mode.get("step_mode") == "frame" else "observation"  # its name for one picture
    assert rollout[key].shape[1:] == env.observation_space.shape


@pytest.mark.parametrize("autoreset", ["SameStep", "Disabled"])
def test_torchrl_takes_the_native_vector_env(toy: WorldModel, autoreset: str) -> None:
    libs = pytest.importorskip("torchrl.envs.libs.gym")
    vector = envs.WorldModelVectorEnv(toy, 2, autoreset_mode=autoreset, max_chunks=2)
    rollout = libs.GymWrapper(vector).rollout(3, break_when_any_done=False)
    assert rollout["observation"].shape[:2] == (2, 3)


def test_record_video_keeps_every_frame_of_frame_mode(toy: WorldModel, tmp_path: Path) -> None:
    cv2, _ = pytest.importorskip("cv2"), pytest.importorskip("moviepy")
    env: Any = envs.WorldModelEnv(
        toy, step_mode="frame", max_chunks=3, termination_threshold=2.0, render_mode="rgb_array"
    )
    env = RecordVideo(
        env, str(tmp_path / "videos"), episode_trigger=lambda episode: True, disable_logger=True
    )
    env.reset(seed=0)
    steps = 0
    truncated = False
    while not truncated:
        *_, truncated, _ = env.step(env.action_space.sample())
        steps += 1
    env.close()
    (file,) = tmp_path.glob("videos/*.mp4")
    video = cv2.VideoCapture(str(file))
    frames = 0
    while video.read()[0]:
        frames += 1
    assert steps == 12
    assert frames == 1 + steps
    assert round(video.get(cv2.CAP_PROP_FPS)) == env.metadata["render_fps"] == 20


def test_async_vector_env_equals_sync(toy_path: Path) -> None:
    def make() -> gymnasium.Env:
        return gymnasium.make(f"envs:{ID}", world=toy_path, max_chunks=2)

    asynchronous = gymnasium.vector.AsyncVectorEnv([make, make], context="spawn")
    try:
        synchronous = gymnasium.vector.SyncVectorEnv([make, make])
        a, b = asynchronous.reset(seed=3), synchronous.reset(seed=3)
        np.testing.assert_array_equal(a[0], b[0])
        synchronous.action_space.seed(0)
        for _ in range(4):
            actions = synchronous.action_space.sample()
            a, b = asynchronous.step(actions), synchronous.step(actions)
            for left, right in zip(a[:4], b[:4], strict=True):
                np.testing.assert_array_equal(left, right)
            np.testing.assert_array_equal(a[4]["log_prob"], b[4]["log_prob"])
    finally:
        asynchronous.close()


@pytest.mark.parametrize("step_mode", ["chunk", "frame"])
def test_play_with_the_keyboard(toy: WorldModel, monkeypatch: pytest.MonkeyPatch, step_mode: Any) -> None:
    pygame = pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    from gymnasium.utils.play import play

    env = envs.WorldModelEnv(toy, step_mode=step_mode, render_mode="rgb_array")
    pygame.init()
    actions: list[float] = []
    script = {
        2: pygame.event.Event(pygame.KEYDOWN, key=pygame.K_RIGHT),
        5: pygame.event.Event(pygame.KEYUP, key=pygame.K_RIGHT),
        6: pygame.event.Event(pygame.KEYDOWN, key=pygame.K_LEFT),
        9: pygame.event.Event(pygame.QUIT),
    }

    def callback(before: Any, after: Any, action: Any, *rest: Any) -> None:
        actions.append(float(action[0]))
        if len(actions) in script:
            pygame.event.post(script[len(actions)])

    assert isinstance(env.metadata["render_fps"], int)
    play(env, zoom=2.0, callback=callback, seed=0, noop=env.noop_action)
    assert actions == [0, 0, 2, 2, 2, 0, -2, -2, -2]


def test_keys_of_discrete_actions(tmp_path: Path) -> None:
    env = envs.WorldModelEnv(write_toy(tmp_path / "toy", spaces.Discrete(3)))
    keys = env.get_keys_to_action()
    assert keys[(ord("0"),)] == 0
    assert keys[(ord("2"),)] == 2
    assert len(keys) == 6
    assert all(action in env.action_space for action in keys.values())
    assert env.noop_action == 0


def test_ppo_runs_unmodified(tmp_path: Path) -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    world = write_toy(tmp_path / "toy", frame=(64, 64))
    env = gymnasium.make(ID, world=world, step_mode="frame", max_chunks=10)
    agent = sb3.PPO("CnnPolicy", env, n_steps=250, batch_size=50, n_epochs=1, device="cpu", seed=0)
    agent.learn(2000)
    assert agent.num_timesteps == 2000
    assert agent.ep_info_buffer
