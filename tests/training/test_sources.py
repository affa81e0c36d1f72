"""Minari, LeRobot and folders of videos, written here as their documentation says, read back as episodes."""

from __future__ import annotations

import csv
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from worldmodel.condition.spaces import space_to_json
from worldmodel.errors import ConfigError, DataError
from worldmodel.files import read_json, write_json
from worldmodel.training.datasets import converted
from worldmodel.training.episodes import EpisodeDataset
from worldmodel.training.sources import open_source, read_actions, read_video

av = pytest.importorskip("av")
SIZE = (16, 24)


def film(frames: int, seed: int = 0) -> np.ndarray:
    """(frames, 16, 24, 3) uint8: noise, so that no two frames are alike."""
    return np.random.default_rng(seed).integers(0, 256, (frames, *SIZE, 3), dtype=np.uint8)


def write_video(
    path: Path, frames: np.ndarray, fps: int = 10, codec: str = "libx264rgb", **options: str
) -> None:
    """Lossless by default."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options or {"crf": "0", "g": "4"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "rgb24" if codec == "libx264rgb" else "yuv420p"
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


# ---- folders of videos ------------------------------------------------------------------------------------------------
def test_videos_with_captions_and_actions(tmp_path: Path) -> None:
    films = [film(9, 0), film(11, 1), film(10, 2)]
    actions = [np.linspace(-1, 1, 2 * n).reshape(n, 2).astype(np.float32) for n in (8, 11, 9)]
    for name, frames in zip("abc", films, strict=True):
        write_video(tmp_path / "in" / f"{name}.mp4", frames)
    (tmp_path / "in" / "a.txt").write_text("a red ball\n")
    np.save(tmp_path / "in" / "a.npy", actions[0])
    with (tmp_path / "in" / "b.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["x", "y"], *actions[1].tolist()])
    (tmp_path / "in" / "c.json").write_text(json.dumps({"actions": actions[2].tolist()}))
    dataset = converted(str(tmp_path / "in"), tmp_path / "out", SIZE, 4, None)
    assert dataset.episodes == 3 and dataset.info["fps"] == 10.0
    assert dataset.action_space.shape == (4, 2)  # a chunk's four actions, none lost
    for i in range(3):
        episode = dataset.episode(i)
        assert np.array_equal(episode.frames, films[i][:9])  # what does not fill a chunk is left out
        np.testing.assert_allclose(episode.actions.reshape(8, 2), actions[i][:8], atol=1e-6)
        assert episode.truncated[-1] and not episode.terminated.any()
    assert [dataset.episode(i).meta["caption"] for i in range(3)] == ["a red ball", "", ""]


def test_a_folder_may_say_what_its_actions_are(tmp_path: Path) -> None:
    """Recorded actions seldom touch their bounds."""
    space, folder = spaces.Box(-1, 1, (2,)), tmp_path / "in"
    write_video(folder / "a.mp4", film(9))
    np.save(folder / "a.npy", np.linspace(-0.99, 0.98, 16).reshape(8, 2))
    assert open_source(str(folder)).space != space
    write_json(folder / "action_space.json", space_to_json(space))
    assert open_source(str(folder)).space == space
    assert converted(str(folder), tmp_path / "out", SIZE, 4, space).action_space == space  # a world's own
    for wrong, words in (
        (space_to_json(spaces.Box(-0.5, 1, (2,))), r"does not describe these actions: .*outside Box"),
        (space_to_json(spaces.Box(-1, 1, (3,))), "does not describe these actions: cannot reshape"),
        (space_to_json(spaces.Discrete(2)), "does not describe these actions"),
        ({"kind": "Ball"}, "does not describe these actions: unknown kind of space"),
    ):
        write_json(folder / "action_space.json", wrong)
        with pytest.raises(DataError, match=words):
            open_source(str(folder))


def test_videos_without_actions_carry_their_captions(tmp_path: Path) -> None:
    write_video(tmp_path / "in" / "a.mp4", film(5))
    (tmp_path / "in" / "a.txt").write_text("a red ball")
    dataset = converted(str(tmp_path / "in"), tmp_path / "out", SIZE, 4, None)
    assert isinstance(dataset.action_space, spaces.Text)
    assert dataset.episode(0).actions.tolist() == ["a red ball"]


def test_pictures_are_cut_about_their_centre_and_resized(tmp_path: Path) -> None:
    frames = np.zeros((5, 32, 64, 3), dtype=np.uint8)
    frames[:, :, 16:48] = 200  # the centred square
    write_video(tmp_path / "in" / "a.mp4", frames)
    dataset = converted(str(tmp_path / "in"), tmp_path / "out", (16, 16), 4, None)
    assert (dataset.episode(0).frames == 200).all()


def test_the_worlds_own_actions_stay_one_a_chunk(tmp_path: Path) -> None:
    write_video(tmp_path / "in" / "a.mp4", film(9))
    np.save(tmp_path / "in" / "a.npy", np.array([0, 1, 2, 2, 1, 0, 0, 0]))
    stacked = converted(str(tmp_path / "in"), tmp_path / "stacked", SIZE, 4, spaces.Discrete(5))
    held = converted(str(tmp_path / "in"), tmp_path / "held", SIZE, 4, spaces.Discrete(3))
    assert stacked.action_space == spaces.MultiDiscrete([3, 3, 3, 3])
    assert stacked.episode(0).actions.tolist() == [[0, 1, 2, 2], [1, 0, 0, 0]]
    assert held.action_space == spaces.Discrete(3) and held.episode(0).actions.tolist() == [0, 1]


def test_an_interrupted_conversion_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        write_video(tmp_path / "in" / f"{name}.mp4", film(5))
    import worldmodel.training.datasets as module

    save, made = module.save_episode, []

    def stop_at_third(path: Path, episode: Any) -> None:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(path)
        save(path, episode)

    monkeypatch.setattr(module, "save_episode", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        converted(str(tmp_path / "in"), tmp_path / "out", SIZE, 4, None)
    with pytest.raises(DataError, match="unfinished"):
        EpisodeDataset.open(tmp_path / "out")
    stamps = [path.stat().st_mtime_ns for path in made]
    monkeypatch.setattr(module, "save_episode", save)
    assert converted(str(tmp_path / "in"), tmp_path / "out", SIZE, 4, None).episodes == 3
    assert [path.stat().st_mtime_ns for path in made] == stamps


def test_a_conversion_outlives_other_versions_of_numpy(tmp_path: Path) -> None:
    write_video(tmp_path / "in" / "a.mp4", film(9))
    converted(str(tmp_path / "in"), tmp_path / "out", SIZE, 4, None)
    note = tmp_path / "out" / "dataset.json"
    write_json(note, read_json(note) | {"provenance": {"numpy": "1.0"}})
    assert converted(str(tmp_path / "in"), tmp_path / "out", SIZE, 4, None).episodes == 1


def test_a_folder_is_free_for_another_conversion_until_it_holds_episodes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_video(tmp_path / name / "a.mp4", film(9))
    out = tmp_path / "out"
    with pytest.raises(DataError, match="has no actions, but the world takes some"):
        converted(str(tmp_path / "one"), out, SIZE, 4, spaces.Discrete(3))
    write_json(out / "dataset.json", {"format_version": 1, "complete": False})
    converted(str(tmp_path / "two"), out, SIZE, 4, None)
    with pytest.raises(ConfigError, match="holds another conversion"):
        converted(str(tmp_path / "one"), out, SIZE, 4, None)


def test_bad_videos_and_actions_are_one_line_errors(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_video(folder / "a.mp4", film(9))
    write_video(folder / "b.mp4", film(9))
    np.save(folder / "a.npy", np.zeros((8, 1)))
    with pytest.raises(DataError, match=r"b\.mp4 without actions"):
        open_source(str(folder))
    np.save(folder / "b.npy", np.zeros((5, 1)))
    with pytest.raises(DataError, match="5 actions for 9 frames"):
        converted(str(folder), tmp_path / "out", SIZE, 4, None)
    np.save(folder / "b.npy", np.zeros((8, 2)))
    with pytest.raises(DataError, match="differ in shape"):
        open_source(str(folder))
    np.save(folder / "b.npy", np.full((8, 1), np.nan))
    with pytest.raises(DataError, match="not finite"):
        open_source(str(folder))
    np.save(folder / "b.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"b\.npy: not actions"):
        open_source(str(folder))
    np.save(folder / "b.npy", np.zeros(8))
    (folder / "b.npy").write_bytes((folder / "b.npy").read_bytes().replace(b"<f8", b"<,8"))
    with pytest.raises(DataError, match=r"b\.npy: not actions"):
        read_actions(folder / "b.npy")
    (folder / "c.json").write_text('{"moves": []}')
    with pytest.raises(DataError, match=r"c\.json: not actions"):
        read_actions(folder / "c.json")
    (folder / "b.npy").unlink()
    (folder / "a.npy").unlink()
    (folder / "b.mp4").write_bytes(b"no video")
    with pytest.raises(DataError, match="no readable video"):
        open_source(str(folder))
    write_video(folder / "b.mp4", film(9), fps=20)
    with pytest.raises(DataError, match=r"one frame rate of 10, but b\.mp4 at 20"):
        open_source(str(folder))
    write_video(folder / "b.mp4", film(3))
    with pytest.raises(DataError, match="clip 1 has 3 frames, expected at least 5"):
        converted(str(folder), tmp_path / "short", SIZE, 4, None)


def test_unknown_sources_are_one_line_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        open_source(str(tmp_path / "nothing"))
    with pytest.raises(DataError, match="neither our episodes"):
        open_source(str(tmp_path))


# ---- LeRobot ----------------------------------------------------------------------------------------------------------
CAMERA = "observation.images.top"


def lerobot(
    root: Path, version: str, lengths: tuple[int, ...] = (9, 13), dtype: str = "video"
) -> list[np.ndarray]:
    """A dataset in LeRobot's layout; returns the episodes' frames. v2.1: one file an episode; v3.0: shared files."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    films = [film(n, i) for i, n in enumerate(lengths)]
    three = version == "v3.0"
    place = "chunk-{chunk_index:03d}/file-{file_index:03d}" if three else "chunk-{episode_chunk:03d}"
    info = {
        "codebase_version": version,
        "fps": 10,
        "chunks_size": 1000,
        "total_episodes": len(lengths),
        "features": {
            CAMERA: {"dtype": dtype, "shape": [*SIZE, 3], "names": ["height", "width", "channel"]},
            "action": {"dtype": "float32", "shape": [2], "names": ["x", "y"]},
            "next.reward": {"dtype": "float32", "shape": [1], "names": None},
            "next.done": {"dtype": "bool", "shape": [1], "names": None},
        },
        "data_path": f"data/{place}.parquet"
        if three
        else f"data/{place}/episode_{{episode_index:06d}}.parquet",
        "video_path": f"videos/{{video_key}}/{place}.mp4"
        if three
        else f"videos/{place}/{{video_key}}/episode_{{episode_index:06d}}.mp4",
    }
    (root / "meta").mkdir(parents=True)
    (root / "meta" / "info.json").write_text(json.dumps(info))
    tables, rows, seconds = [], [], 0.0
    for i, frames in enumerate(films):
        n = len(frames)
        columns: dict[str, Any] = {
            "action": [[float(i), t / 100] for t in range(n)],
            "next.reward": [1.0] * n,
            "next.done": [t == n - 2 for t in range(n)],
            "episode_index": [i] * n,
            "frame_index": list(range(n)),
            "timestamp": [t / 10 for t in range(n)],
        }
        if dtype == "image":
            import cv2

            pictures = [cv2.imencode(".png", f[..., ::-1])[1].tobytes() for f in frames]
            columns[CAMERA] = [{"bytes": b, "path": None} for b in pictures]
        tables.append(pa.table(columns))
        row = {"episode_index": i, "tasks": [f"task {i}"], "length": n}
        if three:
            row |= {"data/chunk_index": 0, "data/file_index": 0}
            row |= {f"videos/{CAMERA}/chunk_index": 0, f"videos/{CAMERA}/file_index": 0}
            row |= {
                f"videos/{CAMERA}/from_timestamp": seconds,
                f"videos/{CAMERA}/to_timestamp": seconds + n / 10,
            }
        rows.append(row)
        seconds += n / 10

    def table(path: str, content: Any) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(content, root / path)

    if three:
        table("data/chunk-000/file-000.parquet", pa.concat_tables(tables))
        table("meta/episodes/chunk-000/file-000.parquet", pa.Table.from_pylist(rows))
        if dtype == "video":
            write_video(root / "videos" / CAMERA / "chunk-000" / "file-000.mp4", np.concatenate(films))
        return films
    (root / "meta" / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i, frames in enumerate(films):
        table(f"data/chunk-000/episode_{i:06d}.parquet", tables[i])
        if dtype == "video":
            write_video(root / "videos" / "chunk-000" / CAMERA / f"episode_{i:06d}.mp4", frames)
    return films


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@pytest.mark.parametrize("dtype", ["video", "image"])
def test_lerobot(tmp_path: Path, version: str, dtype: str) -> None:
    films = lerobot(tmp_path / "in", version, dtype=dtype)
    dataset = converted(str(tmp_path / "in"), tmp_path / "out", SIZE, 4, None)
    assert dataset.episodes == 2 and dataset.action_space.shape == (4, 2)
    for i, frames in enumerate(films):
        episode = dataset.episode(i)
        assert np.array_equal(episode.frames, frames)
        expected = [[i, t / 100] for t in range(len(frames) - 1)]
        np.testing.assert_allclose(episode.actions.reshape(-1, 2), expected, atol=1e-6)
        assert episode.rewards.tolist() == [4.0] * (len(frames) // 4)
        assert episode.terminated[-1] and episode.meta["caption"] == f"task {i}"


def test_bad_lerobot_is_a_one_line_error(tmp_path: Path) -> None:
    root = tmp_path / "in"
    lerobot(root, "v3.0")
    info = json.loads((root / "meta" / "info.json").read_text())

    def with_info(**changes: Any) -> None:
        (root / "meta" / "info.json").write_text(json.dumps({**info, **changes}))

    with_info(codebase_version="v1.6")
    with pytest.raises(DataError, match=r"LeRobot v1\.6, expected"):
        open_source(str(root))
    with_info(features={**info["features"], "observation.images.wrist": info["features"][CAMERA]})
    with pytest.raises(DataError, match=r"several cameras; choose one with --camera: .*top, .*wrist"):
        open_source(str(root))
    assert len(open_source(str(root), CAMERA)) == 2
    with_info(data_path="../../{chunk_index}{file_index}.parquet")
    with pytest.raises(DataError, match="leads out of the dataset"):
        open_source(str(root))
    with_info()
    (root / "videos" / CAMERA / "chunk-000" / "file-000.mp4").unlink()
    with pytest.raises(DataError, match="no readable video"):
        converted(str(root), tmp_path / "out", SIZE, 4, None)
    file = root / "data" / "chunk-000" / "file-000.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read"):
        open_source(str(root))


@pytest.mark.parametrize("kind", ["videos", "lerobot"])
def test_clips_are_read_frame_by_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """They were held whole, at the size of the film: minutes of one took tens of gigabytes."""
    if kind == "videos":
        write_video(tmp_path / "in" / "a.mp4", film(40))
    else:
        lerobot(tmp_path / "in", "v3.0")
    given: list[weakref.ref[np.ndarray]] = []
    held = []

    def watched(file: Path, start: float = 0.0) -> Iterator[np.ndarray]:
        for frame in read_video(file, start):
            given.append(weakref.ref(frame))
            held.append(sum(each() is not None for each in given))
            yield frame

    monkeypatch.setattr("worldmodel.training.sources.read_video", watched)
    assert converted(str(tmp_path / "in"), tmp_path / "out", (8, 12), 4, None).episodes
    assert len(held) > 10 and max(held) <= 3


def test_av1_as_lerobot_writes_it(tmp_path: Path) -> None:
    if "libsvtav1" not in av.codecs_available:
        pytest.skip("this build of PyAV does not encode AV1")
    frames = np.repeat(np.arange(0, 240, 24, dtype=np.uint8), 64 * 64 * 3).reshape(10, 64, 64, 3)
    write_video(tmp_path / "a.mp4", frames, 10, "libsvtav1", g="2", crf="10")
    back = np.stack(list(read_video(tmp_path / "a.mp4", 0.4)))
    assert back.shape == (6, 64, 64, 3)
    assert np.abs(back.astype(int) - frames[4:]).max() < 8


# ---- Minari -----------------------------------------------------------------------------------------------------------
def write_minari(name: str, observations: list[Any], space: spaces.Space[Any], env: Any = None) -> None:
    """A local dataset of episodes of six steps with actions t % 3, a reward of 1 each, that end."""
    minari = pytest.importorskip("minari")
    pytest.importorskip("h5py")
    from minari.data_collector import EpisodeBuffer

    buffers = [
        EpisodeBuffer(
            id=i,
            observations=seen,
            actions=np.arange(6) % 3,
            rewards=np.ones(6),
            terminations=np.arange(6) == 5,
            truncations=np.zeros(6, dtype=bool),
            infos={},
        )
        for i, seen in enumerate(observations)
    ]
    minari.create_dataset_from_buffers(
        name,
        buffers,
        env=env,
        observation_space=space,
        action_space=spaces.Discrete(3),
        algorithm_name="none",
        author="a",
        author_email="a@b.c",
        description="a test",
        data_format="hdf5",
        jpeg_encoding=False,
    )


@pytest.mark.parametrize("named", [False, True])
def test_minari(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    pytest.importorskip("minari")
    with pytest.raises(DataError, match=r"minari:test/film-v0 is not on this machine \(here: none\)"):
        open_source("minari:test/film-v0")
    films = [film(7, 3), film(7, 4)]
    space: spaces.Space[Any] = spaces.Box(0, 255, (*SIZE, 3), np.uint8)
    seen: list[Any] = list(films)
    if named:
        space = spaces.Dict({"eye": space, "speed": spaces.Box(-1, 1, (2,), np.float32)})
        seen = [{"eye": f, "speed": np.zeros((7, 2), dtype=np.float32)} for f in films]
    write_minari("test/film-v0", seen, space)
    dataset = converted("minari:test/film-v0", tmp_path / "out", SIZE, 4, None)
    assert dataset.episodes == 2 and dataset.action_space == spaces.MultiDiscrete([3, 3, 3, 3])
    for i in range(2):
        episode = dataset.episode(i)
        shown = films[i][[0, 1, 2, 3, 4, 5, 6, 6, 6]]  # the end falls inside a chunk: its last frame stays
        assert np.array_equal(episode.frames, shown)
        assert episode.rewards.tolist() == [4.0, 2.0] and episode.terminated.tolist() == [False, True]
        assert episode.actions.tolist() == [[0, 1, 2, 0], [1, 2, 2, 2]]


def test_minari_without_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    numbers = np.zeros((7, 4), dtype=np.float32)
    write_minari("test/numbers-v0", [numbers], spaces.Box(-1, 1, (4,), np.float32), "CartPole-v1")
    source = open_source("minari:test/numbers-v0")
    assert source.fps == 50.0  # what CartPole renders at
    with pytest.raises(DataError, match="holds no pictures; record RGB observations"):
        source.clip(0)
