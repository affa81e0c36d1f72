"""`worldmodel monitor` and the wrapper of real environments."""

from __future__ import annotations

import copy
import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from gymnasium import spaces
from typer.testing import CliRunner

from agents import AnomalyMonitor, Clip, MonitoredEnv
from agents.anomaly.recordings import monitor_source, prepare_monitor, read_source, read_video
from envs import ChunkedEnv
from envs.recorder import write_video
from tests.toy import write_toy
from worldmodel import DataError, InputError, WorldModel
from worldmodel.cli import app
from worldmodel.condition.spaces import space_to_json
from worldmodel.files import config_to_dict
from worldmodel.training.collect import CollectConfig, collect
from worldmodel.training.episodes import EpisodeDataset

pytest.importorskip("pygame")
pytest.importorskip("matplotlib")
COLLECTION = CollectConfig("CartPole-v1", episodes=100, chunks=4, frame_size=(32, 32), seed=1, workers=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy world of CartPole-v1's actions, its normal episodes, and three more."""
    made = tmp_path_factory.mktemp("monitoring")
    collect(COLLECTION, made / "normal")
    collect(replace(COLLECTION, episodes=3, seed=2), made / "seen")
    write_toy(made / "world", EpisodeDataset.open(made / "normal").action_space)
    return made


@pytest.fixture(scope="module")
def world(folder: Path) -> WorldModel:
    return WorldModel.load(folder / "world")


@pytest.fixture(autouse=True)
def cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WORLDMODEL_CACHE", str(folder / "cache"))
    return folder / "cache"


def test_a_directory_of_episodes(folder: Path, cache: Path) -> None:
    arguments = ["monitor", str(folder / "seen"), "--world", str(folder / "world"), "--videos", "1"]
    arguments += ["--calibration", str(folder / "normal"), "--out", str(folder / "out"), "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    numbers = json.loads((folder / "out" / "monitor.json").read_text())
    assert [row["name"] for row in numbers["results"]] == ["000000", "000001", "000002"]
    with (folder / "out" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    chunks = [row["chunks"] for row in numbers["results"]]
    assert len(rows) == sum(chunks)
    assert max(float(row["score"]) for row in rows) == pytest.approx(
        max(row["highest_score"] for row in numbers["results"]), rel=1e-4
    )
    assert cv2.imread(str(folder / "out" / "monitor.png")) is not None
    videos = list((folder / "out").glob("*.mp4"))
    assert len(videos) == 1
    frames = cv2.VideoCapture(str(videos[0])).get(cv2.CAP_PROP_FRAME_COUNT)
    assert frames == 4 * chunks[int(videos[0].stem)]
    kept = list((cache / "monitors").glob("*.safetensors"))
    assert [str(k) for k in kept] == [numbers["calibration"]]
    written = kept[0].stat().st_mtime_ns
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert kept[0].stat().st_mtime_ns == written  # calibrated once


def test_a_video_is_judged_without_actions(folder: Path, world: WorldModel) -> None:
    pictures = read_source(folder / "seen", world).clips[0].frames.reshape(-1, 32, 32, 3)
    large = np.repeat(np.repeat(pictures, 4, axis=1), 4, axis=2)
    write_video(folder / "seen.mp4", np.concatenate((large, large[:3])), world.spec.fps)
    clip = read_video(folder / "seen.mp4", world)
    assert clip.actions is None
    assert clip.frames.shape == (len(pictures) // 4, 4, 32, 32, 3)
    assert np.abs(clip.frames.reshape(pictures.shape).astype(int) - pictures).mean() < 6
    monitor, _ = prepare_monitor(world, folder / "normal", 0.05, actions=False)
    records = monitor.score_episode(clip.frames)
    assert "action_loss" not in records[0].channels


def test_a_video_is_seen_as_the_world_sees(folder: Path, world: WorldModel, tmp_path: Path) -> None:
    pictures = read_source(folder / "seen", world).clips[0].frames.reshape(-1, 32, 32, 3)
    large = np.repeat(np.repeat(pictures, 4, axis=1), 4, axis=2)
    wide = np.pad(large, ((0, 0), (0, 0), (64, 64), (0, 0)))
    write_video(tmp_path / "a.mp4", np.repeat(wide, 2, axis=0), 2 * world.spec.fps)
    write_video(tmp_path / "b.avi.mp4", large, world.spec.fps)
    (tmp_path / "b.avi.mp4").rename(tmp_path / "b.avi")
    source = read_source(tmp_path, world)
    assert source.names == ["a.mp4", "b.avi"]
    for clip in source.clips:
        assert clip.frames.shape == (len(pictures) // 4, 4, 32, 32, 3)
        assert np.abs(clip.frames.reshape(pictures.shape).astype(int) - pictures).mean() < 6


def test_videos_that_differ_in_their_suffix_alone(folder: Path, world: WorldModel, tmp_path: Path) -> None:
    pictures = read_source(folder / "seen", world).clips[0].frames[:3].reshape(-1, 32, 32, 3)
    for name in ("a.mp4", "a.webm", "b.mp4"):
        write_video(tmp_path / "videos" / name, pictures, world.spec.fps)
    (tmp_path / "videos" / "b.mp4").rename(tmp_path / "videos" / "B.MP4")
    numbers = monitor_source(world, tmp_path / "videos", folder / "normal", tmp_path / "out", None, videos=3)
    assert [row["name"] for row in numbers["results"]] == ["B.MP4", "a.mp4", "a.webm"]
    assert numbers["alpha"] == 0.05
    assert {f.name for f in (tmp_path / "out").glob("*.mp4")} == {"B.MP4.mp4", "a.mp4.mp4", "a.webm.mp4"}


def test_a_saved_monitor_keeps_its_alpha(folder: Path, world: WorldModel) -> None:
    _, kept = prepare_monitor(world, folder / "normal", None, actions=True)
    for alpha in (None, 0.05):
        assert prepare_monitor(world, kept, alpha, actions=True)[0].alpha == 0.05
    with pytest.raises(InputError, match=r"is calibrated to alpha 0\.05, not 0\.1; ask for 0\.05"):
        prepare_monitor(world, kept, 0.1, actions=True)


def test_fresh_episodes_are_kept_in_the_cache_folder(
    world: WorldModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(made: CollectConfig, folder: Path) -> None:
        raise DataError(str(folder.parent))

    own = copy.copy(world)
    own.spec = replace(world.spec, environment=config_to_dict(COLLECTION))
    monkeypatch.setattr("worldmodel.training.evaluate.collect", stop)
    with pytest.raises(DataError, match=re.escape(str(cache / "held_out"))):
        prepare_monitor(own, None, None, actions=True)


def test_an_alpha_that_cannot_be_had_is_refused_before_anything_is_collected(
    folder: Path, world: WorldModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agents.anomaly.recordings.held_out_dataset", None)
    monkeypatch.setattr("agents.anomaly.recordings._identity", None)
    for calibration in (None, folder / "normal"):
        with pytest.raises(InputError, match="alpha is 2"):
            prepare_monitor(world, calibration, 2.0, actions=True)
    with pytest.raises(InputError, match=r"alpha 0\.001 needs at least 999"):
        prepare_monitor(world, None, 0.001, actions=True)


def test_sources_that_are_refused(folder: Path, world: WorldModel, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no directory of episodes"):
        read_source(tmp_path, world)
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    with pytest.raises(DataError, match="not a video"):
        read_source(tmp_path / "broken.mp4", world)
    write_video(tmp_path / "short.mp4", np.zeros((9, 32, 32, 3), np.uint8), world.spec.fps)
    with pytest.raises(InputError, match="9 frames at the world's .* a second, expected at least 12"):
        read_source(tmp_path / "short.mp4", world)
    shutil.copytree(folder / "seen", tmp_path / "small")
    info = json.loads((tmp_path / "small" / "dataset.json").read_text())
    (tmp_path / "small" / "dataset.json").write_text(json.dumps({**info, "frame_size": [16, 16]}))
    with pytest.raises(DataError, match=r"frames \(16, 16\)"):
        read_source(tmp_path / "small", world)
    other = {**info, "action_space": space_to_json(spaces.Box(-2, 2, (1,)))}
    (tmp_path / "small" / "dataset.json").write_text(json.dumps(other))
    takes = (
        r"of CartPole-v1 have actions Box\(.*\), the world toy takes Discrete\(2\); give --world a world of"
    )
    with pytest.raises(DataError, match=takes):
        read_source(tmp_path / "small", world)
    done = CliRunner().invoke(app, ["monitor", str(tmp_path / "nowhere")])
    assert done.exit_code == 1
    assert "does not exist" in str(done.exception)


def test_a_real_environment_says_what_is_wrong(folder: Path, world: WorldModel) -> None:
    monitor, _ = prepare_monitor(world, folder / "normal", 0.05, actions=True)
    env = MonitoredEnv(ChunkedEnv("CartPole-v1", frame_size=(32, 32)), monitor)
    _, info = env.reset(seed=0)
    assert (info["anomaly_score"], info["anomaly_alarm"], info["anomaly_onset"]) == (0.0, False, -1)
    clip = Clip(*(np.array(part) for part in zip(*(step(env, t % 2) for t in range(3)), strict=True)))
    expected = monitor.score_episode(clip.frames, clip.actions)
    assert env.last_record is not None
    assert env.last_record.p_value == pytest.approx(expected[2].p_value, rel=1e-12)  # sums in another order
    _, info = env.reset(seed=1)
    assert env.last_record is None
    _, _, _, _, info = env.step(1)
    assert {k for k in info if k.startswith("anomaly_")} == {
        f"anomaly_{k}" for k in ("score", "p_value", "statistic", "alarm", "onset")
    }
    assert all(type(v) in (float, int, bool) for k, v in info.items() if k.startswith("anomaly_"))


def test_a_monitor_that_is_not_to_know_actions_watches_too(folder: Path, world: WorldModel) -> None:
    monitor, _ = prepare_monitor(world, folder / "normal", 0.05, actions=False)
    env = MonitoredEnv(ChunkedEnv("CartPole-v1", frame_size=(32, 32)), monitor)
    env.reset(seed=0)
    frames = np.stack([step(env, t % 2)[0] for t in range(3)])
    assert env.last_record is not None and "action_loss" not in env.last_record.channels
    assert env.last_record.p_value == pytest.approx(monitor.score_episode(frames)[2].p_value, rel=1e-12)


def step(env: MonitoredEnv, action: int) -> tuple[np.ndarray, int]:
    frames, _, terminated, truncated, info = env.step(action)
    assert not (terminated or truncated)
    assert info["anomaly_p_value"] == env.last_record.p_value
    return frames, action


def test_environments_that_are_refused(folder: Path, world: WorldModel) -> None:
    monitor, _ = prepare_monitor(world, folder / "normal", 0.05, actions=True)
    with pytest.raises(InputError, match="ChunkedEnv"):
        MonitoredEnv(ChunkedEnv("CartPole-v1", frame_size=(16, 16)), monitor)
    with pytest.raises(InputError, match="not calibrated"):
        MonitoredEnv(ChunkedEnv("CartPole-v1", frame_size=(32, 32)), AnomalyMonitor(world))
