"""Snapshots, forks, starts, real frames and bad input of the single environment."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_match import check_environments_match

import envs
from tests.toy import write_toy, write_wan_toy
from worldmodel import CheckpointError, Chunk, DataError, InputError, WorldModel, WorldModelError
from worldmodel.condition.spaces import space_to_json
from worldmodel.files import load_metadata, load_tensors, save_tensors, write_json
from worldmodel.training.episodes import FORMAT_VERSION, Episode, episode_path, load_episode, save_episode

Step = tuple[Any, ...]
NEVER = {"termination_threshold": 2.0}
INFO_KEYS = ["log_prob", "bits_per_dim", "action_gain", "sweeps", "residual", "context_frames", "chunk"]


def torque(value: float) -> np.ndarray:
    return np.array([value], dtype=np.float32)


def play(env: gymnasium.Env, steps: int, seed: int = 0) -> list[Step]:
    rng = np.random.default_rng(seed)
    return [env.step(torque(rng.uniform(-2, 2))) for _ in range(steps)]


def assert_same(a: list[Step], b: list[Step]) -> None:
    for left, right in zip(a, b, strict=True):
        np.testing.assert_array_equal(left[0], right[0])
        assert left[1:] == right[1:]


@pytest.mark.parametrize(
    "options", [{}, {"step_mode": "frame"}, {"context": "rolling"}, {"guidance": 0.5}], ids=str
)
def test_an_episode_is_a_function_of_its_seed(toy: WorldModel, options: dict[str, Any]) -> None:
    first, second = (envs.WorldModelEnv(toy, **options) for _ in range(2))
    for seed in (3, 4):
        a, b = first.reset(seed=seed), second.reset(seed=seed)
        np.testing.assert_array_equal(a[0], b[0])
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        episode = play(first, 12, seed)
        assert torch.equal(before, torch.get_rng_state())
        assert_same(episode, play(second, 12, seed))
    np.testing.assert_array_equal(first.reset()[0], second.reset()[0])
    assert_same(play(first, 3), play(second, 3))


def test_seeds_and_episodes_differ(toy: WorldModel) -> None:
    env = envs.WorldModelEnv(toy)
    episodes = []
    for seed in (0, 1, None, None):
        env.reset(seed=seed, options={"bank_index": 0})
        episodes.append(env.step(torque(0))[0])
    assert all((episodes[i] != episodes[j]).any() for i in range(4) for j in range(i))


@pytest.mark.parametrize("step_mode", ["chunk", "frame"])
def test_fork_and_original_match(toy: WorldModel, step_mode: Any) -> None:
    env = envs.WorldModelEnv(toy, step_mode=step_mode, max_chunks=4, render_mode="rgb_array")
    env.reset(seed=1)
    play(env, 2)
    (child,) = env.fork(1)
    check_environments_match(env, child, num_steps=20, seed=2)


def test_forks_are_of_the_world_in_memory(tmp_path: Path) -> None:
    """Its folder may be gone, or hold another world by now, and is not read once more for each child."""
    path = write_toy(tmp_path / "toy")
    env = envs.WorldModelEnv(path)
    env.reset(seed=1)
    (path / "world.json").unlink()
    (child,) = env.fork(1)
    assert_same(play(env, 2), play(child, 2))


@pytest.mark.parametrize("step_mode", ["chunk", "frame"])
def test_forks_share_the_past_and_part(toy: WorldModel, step_mode: Any) -> None:
    env = envs.WorldModelEnv(toy, step_mode=step_mode, **NEVER)
    env.reset(seed=1)
    play(env, 3)
    children = env.fork(3)
    futures = [play(child, 9) for child in children]
    assert_same(play(env, 9), futures[0])
    assert (futures[0][-1][0] != futures[1][-1][0]).any()
    assert (futures[1][-1][0] != futures[2][-1][0]).any()
    first = env.reset()[0]
    np.testing.assert_array_equal(children[0].reset()[0], first)
    assert children[1].np_random.random() != children[2].np_random.random()


@pytest.mark.parametrize("steps", [0, 2, 7])
@pytest.mark.parametrize("step_mode", ["chunk", "frame"])
def test_restore_repeats_the_future(toy: WorldModel, tmp_path: Path, step_mode: Any, steps: int) -> None:
    env = envs.WorldModelEnv(toy, step_mode=step_mode, max_chunks=5, render_mode="rgb_array")
    env.reset(seed=5)
    play(env, steps)
    moment, picture, chunk = env.snapshot(), env.render(), env.last_chunk
    moment.save(tmp_path / "moment")
    future = [*play(env, 11), (env.reset()[0],)]
    elsewhere = envs.WorldModelEnv(toy, step_mode=step_mode, max_chunks=5, render_mode="rgb_array")
    for other, saved in ((env, moment), (elsewhere, envs.Snapshot.load(tmp_path / "moment"))):
        other.restore(saved)
        assert other.np_random.bit_generator.state == moment.rng
        np.testing.assert_array_equal(other.render(), picture)
        assert torch.equal(other.last_chunk.log_prob_map, chunk.log_prob_map)
        assert_same([*play(other, 11), (other.reset()[0],)], future)


def test_a_snapshot_is_also_a_state(toy: WorldModel, tmp_path: Path) -> None:
    env = envs.WorldModelEnv(toy)
    env.reset(seed=0)
    env.snapshot().save(tmp_path / "moment")
    state, action = toy.load_state(tmp_path / "moment"), np.zeros((1, 1), np.float32)
    np.testing.assert_array_equal(toy.step(state, action)[1].frames[0].numpy(), env.step(torque(0))[0])


def test_reset_to_a_snapshot(toy: WorldModel) -> None:
    env = envs.WorldModelEnv(toy, max_chunks=3, **NEVER)
    env.reset(seed=0)
    *_, last = play(env, 3)
    moment = env.snapshot()
    observation, info = env.reset(options={"snapshot": moment})
    np.testing.assert_array_equal(observation, last[0])
    assert info["chunk"] == 0
    same = env.step(torque(1))
    assert not same[3]
    env.restore(moment)
    np.testing.assert_array_equal(env.step(torque(1))[0], same[0])
    env.reset(seed=1, options={"snapshot": moment})
    assert (env.step(torque(1))[0] != same[0]).any()


def test_bad_snapshots(toy: WorldModel, tmp_path: Path) -> None:
    env = envs.WorldModelEnv(toy, step_mode="frame")
    env.reset(seed=0)
    env.step(torque(0))
    inside = env.snapshot()
    chunked = envs.WorldModelEnv(toy)
    with pytest.raises(InputError, match="inside a chunk"):
        chunked.restore(inside)
    other = envs.WorldModelEnv(write_toy(tmp_path / "other", seed=1))
    with pytest.raises(InputError, match="another world"):
        other.restore(inside)
    with pytest.raises(InputError, match="expected what env.snapshot"):
        env.restore(3)  # type: ignore[arg-type]
    inside.save(tmp_path / "moment")
    data = (tmp_path / "moment").read_bytes()
    (tmp_path / "half").write_bytes(data[: len(data) // 2])
    toy.save_state(env.state, tmp_path / "state")
    for name in ("half", "state", "absent"):
        with pytest.raises(CheckpointError):
            envs.Snapshot.load(tmp_path / name)


def test_snapshots_with_parts_that_do_not_fit(toy: WorldModel, tmp_path: Path) -> None:
    env = envs.WorldModelEnv(toy)
    env.reset(seed=0)
    env.snapshot().save(tmp_path / "moment")
    tensors, metadata = load_tensors(tmp_path / "moment"), load_metadata(tmp_path / "moment")
    header = json.loads(metadata["worldmodel_snapshot"])
    turn, rng = header["turn"], header["rng"]
    wrong: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"rng": {}}, {}),
        ({"rng": None}, {}),
        ({"rng": {**rng, "bit_generator": "MT19937"}}, {}),
        ({"rng": {**rng, "state": {"state": -1, "inc": 1}}}, {}),
        *(({"turn": {**turn, "shown": shown}}, {}) for shown in (0, 5, -1, "4", None, 1.5)),
        *(({"turn": {**turn, "info": info}}, {}) for info in ({}, None, {**turn["info"], "sweeps": "x"})),
        ({"turn": {**turn, "reward": None}}, {}),
        ({"turn": {**turn, "terminated": 3}}, {}),
        ({}, {"chunk.frames": tensors["chunk.frames"][:0]}),
        ({}, {"chunk.frames": tensors["chunk.frames"][:, :0]}),
    ]
    for changes, others in wrong:
        told = {**metadata, "worldmodel_snapshot": json.dumps({**header, **changes})}
        save_tensors(tmp_path / "wrong", {**tensors, **others}, told)
        with pytest.raises(CheckpointError, match="not a saved snapshot"):
            envs.Snapshot.load(tmp_path / "wrong")


def test_snapshots_of_frames_of_another_size(tmp_path: Path) -> None:
    """The same weights, and other frames."""
    world = WorldModel.load(write_wan_toy(tmp_path / "world"))
    one, other = envs.WorldModelEnv(world), envs.WorldModelEnv(world.at((16, 48)))
    one.reset(seed=0, options={"image": np.zeros((32, 32, 3), np.uint8)})
    other.reset(seed=0, options={"image": np.zeros((16, 48, 3), np.uint8)})
    moment, before = one.snapshot(), other.state
    for refused in (other.restore, lambda m: other.reset(options={"snapshot": m})):
        with pytest.raises(InputError, match="not of frames of this world's size"):
            refused(moment)
        assert other.state is before
    one.restore(moment)


def test_snapshots_whose_state_does_not_fit(toy: WorldModel, tmp_path: Path) -> None:
    env = envs.WorldModelEnv(toy)
    env.reset(seed=0)
    env.snapshot().save(tmp_path / "moment")
    tensors, metadata = load_tensors(tmp_path / "moment"), load_metadata(tmp_path / "moment")
    for name in ("latent", "chunk.latent"):
        half = {name: tensors[name][..., :1].contiguous()}
        save_tensors(tmp_path / "wrong", {**tensors, **half}, metadata)
        with pytest.raises(InputError, match="not of frames of this world's size"):
            env.restore(envs.Snapshot.load(tmp_path / "wrong"))
    many = {"chunk.frames": tensors["chunk.frames"].repeat(32, 1, 1, 1, 1)}
    save_tensors(tmp_path / "wrong", {**tensors, **many}, metadata)
    with pytest.raises(InputError, match="not of frames of this world's size"):
        env.restore(envs.Snapshot.load(tmp_path / "wrong"))


def test_forks_have_random_streams_of_their_own(toy: WorldModel) -> None:
    """Children, their children, and children of another moment begin different episodes; child 0 as its parent would."""
    env = envs.WorldModelEnv(toy)
    env.reset(seed=0)
    children = env.fork(3)
    grandchildren = [grandchild for child in children for grandchild in child.fork(3)[1:]]
    twins = env.fork(3)
    play(env, 1)
    later = env.fork(3)[1:]

    def begins(one: envs.WorldModelEnv) -> int:
        return int(one.np_random.integers(2**62))

    assert [begins(c) for c in twins] == [begins(c) for c in env.fork(1) + children[1:]]
    drawn = [begins(c) for c in [*twins, *grandchildren, *later]]
    assert len(set(drawn)) == len(drawn)


def test_no_actions_are_no_plan(toy: WorldModel) -> None:
    env = envs.WorldModelEnv(toy)
    env.reset(seed=0)
    for none in (np.zeros((0, 1), np.float32), np.zeros((), np.float32)):
        with pytest.raises(InputError, match="with 1 chunks at least"):
            env.imagine(none)


def test_a_plan_has_one_length(tmp_path: Path) -> None:
    """Actions by name of which some say more chunks than others, as a server refuses them too."""
    space = spaces.Dict({"turn": spaces.Discrete(3), "go": spaces.Box(-1.0, 1.0, (1,), np.float32)})
    env = envs.WorldModelEnv(write_toy(tmp_path / "toy", space))
    env.reset(seed=0)
    go = np.zeros((5, 1), np.float32)
    assert len(env.imagine({"turn": np.zeros(5, np.int64), "go": go})) == 5
    with pytest.raises(InputError, match="with 1 chunks at least"):
        env.imagine({"turn": np.zeros(3, np.int64), "go": go})


def test_info_is_plain_numbers(toy: WorldModel) -> None:
    env = envs.WorldModelEnv(toy)
    for info in (env.reset(seed=0)[1], *(step[4] for step in play(env, 9))):
        assert list(info) == INFO_KEYS
        assert all(type(value) in (int, float) and np.isfinite(value) for value in info.values())
    assert isinstance(env.last_chunk, Chunk)
    assert float(env.last_chunk.log_prob[0]) == info["log_prob"]


def test_frames_of_a_chunk_one_by_one(toy: WorldModel) -> None:
    chunked, framed = (
        envs.WorldModelEnv(toy, max_chunks=2),
        envs.WorldModelEnv(toy, max_chunks=2, step_mode="frame"),
    )
    chunks, first = chunked.reset(seed=2)[0], framed.reset(seed=2)[0]
    np.testing.assert_array_equal(chunks[-1], first)
    for value in (1.0, -1.0):
        frames, reward, terminated, truncated, info = chunked.step(torque(value))
        single = [framed.step(torque(value)), *(framed.step(torque(0)) for _ in range(3))]
        np.testing.assert_array_equal(np.stack([s[0] for s in single]), frames)
        assert sum(s[1] for s in single) == pytest.approx(reward, abs=1e-12)
        assert [s[2] for s in single] == [False, False, False, terminated]
        assert [s[3] for s in single] == [False, False, False, truncated]
        assert all(s[4] == info for s in single)
    assert truncated


def test_flags_are_python_booleans(toy: WorldModel) -> None:
    env = envs.WorldModelEnv(toy, termination_threshold=-1.0, max_chunks=1)
    env.reset(seed=0)
    _, reward, terminated, truncated, _ = env.step(torque(0))
    assert (type(reward), terminated, truncated) == (float, True, True)
    endless = envs.WorldModelEnv(toy, max_chunks=None, **NEVER)
    endless.reset(seed=0)
    assert not any(step[3] for step in play(endless, 60))


def test_observations_are_copies(toy: WorldModel) -> None:
    env = envs.WorldModelEnv(toy, render_mode="rgb_array")
    env.reset(seed=0)
    observation = env.step(torque(0))[0]
    kept = observation.copy()
    observation[:] = 0
    env.render()[:] = 0
    np.testing.assert_array_equal(env.new_frames, kept)


@pytest.fixture
def dataset(toy: WorldModel, tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    info = {"format_version": FORMAT_VERSION, "complete": True, "episodes": 2, "frame_skip": 4}
    space = {"action_space": space_to_json(toy.spec.action_space)}
    write_json(tmp_path / "data" / "dataset.json", {**info, "frame_size": [32, 32], "fps": 20.0, **space})
    for index in range(2):
        frames = rng.integers(0, 256, (1 + 4 * 6, 32, 32, 3), dtype=np.uint8)
        actions = rng.uniform(-2, 2, (6, 1)).astype(np.float32)
        flags = np.zeros(6, dtype=bool)
        numbers = np.zeros((25, 3), dtype=np.float32)
        episode = Episode(frames, actions, np.zeros(6, np.float32), flags, flags, numbers, {"seed": index})
        save_episode(episode_path(tmp_path / "data", index), episode)
    return tmp_path / "data"


def test_starts(toy: WorldModel, dataset: Path) -> None:
    env = envs.WorldModelEnv(toy)
    bank = toy.starts["frames"]
    for index in range(len(bank)):
        np.testing.assert_array_equal(env.reset(seed=0, options={"bank_index": index})[0], bank[index, -1])
    seen = {env.reset(seed=seed, options={"start": "bank"})[0].tobytes() for seed in range(40)}
    assert seen == {clip[-1].tobytes() for clip in bank}

    clip = bank.reshape(-1, *bank.shape[3:])
    observation, info = env.reset(seed=0, options={"image": clip[0]})
    assert (observation == clip[0]).all()
    assert info["context_frames"] == 0
    assert env.state.steps.tolist() == [1]
    np.testing.assert_array_equal(env.reset(options={"clip": clip[:11]})[0], clip[7:11])
    assert env.state.steps.tolist() == [2]

    observation, _ = env.reset(seed=3, options={"episode": (dataset, 1, 2)})
    with np.load(dataset / "episodes" / "000001.npz") as file:
        np.testing.assert_array_equal(observation, file["frames"][1 + 4 * 3 : 1 + 4 * 4])
        step = env.step(file["actions"][4])
    assert np.isfinite(step[4]["log_prob"])


PIXELS = np.zeros((32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"imgae": PIXELS}, "unknown reset options: imgae .known: start"),
        ({"prompt": "a pendulum"}, "takes no prompts"),
        ({"start": "noise"}, 'must be "bank"'),
        ({"image": PIXELS, "bank_index": 1}, "exclude each other"),
        ({"image": PIXELS.astype(np.float32)}, "expected .32, 32, 3. uint8"),
        ({"image": PIXELS[:31]}, "image has shape .31, 32, 3."),
        ({"image": None}, "image has shape"),
        ({"clip": PIXELS}, "clip has shape"),
        ({"clip": PIXELS[None][[0, 0, 0]]}, "at least 4"),
        ({"clip": [[1], [1, 2]]}, "not an array"),
        ({"bank_index": 5}, "bank_index is 5"),
        ({"bank_index": -1}, "bank_index is -1"),
        ({"bank_index": 0.5}, "bank_index is 0.5"),
        ({"bank_index": True}, "bank_index is True"),
        ({"episode": 3}, "dataset directory, episode index, first chunk"),
        ({"snapshot": None}, "snapshot is a NoneType"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_starts_change_nothing(toy: WorldModel, options: dict[str, Any], message: str) -> None:
    env = envs.WorldModelEnv(toy)
    env.reset(seed=0)
    state, rng = env.state, copy.deepcopy(env.np_random.bit_generator.state)
    for seed in (None, 1):
        with pytest.raises(InputError, match=message) as caught:
            env.reset(seed=seed, options=options)
        assert "\n" not in str(caught.value)
    assert env.state is state
    assert env.np_random.bit_generator.state == rng


def test_bad_episodes(toy: WorldModel, dataset: Path, tmp_path: Path) -> None:
    env = envs.WorldModelEnv(toy)
    for where, message in (((dataset, 2, 0), "episode index is 2"), ((dataset, 0, 5), "first chunk is 5")):
        with pytest.raises(InputError, match=message):
            env.reset(options={"episode": where})
    shutil.copytree(dataset, tmp_path / "short")
    path = episode_path(tmp_path / "short", 0)
    whole = load_episode(path, 4)
    cut = {name: getattr(whole, name)[:1] for name in ("actions", "rewards", "terminated", "truncated")}
    save_episode(path, whole._replace(frames=whole.frames[:5], observations=whole.observations[:5], **cut))
    with pytest.raises(InputError, match="episode 0 has 1 of the 2 chunks of a start; choose another"):
        env.reset(options={"episode": (tmp_path / "short", 0, 0)})
    with pytest.raises(DataError):
        env.reset(options={"episode": (tmp_path, 0, 0)})


@pytest.mark.parametrize(
    "action",
    [
        None,
        0.5,
        "left",
        np.zeros(2, np.float32),
        np.zeros((1, 1), np.float32),
        torque(np.nan),
        torque(np.inf),
        torque(2.1),
        np.array([None]),
        [[1.0], [1.0, 2.0]],
        {"torque": torque(0)},
    ],
    ids=str,
)
@pytest.mark.parametrize("step_mode", ["chunk", "frame"])
def test_bad_actions_change_nothing(toy: WorldModel, step_mode: Any, action: Any) -> None:
    env = envs.WorldModelEnv(toy, step_mode=step_mode)
    env.reset(seed=0)
    state = env.state
    for call in (
        env.step,
        *([] if action is None else [lambda a: env.observe(toy.starts["frames"][0, 0], a)]),
    ):
        with pytest.raises(InputError) as caught:
            call(action)
        assert "\n" not in str(caught.value)
    assert env.state is state


@pytest.mark.parametrize("action", [3, -1, 0.0, True, np.array([1])], ids=str)
def test_bad_discrete_actions(tmp_path: Path, action: Any) -> None:
    env = envs.WorldModelEnv(write_toy(tmp_path / "toy", spaces.Discrete(3)))
    env.reset(seed=0)
    with pytest.raises(InputError):
        env.step(action)
    env.step(2)
    env.step(np.int64(1))


@pytest.mark.parametrize(
    "options",
    [
        {"step_mode": "clip"},
        {"observation": "rgb"},
        {"observation": "latent", "step_mode": "frame"},
        {"max_chunks": 0},
        {"max_chunks": 1.5},
        {"termination_threshold": float("nan")},
        {"termination_threshold": None},
        {"termination_threshold": "0.5"},
        {"guidance": "x"},
        {"temperature": [1.0]},
        {"guidance": -1.0},
        {"temperature": float("inf")},
        {"context": "endless"},
        {"render_mode": "ansi"},
    ],
    ids=str,
)
def test_bad_options(toy: WorldModel, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        envs.WorldModelEnv(toy, **options)


def test_no_such_world() -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        envs.WorldModelEnv("atlantis")


def test_before_reset(toy: WorldModel) -> None:
    env = envs.WorldModelEnv(toy, render_mode="rgb_array")
    for call in (env.snapshot, env.render, lambda: env.step(torque(0)), lambda: env.fork(2)):
        with pytest.raises(gymnasium.error.ResetNeeded):
            call()


def test_human_rendering_names_the_wheel(toy: WorldModel) -> None:
    if "human" in envs.WorldModelEnv.metadata["render_modes"]:
        pytest.skip("this OpenCV has windows")
    with pytest.raises(WorldModelError, match="pip install opencv-python") as caught:
        envs.WorldModelEnv(toy, render_mode="human")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("step_mode", ["chunk", "frame"])
def test_rgb_array_list_has_every_frame(toy: WorldModel, step_mode: Any) -> None:
    env = envs.WorldModelEnv(toy, step_mode=step_mode, render_mode="rgb_array_list")
    observations = [env.reset(seed=0)[0], *(step[0] for step in play(env, 5))]
    frames = np.concatenate(observations) if step_mode == "chunk" else np.stack(observations)
    np.testing.assert_array_equal(np.stack(env.render()), frames)
    assert env.render() == []


@pytest.mark.parametrize("step_mode", ["chunk", "frame"])
def test_score_then_observe(toy: WorldModel, step_mode: Any) -> None:
    env = envs.WorldModelEnv(toy, step_mode=step_mode, max_chunks=2, **NEVER)
    env.reset(seed=0, options={"bank_index": 0})
    frames = toy.starts["frames"][1, 0]
    state = env.state
    score = env.score(frames, torque(1))
    assert env.state is state
    assert env.score(frames, torque(1), draws=4).log_prob.shape == (1,)
    observation, reward, terminated, truncated, info = env.observe(frames, torque(1))
    np.testing.assert_array_equal(observation, frames if step_mode == "chunk" else frames[-1])
    assert info["log_prob"] == pytest.approx(float(score.log_prob[0]), abs=1e-9)
    assert (type(reward), terminated, truncated, info["chunk"]) == (float, False, False, 1)
    assert env.observe(frames)[3]
    for bad in (frames[:3], frames.astype(np.float32), frames[:, :8], "frames", [[1], [1, 2]]):
        with pytest.raises(InputError):
            env.observe(bad)  # type: ignore[arg-type]
        with pytest.raises(InputError):
            env.score(bad)  # type: ignore[arg-type]


def test_observe_waits_for_the_end_of_a_chunk(toy: WorldModel) -> None:
    env = envs.WorldModelEnv(toy, step_mode="frame")
    env.reset(seed=0)
    env.step(torque(0))
    with pytest.raises(InputError, match="3 frames of this chunk"):
        env.observe(toy.starts["frames"][0, 0])


def test_imagine_is_what_step_brings(toy: WorldModel) -> None:
    env = envs.WorldModelEnv(toy)
    env.reset(seed=0)
    plan = np.linspace(-2, 2, 5, dtype=np.float32)[:, None]
    chunks = env.imagine(plan)
    for chunk, action in zip(chunks, plan, strict=True):
        np.testing.assert_array_equal(env.step(action)[0], chunk.frames[0].numpy())
    for bad in (None, 3.0, np.zeros((2, 2), np.float32), np.full((2, 1), np.nan, np.float32)):
        with pytest.raises(InputError):
            env.imagine(bad)


def test_guidance_and_temperature_reach_the_sampler(toy: WorldModel) -> None:
    frames = []
    for options in ({}, {"guidance": 2.0}, {"temperature": 0.0}):
        env = envs.WorldModelEnv(toy, **options)
        env.reset(seed=0)
        frames.append(env.step(torque(2))[0])
    assert (frames[0] != frames[1]).any()
    assert (frames[0] != frames[2]).any()
    assert env.last_chunk.guided_log_prob is None
