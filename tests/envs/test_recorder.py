"""Videos are read back: every frame, at the right speed."""

from pathlib import Path
from typing import Any

import cv2
import gymnasium
import numpy as np
import pytest

import envs
from envs.recorder import CODECS
from tests.full_disk import python
from worldmodel import CheckpointError, InputError, WorldModel


def read_video(path: Path) -> tuple[np.ndarray, float]:
    """Frames (n, height, width, 3) uint8 RGB and frames a second."""
    if path.suffix == ".gif":
        done, animation = cv2.imreadanimation(str(path))
        assert done
        return np.stack([f[..., 2::-1] for f in animation.frames]), 1000 / float(animation.durations[0])
    video, frames = cv2.VideoCapture(str(path)), []
    fps = video.get(cv2.CAP_PROP_FPS)
    while True:
        more, frame = video.read()
        if not more:
            return np.stack(frames)[..., ::-1], fps
        frames.append(frame)


def moving_bar(n: int = 23) -> np.ndarray:
    """A bright bar that grows by 2 pixels a frame."""
    frames = np.full((n, 64, 64, 3), (220, 60, 20), dtype=np.uint8)
    for i in range(n):
        frames[i, :, : 2 * i + 4] = (20, 200, 240)
    return frames


@pytest.mark.parametrize("suffix", CODECS)
@pytest.mark.parametrize("fps", [20.0, 10.0, 50.0])
def test_every_frame_comes_back(tmp_path: Path, suffix: str, fps: float) -> None:
    path = tmp_path / f"bar{suffix}"
    envs.write_video(path, moving_bar(), fps)
    frames, speed = read_video(path)
    assert frames.shape == (23, 64, 64, 3)
    assert speed == pytest.approx(fps, rel=1e-3)
    errors = np.abs(frames.astype(int) - moving_bar()).mean(axis=(1, 2, 3))
    assert errors.max() < 4
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_a_video_that_does_not_fit_leaves_the_old_one(tmp_path: Path, suffix: str) -> None:
    """OpenCV's writer reports nothing where a disk is full."""
    path = tmp_path / f"bar{suffix}"
    envs.write_video(path, moving_bar(), 20.0)
    before = path.read_bytes()
    code = """
import sys, envs, numpy as np
noise = np.random.default_rng(0).integers(0, 256, (60, 128, 128, 3), dtype=np.uint8)
try:
    envs.write_video(sys.argv[1], noise, 20.0)
except envs.recorder.CheckpointError as error:
    print(error)
"""
    done = python(code, path, file_size=100_000)
    assert "of 60 frames could be written; is the disk full?" in done.stdout, done.stderr[-500:]
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step_mode", ["chunk", "frame"])
@pytest.mark.parametrize("observation", ["pixels", "latent"])
def test_a_recorded_episode_has_all_frames(
    toy: WorldModel, tmp_path: Path, step_mode: Any, observation: Any
) -> None:
    if (step_mode, observation) == ("frame", "latent"):
        pytest.skip("no such environment")
    options = {"max_chunks": 3, "termination_threshold": 2.0, "observation": observation}
    env = envs.RecordChunks(envs.WorldModelEnv(toy, step_mode=step_mode, **options), tmp_path / "video.webm")
    for seed in (0, 1):
        env.reset(seed=seed)
        truncated = False
        while not truncated:
            *_, truncated, _ = env.step(env.action_space.sample())
    env.close()
    expected = 16 if step_mode == "chunk" else 13
    for name in ("video.webm", "video-1.webm"):
        frames, fps = read_video(tmp_path / name)
        assert (len(frames), fps) == (expected, 20.0)
    assert len(list(tmp_path.iterdir())) == 2


def test_through_make_and_wrappers(toy_path: Path, tmp_path: Path) -> None:
    env = gymnasium.make("worldmodel/Pendulum-v0", world=toy_path, max_chunks=2)
    recorder = envs.RecordChunks(env, tmp_path / "video.gif")
    assert recorder.write() is None
    recorder.reset(seed=0)
    recorder.step(recorder.action_space.sample())
    assert recorder.write() == tmp_path / "video.gif"
    assert len(read_video(tmp_path / "video.gif")[0]) == 8


@pytest.mark.parametrize(
    ("name", "frames", "fps"),
    [
        ("a.avi", moving_bar(2), 20),
        ("a", moving_bar(2), 20),
        ("a.webm", moving_bar(2)[..., :1], 20),
        ("a.webm", moving_bar(2).astype(np.float32), 20),
        ("a.webm", [], 20),
        ("a.webm", moving_bar(2), 0),
        ("a.webm", moving_bar(2), float("nan")),
        ("a.webm", moving_bar(2), float("inf")),
        ("a.gif", moving_bar(2), float("inf")),
    ],
    ids=str,
)
def test_bad_videos(tmp_path: Path, name: str, frames: Any, fps: float) -> None:
    with pytest.raises(InputError):
        envs.write_video(tmp_path / name, frames, fps)
    assert not list(tmp_path.iterdir())


def test_a_recorder_is_made_again_from_its_spec(toy_path: Path, tmp_path: Path) -> None:
    env = gymnasium.make("worldmodel/Pendulum-v0", world=toy_path, max_chunks=2)
    spec = envs.RecordChunks(env, tmp_path / "video.webm").spec
    assert spec is not None
    again = gymnasium.make(spec)
    assert again.has_wrapper_attr("episodes") and again.get_wrapper_attr("path") == tmp_path / "video.webm"


def test_an_old_video_survives_a_failed_one(tmp_path: Path, toy: WorldModel) -> None:
    path = tmp_path / "video.webm"
    path.write_bytes(b"old")
    with pytest.raises(InputError):
        envs.write_video(path, moving_bar().astype(float), 20)
    assert path.read_bytes() == b"old"
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError):
        envs.write_video(tmp_path / "file" / "video.webm", moving_bar(), 20)
    with pytest.raises(InputError):
        envs.RecordChunks(envs.WorldModelEnv(toy), tmp_path / "video.avi")
    with pytest.raises(InputError, match="no chunks"):
        envs.RecordChunks(gymnasium.make("CartPole-v1"), path)
