"""Environments of worlds that take prompts: a prompt a step, prompts at reset, batches, the first picture of a clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env

import envs
from envs.options import batch_of_one
from envs.serving.batches import kinds, stacked
from envs.serving.protocol import ServingError
from envs.serving.server import WorldServer
from envs.serving.world_backend import WorldBackend
from tests.toy import TEXT, TOLD, toy_world, write_wan_toy
from worldmodel import InputError, WorldModel

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> WorldModel:
    return toy_world(tmp_path_factory.mktemp("worlds") / "told", TEXT)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> WorldModel:
    return toy_world(tmp_path_factory.mktemp("worlds") / "both", TOLD)


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> WorldModel:
    pytest.importorskip("diffusers")
    return WorldModel.load(write_wan_toy(tmp_path_factory.mktemp("worlds") / "wan", space=TEXT))


@pytest.mark.parametrize(
    ("name", "mode"), [("told", {"guidance": 1.5}), ("both", {}), ("wan", {"step_mode": "frame"})]
)
def test_gymnasium_check_env(name: str, mode: Any, request: pytest.FixtureRequest) -> None:
    env = envs.WorldModelEnv(request.getfixturevalue(name), **mode)
    expected = TOLD if name == "both" else TEXT
    assert env.action_space == expected
    check_env(env, skip_render_check=True)


def test_a_prompt_a_step(told: WorldModel) -> None:
    env = envs.WorldModelEnv(told, max_chunks=None, termination_threshold=2.0)
    first, info = env.reset(seed=0, options={"prompt": "a corgi"})
    assert first.shape == (4, 32, 32, 3) and info["chunk"] == 0 and env.state.steps.tolist() == [1]
    assert env.state.prompts == ("a corgi",)
    snapshot = env.snapshot()
    same, *_ = env.step("a corgi")
    env.restore(snapshot)
    other, *_ = env.step("a red cat")
    assert env.state.prompts == ("a red cat",)
    assert not np.array_equal(same, other)
    env.restore(snapshot)
    assert np.array_equal(env.step("a corgi")[0], same)
    chunks = env.imagine(["a cat", "a dog"])
    assert len(chunks) == 2 and env.state.prompts == ("a corgi",)
    for bad in (3, None, "x" * 100, {"prompt": "a"}):
        with pytest.raises(InputError):
            env.step(bad)


def test_the_prompt_at_reset_with_something_to_look_at(told: WorldModel, both: WorldModel) -> None:
    env = envs.WorldModelEnv(told)
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    observation, _ = env.reset(seed=0, options={"prompt": "a corgi", "image": picture})
    assert (observation == picture).all() and env.state.prompts == ("a corgi",)
    observation, _ = env.reset(seed=0, options={"prompt": "a corgi", "bank_index": 2})
    assert np.array_equal(observation, told.starts["frames"][2, -1]) and env.state.prompts == ("a corgi",)
    env.reset(seed=0, options={"prompt": "a corgi", "start": "bank"})
    assert env.state.steps.tolist() == [2]
    env.reset(seed=0)
    assert env.state.steps.tolist() == [2] and env.state.prompts != ("a corgi",)
    world_and_torque = envs.WorldModelEnv(both)
    world_and_torque.reset(seed=0, options={"prompt": "a cat", "bank_index": 1})
    assert world_and_torque.state.prompts == ("a cat",)
    for options, words in (
        ({"prompt": 3}, "expected a string"),
        ({"prompt": "a", "snapshot": env.snapshot()}, "exclude each other"),
        ({"prompt": "a", "image": picture, "bank_index": 1}, "exclude each other"),
        ({"prompt": "a", "image": picture[:3]}, "image has shape"),
    ):
        with pytest.raises(InputError, match=words):
            env.reset(options=options)


def test_a_world_without_prompts_refuses_them(toy: WorldModel) -> None:
    with pytest.raises(InputError, match="takes no prompts"):
        envs.WorldModelEnv(toy).reset(options={"prompt": "a corgi"})


@pytest.mark.parametrize("name", ["told", "both"])
def test_slots_of_a_batch_are_environments(name: str, request: pytest.FixtureRequest) -> None:
    world = request.getfixturevalue(name)
    batch = envs.WorldModelVectorEnv(world, 2, guidance=1.5, max_chunks=None, termination_threshold=2.0)
    assert isinstance(batch.action_space, spaces.Dict if name == "both" else spaces.Tuple)
    singles = [
        envs.WorldModelEnv(world, guidance=1.5, max_chunks=None, termination_threshold=2.0) for _ in range(2)
    ]
    options = {"prompt": "a corgi"}
    frames, _ = batch.reset(seed=7, options=options)
    for i, env in enumerate(singles):
        assert np.array_equal(env.reset(seed=7 + i, options=options)[0], frames[i])
    for prompts in (("a corgi", "a cat"), ("a dog", "a cat")):
        torque = np.ones((2, 1), np.float32)
        batched = {"prompt": prompts, "action": torque} if name == "both" else prompts
        frames, *_, info = batch.step(batched)
        for i, env in enumerate(singles):
            single = {"prompt": prompts[i], "action": torque[i]} if name == "both" else prompts[i]
            observation, *_, alone = env.step(single)
            assert info["log_prob"][i] == pytest.approx(alone["log_prob"], abs=1e-3)
            assert np.abs(frames[i].astype(int) - observation).max() <= 1
    assert batch.state.prompts == ("a dog", "a cat")
    batch.step(batch.action_space.sample())


def test_a_snapshot_goes_over_to_an_environment_with_guidance(told: WorldModel, tmp_path: Path) -> None:
    plain, guided = envs.WorldModelEnv(told), envs.WorldModelEnv(told, guidance=2.0)
    plain.reset(seed=0, options={"prompt": "a corgi"})
    plain.snapshot().save(tmp_path / "snapshot")
    snapshot = envs.Snapshot.load(tmp_path / "snapshot")
    guided.restore(snapshot)
    guided.step("a corgi")
    assert guided.last_chunk.guided_log_prob is not None
    guided.reset(options={"snapshot": snapshot})
    assert guided.state.context.uncond is not None and guided.state.prompts == ("a corgi",)


def test_a_served_world_takes_prompts_as_a_local_one(told: WorldModel, both: WorldModel) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    torque = np.ones((2, 1), np.float32)
    for world, plan in (
        (told, ["a cat", "a red dog"]),
        (both, {"prompt": ["a cat", "a red dog"], "action": torque}),
    ):
        with WorldServer(WorldBackend(world), "tcp://127.0.0.1:*") as server:
            local, remote = envs.WorldModelEnv(world), envs.RemoteEnv(server.url)
            for options in (
                {"prompt": "a corgi", "image": picture},
                {"prompt": "a corgi", "bank_index": 2},
                {"prompt": "a corgi", "start": "bank"},
                {"prompt": "a corgi"},
            ):
                assert np.array_equal(
                    local.reset(seed=0, options=options)[0], remote.reset(seed=0, options=options)[0]
                )
            for ours, theirs in zip(local.imagine(plan), remote.imagine(plan), strict=True):
                assert np.array_equal(ours.frames.numpy(), theirs.frames)
                assert np.array_equal(ours.log_prob.numpy(), theirs.log_prob)
            for options in (
                {"prompt": "a", "snapshot": remote.snapshot()},
                {"prompt": "a", "image": picture, "bank_index": 1},
            ):
                with pytest.raises(InputError, match="exclude each other"):
                    remote.reset(options=options)
            for wrong in ("a cat", ["x" * 100], [["a"]]):
                with pytest.raises(InputError):
                    remote.imagine(wrong if world is told else {"prompt": wrong, "action": torque[:1]})
            with pytest.raises(ServingError, match="of reset is too long"):
                remote.reset(options={"prompt": "a " * 2049})
            remote.step(wordy(world, "a cat"))
            remote.close()


def wordy(world: WorldModel, text: str) -> Any:
    """An action with this prompt."""
    space = world.spec.action_space
    return {"prompt": text, "action": np.zeros(1, np.float32)} if isinstance(space, spaces.Dict) else text


@pytest.mark.parametrize("name", ["told", "both"])
def test_a_wrong_prompt_of_one_slot_changes_no_slot(name: str, request: pytest.FixtureRequest) -> None:
    world = request.getfixturevalue(name)
    with WorldServer(WorldBackend(world), "tcp://127.0.0.1:*") as server:
        remote = envs.RemoteVectorEnv(server.url, 2)
        remote.reset(seed=0)
        wrong: Any = ["a cat", "x" * 65]
        if name == "both":
            wrong = {"prompt": wrong, "action": np.zeros((2, 1), np.float32)}
        with pytest.raises(InputError, match="65 characters"):
            remote.step(wrong)
        assert [session.seq for session in remote.sessions] == [0, 0]
        remote.close()


def test_a_served_snapshot_goes_over_to_a_session_with_guidance(told: WorldModel) -> None:
    backend = WorldBackend(told)
    with WorldServer(backend, "tcp://127.0.0.1:*") as server:
        plain, guided = envs.RemoteEnv(server.url), envs.RemoteEnv(server.url, guidance=2.0)
        local = [envs.WorldModelEnv(told), envs.WorldModelEnv(told, guidance=2.0)]
        for env in (plain, local[0]):
            env.reset(seed=0, options={"prompt": "a corgi"})
        guided.reset(seed=1)
        guided.restore(plain.snapshot())
        assert guided.session.id is not None
        state = backend._sessions[guided.session.id].slot.state()
        assert state.context.uncond is not None  # as those have that it may share a pass with
        local[1].restore(local[0].snapshot())
        assert np.array_equal(guided.step("a corgi")[0], local[1].step("a corgi")[0])
        plain.close()
        guided.close()


def test_prompts_of_any_length_share_a_pass() -> None:
    batches = [batch_of_one(TEXT, prompt) for prompt in ("a cat", "a red dog")]
    assert kinds(batches[0]) == kinds(batches[1])
    assert stacked(batches).tolist() == ["a cat", "a red dog"]


def test_a_first_chunk_of_one_picture_fills_the_observation(wan: WorldModel) -> None:
    env = envs.WorldModelEnv(wan)
    observation, _ = env.reset(seed=0, options={"prompt": "a corgi"})
    assert observation.shape == (4, 32, 32, 3) and (observation == observation[:1]).all()
    unprompted, _ = env.reset(seed=0)
    assert env.state.prompts == ("",) and not np.array_equal(unprompted, observation)
    observation, *_ = env.step("a cat")
    assert env.observation_space.contains(observation)
