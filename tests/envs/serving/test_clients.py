"""`RemoteEnv` and `RemoteVectorEnv` are, to their users, the local environments."""

from __future__ import annotations

import gc
import subprocess
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.utils.env_match import check_environments_match
from gymnasium.wrappers import RecordEpisodeStatistics

from envs import (
    ChunkedEnv,
    RecordChunks,
    RemoteEnv,
    RemoteVectorEnv,
    WorldModelEnv,
    WorldModelVectorEnv,
    world_env,
)
from envs.serving import client
from envs.serving.protocol import ServingError
from envs.serving.remote import RemoteChunk, RemoteScore
from envs.serving.server import WorldServer
from envs.serving.sessions import Limits
from envs.serving.world_backend import WorldBackend
from tests.envs.serving.machines import Clock, eventually
from tests.toy import toy_world
from worldmodel import InputError, WorldModel

MODES: list[dict[str, Any]] = [
    {"step_mode": "chunk"},
    {"step_mode": "frame"},
    {"observation": "latent"},
    {"guidance": 1.0, "temperature": 0.7, "context": "rolling"},
]
modes = pytest.mark.parametrize("mode", MODES, ids=str)


def equal(a: Any, b: Any) -> bool:
    """Outcomes of reset, step or observe, bit for bit."""
    return all(
        np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y for x, y in zip(a, b, strict=True)
    )


def test_the_clients_load_no_torch() -> None:
    script = "import sys, envs.serving.client, envs.serving.vector_client; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@modes
@pytest.mark.parametrize("render_mode", ["rgb_array", "rgb_array_list"])
def test_gymnasium_check_env(toy_server: WorldServer, mode: dict[str, Any], render_mode: str) -> None:
    env = RemoteEnv(toy_server.url, render_mode=render_mode, **mode)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(unbounded|infinity|unwrapped).*")
        check_env(env)
    env.close()


@pytest.mark.parametrize("step_mode", ["chunk", "frame"])
def test_environments_match_for_200_steps(toy: WorldModel, toy_server: WorldServer, step_mode: Any) -> None:
    options: dict[str, Any] = {"step_mode": step_mode, "render_mode": "rgb_array", "max_chunks": 30}
    local, remote = WorldModelEnv(toy, **options), RemoteEnv(toy_server.url, **options)
    check_environments_match(local, remote, 200)
    remote.close()


@modes
def test_every_verb_gives_what_the_local_one_gives(
    toy: WorldModel, toy_server: WorldServer, mode: dict[str, Any]
) -> None:
    local, remote = WorldModelEnv(toy, **mode), RemoteEnv(toy_server.url, **mode)
    actions = np.random.default_rng(0).uniform(-2, 2, (24, 1)).astype(np.float32)
    frames = np.random.default_rng(1).integers(0, 256, toy.frames_shape, dtype=np.uint8)
    assert equal(local.reset(seed=7), remote.reset(seed=7))
    for action in actions[:4]:
        assert equal(local.step(action), remote.step(action))
    assert equal(local.observe(frames, actions[0]), remote.observe(frames, actions[0]))
    assert equal(local.observe(frames), remote.observe(frames))
    np.testing.assert_array_equal(local.new_frames, remote.new_frames)
    ours, theirs = local.score(frames, actions[0], draws=2), remote.score(frames, actions[0], draws=2)
    for name in (f.name for f in fields(RemoteScore)):
        np.testing.assert_array_equal(getattr(ours, name).numpy(), getattr(theirs, name), name)
    for ours, theirs in zip(local.imagine(actions[:3]), remote.imagine(actions[:3]), strict=True):
        for name in (f.name for f in fields(RemoteChunk)):
            np.testing.assert_array_equal(getattr(ours, name).numpy(), getattr(theirs, name), name)
    last = remote.last_chunk
    for name in ("frames", "latent", "noise", "log_prob_map", "log_prob", "bits_per_dim", "action_gain"):
        np.testing.assert_array_equal(getattr(local.last_chunk, name).numpy(), getattr(last, name), name)
    before, there = local.snapshot(), remote.snapshot()
    assert equal(local.step(actions[5]), remote.step(actions[5]))
    local.restore(before), remote.restore(there)
    np.testing.assert_array_equal(local.new_frames, remote.new_frames)
    for ours, theirs in zip(local.fork(3), remote.fork(3), strict=True):
        for action in actions[6:11]:
            assert equal(ours.step(action), theirs.step(action))
        assert equal(ours.reset(), theirs.reset())
    assert equal(local.step(actions[5]), remote.step(actions[5]))
    assert equal(local.reset(), remote.reset())
    assert equal(
        local.reset(seed=3, options={"snapshot": before}), remote.reset(seed=3, options={"snapshot": there})
    )
    assert equal(local.reset(options={"bank_index": 2}), remote.reset(options={"bank_index": 2}))
    assert equal(local.reset(options={"image": frames[0]}), remote.reset(options={"image": frames[0]}))
    assert equal(local.reset(options={"clip": frames}), remote.reset(options={"clip": frames}))
    remote.close()


def test_spaces_and_metadata_are_the_local_ones(toy: WorldModel, toy_server: WorldServer) -> None:
    for mode in MODES:
        local, remote = WorldModelEnv(toy, **mode), RemoteEnv(toy_server.url, **mode)
        assert local.action_space == remote.action_space
        assert local.observation_space == remote.observation_space
        assert local.metadata == remote.metadata
        assert local.fps == remote.fps
        assert list(local.get_keys_to_action()) == list(remote.get_keys_to_action())
        remote.close()


@pytest.mark.parametrize("kind", ["discrete", "multi_discrete", "dict"])
def test_other_actions(tmp_path: Path, kind: str) -> None:
    space: spaces.Space[Any] = {
        "discrete": spaces.Discrete(3),
        "multi_discrete": spaces.MultiDiscrete([2, 3]),
        "dict": spaces.Dict({"move": spaces.Box(-1, 1, (2,), np.float32), "fire/~": spaces.Discrete(2)}),
    }[kind]
    world = toy_world(tmp_path / kind, space)
    with WorldServer(WorldBackend(world), "tcp://127.0.0.1:*") as server:
        remote = RemoteEnv(server.url)
        check_environments_match(WorldModelEnv(world), remote, 5)
        vector, native = RemoteVectorEnv(server.url, 2), WorldModelVectorEnv(world, 2)
        native.action_space.seed(0)
        same_infos(vector.reset(seed=1), native.reset(seed=1))
        for _ in range(3):
            actions = native.action_space.sample()
            same_infos(vector.step(actions), native.step(actions))
        vector.close()
        remote.close()


def test_wrappers_of_local_environments_fit(toy_server: WorldServer, tmp_path: Path) -> None:
    env: Any = RecordEpisodeStatistics(RemoteEnv(toy_server.url, max_chunks=2))
    env = RecordChunks(env, tmp_path / "live.mp4")
    env.reset(seed=0)
    truncated = False
    while not truncated:
        *_, truncated, info = env.step(env.action_space.sample())
    assert "episode" in info
    env.close()
    assert (tmp_path / "live.mp4").stat().st_size > 0
    assert ChunkedEnv  # the same wrappers take real environments


@pytest.mark.parametrize(
    "action", [None, "left", [3.0], [np.nan], [[0.0]], [0.0, 1.0], [[0.0], [0.0, 1.0]], {"a": [0.0]}]
)
def test_a_wrong_action_is_an_input_error_and_changes_nothing(
    toy: WorldModel, toy_server: WorldServer, action: Any
) -> None:
    local, remote = WorldModelEnv(toy), RemoteEnv(toy_server.url)
    local.reset(seed=0), remote.reset(seed=0)
    for env in (local, remote):
        with pytest.raises(InputError):
            env.step(action)
    good = np.ones(1, np.float32)
    assert equal(local.step(good), remote.step(good))
    remote.close()


@pytest.mark.parametrize(
    "options",
    [
        {"start": "noise"},
        {"colour": 1},
        {"bank_index": 99},
        {"bank_index": True},
        {"image": np.zeros((3, 3, 3), np.uint8)},
        {"image": np.zeros((32, 32, 3))},
        {"snapshot": 3},
        {"bank_index": 1, "clip": np.zeros((4, 32, 32, 3), np.uint8)},
        {"episode": ("data", 0, 0)},
        {"prompt": "a pendulum"},
        {"prompt": 3},
        {"bank_index": 2**70},
        {"bank_index": 2**63},
    ],
    ids=str,
)
def test_wrong_reset_options_are_input_errors(toy_server: WorldServer, options: dict[str, Any]) -> None:
    env = RemoteEnv(toy_server.url)
    with pytest.raises(InputError):
        env.reset(options=options)
    env.reset(seed=1)
    with pytest.raises(InputError):
        env.reset(options=options)
    env.step(np.ones(1, np.float32))
    env.close()


def test_seeds_are_integers_of_any_kind(toy: WorldModel, toy_server: WorldServer) -> None:
    """Here as there; and where one is none, the session goes on."""
    local, remote = WorldModelEnv(toy), RemoteEnv(toy_server.url)
    assert equal(local.reset(seed=7), local.reset(seed=np.int64(7)))  # type: ignore[arg-type]
    assert equal(local.reset(seed=7), remote.reset(seed=np.int64(7)))  # type: ignore[arg-type]
    for env in (local, remote):
        with pytest.raises(InputError, match="seed is 7.0, expected an integer"):
            env.reset(seed=7.0)  # type: ignore[arg-type]
    assert equal(local.step([0.0]), remote.step([0.0]))
    assert equal(local.reset(), remote.reset())
    remote.close()


@pytest.mark.parametrize("number", [2**63, 2**70])
def test_numbers_beyond_the_wire_are_input_errors(toy_server: WorldServer, number: int) -> None:
    env, endless = RemoteEnv(toy_server.url), RemoteEnv(toy_server.url, max_chunks=number)
    with pytest.raises(InputError, match=f"seed is {number}"):
        env.reset(seed=number)
    with pytest.raises(InputError, match=f"max_chunks is {number}"):
        endless.reset(seed=0)
    env.reset(seed=0)
    with pytest.raises((InputError, ServingError)):
        env.score(np.zeros((4, 32, 32, 3), np.uint8), draws=number)
    env.step([0.0])
    env.close()
    endless.close()


def test_before_reset(toy_server: WorldServer) -> None:
    env = RemoteEnv(toy_server.url, render_mode="rgb_array")
    for verb in (lambda: env.step([0.0]), env.snapshot, lambda: env.fork(2), env.render, env.resume):
        with pytest.raises(ResetNeeded):
            verb()
    env.close()
    env.close()


def test_observations_are_the_users_own(toy_server: WorldServer) -> None:
    env = RemoteEnv(toy_server.url, render_mode="rgb_array")
    observation, info = env.reset(seed=0)
    shown = env.render().copy()
    observation[:] = 0
    info.clear()
    np.testing.assert_array_equal(env.render(), shown)
    assert env.step(np.ones(1, np.float32))[4]
    env.close()


def test_detach_and_attach(toy: WorldModel, toy_server: WorldServer) -> None:
    local, first = WorldModelEnv(toy, step_mode="frame"), RemoteEnv(toy_server.url, step_mode="frame")
    action = np.ones(1, np.float32)
    local.reset(seed=0), first.reset(seed=0)
    assert equal(local.step(action), first.step(action))
    name = first.detach()
    assert name is not None
    second = RemoteEnv.attach(toy_server.url, name)
    assert second.options.step_mode == "frame"
    assert second.max_chunks == 50
    for _ in range(5):
        assert equal(local.step(action), second.step(action))
    second.close()
    with pytest.raises(ServingError) as failed:
        RemoteEnv.attach(toy_server.url, name)
    assert failed.value.code == "no_session"


def test_a_lost_session_is_an_error_once_and_reset_begins_another(toy_server: WorldServer) -> None:
    env, other = RemoteEnv(toy_server.url), RemoteEnv(toy_server.url)
    first, _ = env.reset(seed=0)
    other.reset(seed=0)
    assert env.session.id is not None
    other.session.connection.ask("close", session=env.session.id)
    with pytest.raises(ServingError) as failed:
        env.step([0.0])
    assert failed.value.code == "no_session"
    with pytest.raises(ResetNeeded):
        env.step([0.0])
    np.testing.assert_array_equal(env.reset(seed=0)[0], first)
    other.session.connection.ask("close", session=env.session.id)
    np.testing.assert_array_equal(env.reset(seed=0)[0], first)
    env.close()
    other.close()


@pytest.mark.parametrize("same", [True, False])
def test_a_server_that_comes_back_with_another_world_is_refused(toy: WorldModel, same: bool) -> None:
    with WorldServer(WorldBackend(toy), "tcp://127.0.0.1:*") as server:
        env, batch = RemoteEnv(server.url), RemoteVectorEnv(server.url, 2)
        first = env.reset(seed=0)
        batch.reset(seed=0)
    backend = WorldBackend(toy)
    if not same:
        backend.facts = {**backend.facts, "world": "trained-again", "fingerprint": "0" * 64}
    with WorldServer(backend, server.url) as again:
        for _ in range(2):
            if same:
                assert equal(env.reset(seed=0), first)
                batch.reset(seed=0)
                continue
            with pytest.raises(ServingError, match="another world now, trained-again; make another"):
                env.reset(seed=0)
            with pytest.raises(ServingError, match="another world now"):
                batch.reset(seed=0)
        if not same:
            for connection in (env.session.connection, *batch._connections):
                connection.renew()
            eventually(lambda: not again.table.sessions)  # none that nobody uses stays for its lease
        env.close(), batch.close()


def test_what_nobody_refers_to_is_given_back(toy_server: WorldServer) -> None:
    env = RemoteEnv(toy_server.url)
    env.reset(seed=0)

    def held() -> tuple[int, int]:
        said = env.session.connection.ask("stats").result
        return said["sessions"], said["snapshots"]

    sessions, snapshots = held()
    for _ in range(5):
        env.fork(4)
        env.snapshot()
    gc.collect()
    env.session.connection.renew()
    assert held() == (sessions, snapshots)
    env.close()


def test_what_is_idle_outlives_its_lease(toy: WorldModel, clock: Clock) -> None:
    """Sessions and snapshots are renewed in the background, even a snapshot whose environment is closed."""
    with WorldServer(WorldBackend(toy), "tcp://127.0.0.1:*") as server:
        env, other = RemoteEnv(server.url), RemoteEnv(server.url)
        for each in (env, other):
            each.session.connection.lease = 0.4  # the keeper's, which goes by the true clock
        first, _ = env.reset(seed=0)
        other.reset(seed=1)
        connection, snapshot = other.session.connection, other.snapshot()
        other.close()
        for _ in range(3):
            renewed = server.counts["renew"]
            eventually(lambda: server.counts["renew"] >= renewed + 6)  # noqa: B023
            clock.ahead += 40.0
        env.step([0.0])
        env.reset(seed=0, options={"snapshot": snapshot})
        assert server.metrics()["snapshots"] == 1
        del snapshot
        gc.collect()
        eventually(lambda: server.metrics()["snapshots"] == 0)
        eventually(lambda: connection._socket.closed)
        np.testing.assert_array_equal(env.reset(seed=0)[0], first)
        env.close()


# ---- the vector environment ---------------------------------------------------------------------------------------------
def same_infos(a: tuple[Any, ...], b: tuple[Any, ...]) -> None:
    """Outcomes of vector environments: flags equal, numbers and pixels on a tie but for the batch shape's rounding."""
    for x, y in zip(a[:-1], b[:-1], strict=True):
        if x.dtype == np.uint8:
            difference = np.abs(x.astype(int) - y)
            assert difference.max() <= 1 and (difference > 0).mean() < 1e-4
        elif x.dtype == np.float32 or x.dtype == np.float64:
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)
        else:
            np.testing.assert_array_equal(x, y)
    assert a[-1].keys() == b[-1].keys()
    for key, value in a[-1].items():
        if key == "final_obs":
            for x, y in zip(value, b[-1][key], strict=True):
                if x is not None:
                    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)
        elif key == "final_info":
            assert value.keys() == b[-1][key].keys()
        else:
            np.testing.assert_allclose(
                np.asarray(value, float), np.asarray(b[-1][key], float), rtol=1e-3, atol=1e-3
            )


@modes
@pytest.mark.parametrize("autoreset", ["NextStep", "SameStep", "Disabled"])
def test_the_vector_environment_matches_the_native_one(
    toy: WorldModel, toy_server: WorldServer, mode: dict[str, Any], autoreset: str
) -> None:
    options = {"autoreset_mode": autoreset, "max_chunks": [1, 2, 3], "render_mode": "rgb_array", **mode}
    native, remote = WorldModelVectorEnv(toy, 3, **options), RemoteVectorEnv(toy_server.url, 3, **options)
    assert native.observation_space == remote.observation_space
    assert native.action_space == remote.action_space
    assert native.metadata == remote.metadata
    native.action_space.seed(0)
    same_infos(native.reset(seed=5), remote.reset(seed=5))
    for _ in range(9):
        actions = native.action_space.sample()
        ours, theirs = native.step(actions), remote.step(actions)
        same_infos(ours, theirs)
        for a, b in zip(native.render(), remote.render(), strict=True):
            np.testing.assert_array_equal(a, b)
        done = ours[2] | ours[3]
        if autoreset == "Disabled" and done.any():
            with pytest.raises(ResetNeeded):
                remote.step(actions)
            masked = {"reset_mask": done}
            same_infos(native.reset(seed=1, options=masked), remote.reset(seed=1, options=masked))
    remote.close()


def test_slots_that_ended_unseen_begin_anew(toy: WorldModel, toy_server: WorldServer) -> None:
    """In same-step mode too, where another slot's failure kept a finished one from its reset."""
    env = RemoteVectorEnv(
        toy_server.url, 2, autoreset_mode="SameStep", max_chunks=[2, 9], termination_threshold=2.0
    )
    env.reset(seed=0)
    actions = np.zeros((2, 1), np.float32)
    env.step(actions)
    ending = env.sessions[0]
    call = ending.start_step(actions[0])
    ending.connection.settle([call])
    assert ending.accept(call).truncated
    assert env.step(actions)[-1]["chunk"].tolist() == [1, 2]
    env.close()


def test_forks_stand_where_their_parent_does_on_the_server(toy_server: WorldServer) -> None:
    env = RemoteEnv(toy_server.url)
    env.reset(seed=0)
    push = np.ones(1, np.float32)
    env.session.connection.ask("step", session=env.session.id, seq=1, arrays={"action": push})
    child = env.fork(1)[0]
    assert child.session.current().info["chunk"] == 1
    assert child.resume()[-1] == child.session.current().info
    child.close(), env.close()


def test_forks_have_no_window(
    toy: WorldModel, toy_server: WorldServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As local ones: all would draw into their parent's, and wait for it at each step."""
    for module in (world_env, client):
        monkeypatch.setattr(module, "Window", lambda *_: Screen())
    for env in (WorldModelEnv(toy, render_mode="human"), RemoteEnv(toy_server.url, render_mode="human")):
        env.reset(seed=0)
        for child in env.fork(2):
            assert child.render_mode is child.options.render_mode is None
            assert child._window is None
            child.close()
        assert env._window is not None
        env.close()


class Screen:
    """A window that nobody sees."""

    def show(self, frames: np.ndarray) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def test_wrong_actions_of_one_slot_change_no_slot(toy: WorldModel, toy_server: WorldServer) -> None:
    native, remote = WorldModelVectorEnv(toy, 3), RemoteVectorEnv(toy_server.url, 3)
    native.reset(seed=0), remote.reset(seed=0)
    for wrong in (np.array([[0.0], [9.0], [0.0]]), np.zeros((2, 1)), np.zeros((3, 2)), "abc"):
        with pytest.raises(InputError):
            remote.step(wrong)
    good = np.zeros((3, 1), np.float32)
    same_infos(native.step(good), remote.step(good))
    remote.close()


def test_slots_of_every_connection_are_renewed_in_time(toy: WorldModel) -> None:
    with WorldServer(WorldBackend(toy), "tcp://127.0.0.1:*", limits=Limits(lease=8.0)) as server:
        remote = RemoteVectorEnv(server.url, 20)
        assert [connection.lease for connection in remote._connections] == [8.0] * 3
        remote.close()


def test_more_slots_than_a_connection_queues(toy: WorldModel, toy_server: WorldServer) -> None:
    native, remote = WorldModelVectorEnv(toy, 20), RemoteVectorEnv(toy_server.url, 20)
    same_infos(native.reset(seed=0), remote.reset(seed=0))
    for _ in range(3):
        actions = native.action_space.sample()
        same_infos(native.step(actions), remote.step(actions))
    assert remote.last_chunk.frames.shape == (20, 4, 32, 32, 3)
    remote.close()
