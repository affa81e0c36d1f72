"""The native batch equals `SyncVectorEnv` of single environments, slot by slot, in every autoreset mode."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import envs
from tests.toy import write_toy, write_wan_toy
from worldmodel import InputError, WorldModel

HORIZONS = [2, 3, 5]


def pair(world: Any, mode: AutoresetMode, **options: Any) -> tuple[envs.WorldModelVectorEnv, SyncVectorEnv]:
    native = envs.WorldModelVectorEnv(world, 3, autoreset_mode=mode, max_chunks=HORIZONS, **options)
    singles = [lambda h=h: envs.WorldModelEnv(world, max_chunks=h, **options) for h in HORIZONS]
    return native, SyncVectorEnv(singles, autoreset_mode=mode)


def assert_infos_equal(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, dict):
            assert_infos_equal(value, b[key])
        elif value.dtype == object:
            for left, right in zip(value, b[key], strict=True):
                assert (left is None) == (right is None)
                if left is not None:
                    assert_observations_equal(left, right)
        else:
            assert value.dtype == b[key].dtype, key
            np.testing.assert_allclose(value, b[key], atol=1e-4, err_msg=key)


def assert_observations_equal(a: np.ndarray, b: np.ndarray) -> None:
    """Frames are equal; latents to 1e-4."""
    if a.dtype == np.uint8:
        np.testing.assert_array_equal(a, b)
    else:
        np.testing.assert_allclose(a, b, atol=1e-4)


def assert_steps_equal(a: tuple[Any, ...], b: tuple[Any, ...]) -> None:
    assert_observations_equal(a[0], b[0])
    np.testing.assert_allclose(a[1], b[1], atol=1e-5)
    np.testing.assert_array_equal(a[2], b[2])
    np.testing.assert_array_equal(a[3], b[3])
    assert_infos_equal(a[4], b[4])


@pytest.mark.parametrize("options", [{}, {"step_mode": "frame"}, {"observation": "latent"}], ids=str)
@pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda mode: mode.name)
def test_equals_sync(toy: WorldModel, mode: AutoresetMode, options: dict[str, Any]) -> None:
    native, sync = pair(toy, mode, termination_threshold=0.55, **options)
    assert native.metadata["autoreset_mode"] is mode
    assert native.observation_space == sync.observation_space
    assert native.action_space == sync.action_space
    a, b = native.reset(seed=7), sync.reset(seed=7)
    assert_observations_equal(a[0], b[0])
    assert_infos_equal(a[1], b[1])
    native.action_space.seed(0)
    ended = np.zeros(3, dtype=int)
    for _ in range(60 if options.get("step_mode") == "frame" else 14):
        actions = native.action_space.sample()
        a, b = native.step(actions), sync.step(actions)
        assert_steps_equal(a, b)
        assert a[0] in native.observation_space
        done = a[2] | a[3]
        ended += done
        if mode == AutoresetMode.DISABLED and done.any():
            a2 = native.reset(options={"reset_mask": done.copy()})
            b2 = sync.reset(options={"reset_mask": done.copy()})
            assert_observations_equal(a2[0], b2[0])
            assert_infos_equal(a2[1], b2[1])
    assert (ended > 1).all()


def test_dict_actions_equal_sync(tmp_path: Path) -> None:
    space = spaces.Dict({"move": spaces.Box(-1, 1, (2,), np.float32), "fire": spaces.Discrete(2)})
    world = write_toy(tmp_path / "toy", space)
    native, sync = pair(world, AutoresetMode.NEXT_STEP)
    clip = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    a, b = (env.reset(seed=[5, 6, 7], options={"clip": clip}) for env in (native, sync))
    np.testing.assert_array_equal(a[0], b[0])
    for _ in range(8):
        actions = native.action_space.sample()
        assert_steps_equal(native.step(actions), sync.step(actions))


def test_a_slot_does_not_see_its_neighbours(toy: WorldModel) -> None:
    action = np.array([[0.5], [-0.5]], dtype=np.float32)
    alone, both = envs.WorldModelVectorEnv(toy, 1), envs.WorldModelVectorEnv(toy, 2)
    alone.reset(seed=[9])
    both.reset(seed=[4, 9])
    for _ in range(10):
        one, two = alone.step(action[1:]), both.step(action)
        np.testing.assert_array_equal(one[0][0], two[0][1])
        assert one[4]["log_prob"][0] == pytest.approx(two[4]["log_prob"][1], abs=1e-4)


def test_partial_reset_leaves_the_others(toy: WorldModel) -> None:
    env = envs.WorldModelVectorEnv(toy, 3, autoreset_mode="Disabled", termination_threshold=2.0)
    env.reset(seed=0)
    observations, *_ = env.step(env.action_space.sample())
    after, infos = env.reset(seed=[None, 8, None], options={"reset_mask": np.array([False, True, False])})
    np.testing.assert_array_equal(after[[0, 2]], observations[[0, 2]])
    np.testing.assert_array_equal(after[1], envs.WorldModelEnv(toy).reset(seed=8)[0])
    assert infos["_chunk"].tolist() == [False, True, False]
    assert env.state.steps.tolist() == [3, 2, 3]
    *_, infos = env.step(env.action_space.sample())
    assert infos["chunk"].tolist() == [2, 1, 2]
    assert env.last_chunk.frames.shape[0] == 3


def test_the_callers_options_stay_as_they_are(toy: WorldModel) -> None:
    env = envs.WorldModelVectorEnv(toy, 2, autoreset_mode="Disabled")
    env.reset(seed=0)
    options = {"reset_mask": np.array([True, False])}
    env.reset(options=options)
    assert list(options) == ["reset_mask"]


def test_a_finished_slot_must_be_reset_when_autoreset_is_off(toy: WorldModel) -> None:
    env = envs.WorldModelVectorEnv(toy, 2, autoreset_mode="Disabled", max_chunks=[1, 4])
    env.reset(seed=0)
    env.step(env.action_space.sample())
    with pytest.raises(gymnasium.error.ResetNeeded, match=r"slots \[0"):
        env.step(env.action_space.sample())


def test_many_futures_of_one_snapshot(toy: WorldModel) -> None:
    single = envs.WorldModelEnv(toy)
    single.reset(seed=0)
    single.step(np.array([1], dtype=np.float32))
    moment = single.snapshot()
    env = envs.WorldModelVectorEnv(toy, 3)
    observations, _ = env.reset(seed=0, options={"snapshot": moment})
    assert (observations == moment.turn.frames).all()
    frames = env.step(np.zeros((3, 1), dtype=np.float32))[0]
    assert (frames[0] != frames[1]).any()
    env.reset(options={"snapshot": moment})
    frames = env.step(np.zeros((3, 1), dtype=np.float32))[0]
    np.testing.assert_array_equal(frames[0], single.step(np.zeros(1, dtype=np.float32))[0])
    np.testing.assert_array_equal(frames[0], frames[2])


@pytest.mark.parametrize("step_mode", ["chunk", "frame"])
def test_rendering(toy: WorldModel, step_mode: Any) -> None:
    env = envs.WorldModelVectorEnv(
        toy, 2, step_mode=step_mode, termination_threshold=2.0, render_mode="rgb_array_list"
    )
    env.reset(seed=0)
    for _ in range(3):
        env.step(env.action_space.sample())
    lists = env.render()
    assert lists is not None
    assert [len(frames) for frames in lists] == ([16, 16] if step_mode == "chunk" else [4, 4])
    assert [len(frames) for frames in env.render() or ()] == [0, 0]
    env.step(env.action_space.sample())
    env.reset(seed=0)
    assert [len(frames) for frames in env.render() or ()] == ([4, 4] if step_mode == "chunk" else [1, 1])
    still = envs.WorldModelVectorEnv(toy, 2, step_mode=step_mode, render_mode="rgb_array")
    observations, _ = still.reset(seed=0)
    last = observations[:, -1] if step_mode == "chunk" else observations
    np.testing.assert_array_equal(np.stack(still.render() or ()), last)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.zeros((2, 1), np.float32), "expected 3 actions"),
        (np.zeros((3, 2), np.float32), "shape"),
        (np.full((3, 1), np.nan, np.float32), "outside"),
        (np.array([[0], [9], [0]], np.float32), "row 1"),
        (np.zeros((3, 1), object), "dtype"),
        ([[0.0], [1.0, 2.0], [0.0]], "not an array"),
        (None, "expected 3 actions"),
    ],
)
def test_bad_actions_change_nothing(toy: WorldModel, actions: Any, message: str) -> None:
    env = envs.WorldModelVectorEnv(toy, 3)
    env.reset(seed=0)
    before = env.state
    with pytest.raises(InputError, match=message) as caught:
        env.step(actions)
    assert "\n" not in str(caught.value)
    assert env.state is before


def test_bad_actions_inside_a_chunk_change_nothing(toy: WorldModel) -> None:
    env, single = (
        envs.WorldModelVectorEnv(toy, 2, step_mode="frame", termination_threshold=2.0),
        envs.WorldModelEnv(toy, step_mode="frame", termination_threshold=2.0),
    )
    env.reset(seed=0), single.reset(seed=0)
    for frame in range(6):
        for wrong in (9.0, np.nan):
            with pytest.raises(InputError, match="row 1"):
                env.step(np.array([[0], [wrong]], np.float32))
            with pytest.raises(InputError):
                single.step(np.array([wrong], np.float32))
        np.testing.assert_array_equal(
            env.step(np.zeros((2, 1), np.float32))[0][0], single.step(np.zeros(1, np.float32))[0], str(frame)
        )


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP], ids=lambda m: m.name)
def test_a_reset_that_fails_changes_no_slot(tmp_path: Path, mode: AutoresetMode) -> None:
    """A world without a bank cannot begin again by itself; the other slot is where it was, as often as one tries."""
    world = WorldModel.load(write_wan_toy(tmp_path / "world"))
    env = envs.WorldModelVectorEnv(world, 2, max_chunks=[2, 9], autoreset_mode=mode)
    env.reset(seed=0, options={"image": np.zeros((*world.spec.frame_size, 3), np.uint8)})
    actions = np.zeros((2, 1), np.float32)
    for _ in range(2 if mode == AutoresetMode.NEXT_STEP else 1):
        env.step(actions)
    before = env.state
    for _ in range(2):
        with pytest.raises(InputError):
            env.step(actions)
        assert env.state is before


@pytest.mark.parametrize(
    "seed", [np.int64(3), [3, 4], (3, 4), np.array([3, 4])], ids=lambda s: type(s).__name__
)
def test_seeds_of_all_kinds(toy: WorldModel, seed: Any) -> None:
    env, other = envs.WorldModelVectorEnv(toy, 2), envs.WorldModelVectorEnv(toy, 2)
    np.testing.assert_array_equal(env.reset(seed=seed)[0], other.reset(seed=3)[0])
    for wrong in (np.array([1, 2, 3]), [1.5, 2], "ab", 1.5):
        with pytest.raises(InputError, match="seed"):
            env.reset(seed=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"num_envs": 0},
        {"num_envs": 2, "max_chunks": [1, 2, 3]},
        {"num_envs": 2, "max_chunks": 0},
        {"num_envs": 2, "autoreset_mode": "sometimes"},
        {"num_envs": 2, "render_mode": "human"},
    ],
    ids=str,
)
def test_bad_construction(toy: WorldModel, options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        envs.WorldModelVectorEnv(toy, **options)


@pytest.mark.parametrize(
    "mask", [[True, False], np.array([1, 0]), np.zeros(2, bool), np.ones(3, bool)], ids=str
)
def test_bad_masks(toy: WorldModel, mask: Any) -> None:
    env = envs.WorldModelVectorEnv(toy, 2)
    env.reset(seed=0)
    with pytest.raises(InputError, match="reset_mask"):
        env.reset(options={"reset_mask": mask})
    with pytest.raises(InputError, match="seeds for 2"):
        env.reset(seed=[1, 2, 3])


def test_step_before_reset(toy: WorldModel) -> None:
    env = envs.WorldModelVectorEnv(toy, 2)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(np.zeros((2, 1), np.float32))
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.reset(options={"reset_mask": np.array([True, False])})
