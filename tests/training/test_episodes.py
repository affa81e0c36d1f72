"""Episodes on disk and sampling from them."""

from pathlib import Path

import numpy as np
import pytest
from gymnasium import spaces

from worldmodel.condition.spaces import space_to_json
from worldmodel.errors import DataError, InputError
from worldmodel.files import write_json
from worldmodel.training.episodes import (
    Episode,
    EpisodeDataset,
    episode_path,
    load_episode,
    save_episode,
    split_indices,
)

SKIP, SIZE = 4, (8, 6)


def numbered(index: int, chunks: int) -> Episode:
    """An episode whose pixels say where they come from: channel 0 the episode, 1 the frame."""
    frames = np.zeros((1 + SKIP * chunks, *SIZE, 3), dtype=np.uint8)
    frames[..., 0] = index
    frames[..., 1] = np.arange(len(frames))[:, None, None]
    counts = np.arange(chunks)
    return Episode(
        frames,
        (100 * index + counts)[:, None].astype(np.float32),
        counts.astype(np.float32),
        counts == chunks - 1,
        np.zeros(chunks, dtype=bool),
        np.arange(len(frames), dtype=np.float32)[:, None],
        {"seed": index},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(20):
        save_episode(episode_path(tmp_path, index), numbered(index, 3 + index % 4))
    action_space = spaces.Box(0, 1e4, (1,))
    info = {
        "format_version": 1,
        "episodes": 20,
        "frame_skip": SKIP,
        "frame_size": list(SIZE),
        "fps": 20.0,
        "complete": True,
    }
    write_json(tmp_path / "dataset.json", info | {"action_space": space_to_json(action_space)})
    return tmp_path


def test_an_episode_survives_the_round_trip(tmp_path: Path) -> None:
    episode = numbered(3, 5)
    save_episode(tmp_path / "e.npz", episode)
    loaded = load_episode(tmp_path / "e.npz", SKIP)
    for name in Episode._fields[:-1]:
        array = getattr(loaded, name)
        assert np.array_equal(array, getattr(episode, name)) and array.dtype == getattr(episode, name).dtype
    assert loaded.meta == episode.meta


def test_dict_and_text_actions_survive(tmp_path: Path) -> None:
    actions = {"move": np.arange(5), "say": np.array(["a", "bc", "", "d", "e"])}
    save_episode(tmp_path / "e.npz", numbered(0, 5)._replace(actions=actions))
    loaded = load_episode(tmp_path / "e.npz", SKIP).actions
    assert loaded.keys() == actions.keys()
    assert all(np.array_equal(loaded[k], actions[k]) for k in actions)


@pytest.mark.parametrize(("count", "test", "validation"), [(900, 90, 45), (20, 2, 1), (3, 1, 1), (1, 0, 0)])
def test_the_split_holds_out_the_last(count: int, test: int, validation: int) -> None:
    parts = [split_indices(count, name) for name in ("train", "validation", "test")]
    assert [i for part in parts for i in part] == list(range(count))
    assert [len(part) for part in parts[1:]] == [validation, test]
    with pytest.raises(InputError, match="no split"):
        split_indices(count, "all")  # type: ignore[arg-type]


@pytest.mark.parametrize("in_memory", [True, False])
def test_windows_are_aligned_and_a_function_of_the_rng(folder: Path, in_memory: bool) -> None:
    split = EpisodeDataset.open(folder).split("train", in_memory)
    windows = split.sample_windows(64, 3, np.random.default_rng(0))
    assert windows.frames.shape == (64, 3, SKIP, *SIZE, 3) and windows.observations.shape == (64, 3, SKIP, 1)
    chunk = windows.start[:, None] + np.arange(3)
    frame = 1 + SKIP * chunk[..., None] + np.arange(SKIP)
    assert np.array_equal(windows.frames[..., 0, 0, 1], frame)
    assert np.array_equal(windows.observations[..., 0], frame)
    assert np.array_equal(
        windows.frames[..., 0, 0, 0], np.broadcast_to(windows.episode[:, None, None], frame.shape)
    )
    assert np.array_equal(windows.actions[..., 0], 100 * windows.episode[:, None] + chunk)
    assert np.array_equal(windows.rewards, chunk)
    lengths = 3 + windows.episode % 4
    assert np.array_equal(windows.terminated, chunk == lengths[:, None] - 1)
    again = split.sample_windows(64, 3, np.random.default_rng(0))
    assert all(np.array_equal(a, b) for a, b in zip(windows, again, strict=True))
    places = {(int(e), int(s)) for e, s in zip(windows.episode, windows.start, strict=True)}
    every = {(e, s) for e in split.indices for s in range(1 + e % 4)}
    assert places <= every and len(places) > 0.7 * len(every)


def test_chunks_are_aligned_or_anywhere(folder: Path) -> None:
    split = EpisodeDataset.open(folder).split("train")
    aligned = split.sample_chunks(200, np.random.default_rng(0))[:, :, 0, 0, 1]
    assert aligned.shape == (200, SKIP) and set(aligned[:, 0] % SKIP) == {1}
    anywhere = split.sample_chunks(200, np.random.default_rng(0), aligned=False)[:, :, 0, 0, 1]
    assert set(anywhere[:, 0] % SKIP) == {0, 1, 2, 3} and 0 in anywhere
    assert (np.diff(anywhere, axis=1) == 1).all()


def test_what_is_not_there_or_not_whole_is_one_line(folder: Path) -> None:
    dataset = EpisodeDataset.open(folder)
    with pytest.raises(DataError, match="no episode has 9 chunks"):
        dataset.split("train").sample_windows(1, 9, np.random.default_rng(0))
    path = episode_path(folder, 4)
    whole = path.read_bytes()
    at = whole.index(b"PK\x01\x02")  # the directory: its first entry has version, flags and method
    flipped = [whole[:i] + bytes([whole[i] ^ 64]) + whole[i + 1 :] for i in (at + 6, at + 8, at + 10)]
    for broken in (b"", whole[:100], whole[:-30], whole[:200] + b"\0" * 40 + whole[240:], *flipped):
        path.write_bytes(broken)
        with pytest.raises(DataError) as caught:
            dataset.episode(4)
        assert "000004.npz is truncated or corrupt" in str(caught.value) and "\n" not in str(caught.value)
    save_episode(path, numbered(4, 3)._replace(rewards=np.zeros(2, dtype=np.float32)))
    with pytest.raises(DataError, match="do not agree"):
        dataset.episode(4)
    path.unlink()
    with pytest.raises(DataError, match="lacks 1 of 20 episodes"):
        EpisodeDataset.open(folder)
    with pytest.raises(DataError, match="is not a dataset"):
        EpisodeDataset.open(folder / "episodes")
    write_json(folder / "dataset.json", {"format_version": 1, "complete": True, "episodes": 20})
    with pytest.raises(DataError, match="lacks frame_skip, frame_size, fps, action_space; collect again"):
        EpisodeDataset.open(folder)


def test_rewards_that_are_not_finite_are_refused(folder: Path) -> None:
    dataset = EpisodeDataset.open(folder)
    assert dataset.lengths().tolist() == [3 + i % 4 for i in range(20)]
    rewards = np.array([1, np.inf, np.nan], dtype=np.float32)
    save_episode(episode_path(folder, 4), numbered(4, 3)._replace(rewards=rewards))
    for read in (lambda: dataset.episode(4), dataset.lengths):
        with pytest.raises(
            DataError, match="000004.npz: chunk 1 has the reward inf, expected finite numbers"
        ):
            read()


def test_episodes_that_others_wrote_are_read_as_ours(folder: Path) -> None:
    """Whole numbers as rewards ended the training of heads, when codec and flow were done."""
    dataset, ours = EpisodeDataset.open(folder), numbered(4, 3)
    theirs = {"rewards": ours.rewards.astype(np.int64), "terminated": ours.terminated.astype(np.int64)}
    theirs |= {"observations": ours.observations.astype(np.float64)}
    save_episode(episode_path(folder, 4), ours._replace(**theirs))
    read = dataset.episode(4)
    assert [getattr(read, n).dtype for n in theirs] == [np.float32, np.bool_, np.float32]
    assert np.array_equal(read.terminated, ours.terminated)
    save_episode(episode_path(folder, 4), ours._replace(frames=ours.frames[:, :-1]))
    height, width = ours.frames.shape[1:3]
    with pytest.raises(DataError, match=rf"frames of \({height - 1}, {width}\) pixels, dataset.json says"):
        dataset.episode(4)


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "e.npz").open("wb") as file:
        np.savez(file, frames=np.array([{}], dtype=object), meta=np.array("{}"))
    with pytest.raises(DataError, match="allow_pickle"):
        load_episode(tmp_path / "e.npz", SKIP)
