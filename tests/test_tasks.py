"""What can be made of a prompt, a picture, a clip and a source, and the command that writes it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from envs.recorder import write_video
from tests.toy import TEXT, toy_world, write_wan_toy
from worldmodel.cli import app
from worldmodel.errors import DataError, InputError
from worldmodel.media import fitted, read_clip, read_picture, write_picture
from worldmodel.sampling import Sampling
from worldmodel.tasks import Brief, Made, chunks_for, make, run
from worldmodel.world import WorldModel

pytest.importorskip("transformers")
pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts and the Wan2.2 codec, as a published model; windows of 6 chunks, re-encoded to 3."""
    return write_wan_toy(tmp_path_factory.mktemp("made") / "wan", space=TEXT)


@pytest.fixture(scope="module")
def world(path: Path) -> WorldModel:
    return WorldModel.load(path)


def clip(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 32, 32, 3), dtype=np.uint8)


def made(world: WorldModel, brief: Brief) -> list[Made]:
    return list(make(world, brief))


def shape(chunks: list[Made]) -> list[tuple[str, int]]:
    return [(m.kind[:3], m.chunk.frames.shape[1]) for m in chunks]


def test_text_to_video(world: WorldModel) -> None:
    chunks = made(world, Brief("a corgi", chunks=3, seed=4))
    assert shape(chunks) == [("ima", 1), ("ima", 4), ("ima", 4)]
    state = world.initial_state([4], ["a corgi"])
    for m in chunks:
        state, expected = world.step(state)
        assert torch.equal(m.chunk.frames, expected.frames)
    assert len(made(world, Brief())) == 6  # what the window holds


def test_longer_than_the_window(world: WorldModel) -> None:
    chunks = made(world, Brief("a corgi", chunks=9))
    assert [int(m.chunk.context_frames) for m in chunks] == [0, 1, 2, 3, 4, 5, 3, 4, 5]


def test_image_to_video(world: WorldModel) -> None:
    picture = clip(1)[0]
    chunks = made(world, Brief("a corgi", image=picture, chunks=2))
    assert shape(chunks) == [("obs", 1), ("ima", 4), ("ima", 4)]
    assert np.array_equal(chunks[0].chunk.frames[0, 0], picture)
    assert int(chunks[1].chunk.context_frames) == 1
    assert len(made(world, Brief(image=picture))) == 6


def test_video_continuation_observes_the_end(world: WorldModel) -> None:
    chunks = made(world, Brief("a corgi", clip=clip(40), chunks=2))
    assert shape(chunks) == [("obs", 1), ("obs", 4), ("obs", 4), ("ima", 4), ("ima", 4)]
    seen = torch.cat([m.chunk.frames[0] for m in chunks[:3]])
    assert np.array_equal(seen, clip(40)[-9:])
    assert shape(made(world, Brief(clip=clip(3), chunks=1))) == [("obs", 1), ("ima", 4)]


def test_video_to_video_has_the_source_before_it_and_begins_a_clip_of_its_own(world: WorldModel) -> None:
    chunks = made(world, Brief("a corgi", source=clip(10)))
    assert shape(chunks) == [("ima", 1), ("ima", 4), ("ima", 4)]
    assert [int(m.chunk.context_frames) for m in chunks] == [3, 4, 5]
    state = world.initial_state([0], ["(v2v) a corgi"])
    state, _ = world.observe_clip(state, clip(10)[None, :9], None)
    state, first = world.step(world.begin_clip(state))
    assert torch.equal(first.frames, chunks[0].chunk.frames)
    whole, _ = world.codec.decode(first.latent[:, None], world.codec.initial_state(1))
    assert torch.equal(whole, first.frames)
    other = made(world, Brief("a corgi", source=clip(10, seed=1)))
    assert not torch.equal(other[0].chunk.latent, chunks[0].chunk.latent)
    with pytest.raises(InputError, match="do not fit the window of 6"):
        made(world, Brief(source=clip(10), chunks=4))


def test_a_world_of_pictures_makes_one(tmp_path: Path) -> None:
    still = WorldModel.load(write_wan_toy(tmp_path / "still", space=TEXT, fps=0.0, window=1, context=1))
    assert still.prompts is not None and still.prompts.text("a corgi").startswith(
        "Noise Level 300:\nAn image:"
    )
    frames, record = run(still, Brief("a corgi"))
    assert frames.shape == (1, 32, 32, 3) and record["task"] == "text-to-image"
    with pytest.raises(InputError, match="no video"):
        chunks_for(still, 2.0)


def test_aspect_ratios_are_frame_sizes(world: WorldModel) -> None:
    wide = world.at((16, 48))
    assert wide.prompts is not None and wide.prompts.text("x").endswith("in a 21:9 aspect ratio.\n")
    frames, record = run(wide, Brief("a corgi", chunks=2))
    assert frames.shape == (5, 16, 48, 3) and record["frame_size"] == [16, 48]
    assert world.spec.frame_size == (32, 32) and world.at((32, 32)) is world


def test_a_fixed_codec_has_no_other_size(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one frame size"):
        toy_world(tmp_path / "toy", TEXT).at((16, 48))


def test_the_record_is_what_was_asked_and_how_likely_it_is(world: WorldModel) -> None:
    guided = world.with_sampling(Sampling(guidance=2.0))
    brief = Brief("a corgi", image=clip(1)[0], chunks=2, seed=3)
    frames, record = run(guided, brief)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert (
        frames.shape == (9, 32, 32, 3)
        and [c["kind"] for c in record["chunks"]] == ["observed"] + ["imagined"] * 2
    )
    chunks = made(guided, brief)
    assert [c["log_prob"] for c in record["chunks"]] == [float(m.chunk.log_prob) for m in chunks]
    assert record["chunks"][1]["guided_log_prob"] is not None and record["chunks"][1]["prompt_gain"] != 0
    assert record["text"] == "Noise Level 300:\nA video with 16 fps:\na corgi\n\n in a 1:1 aspect ratio.\n"
    assert record["task"] == "image-to-video" and record["complete"] and record["sampling"]["guidance"] == 2.0


def test_lengths(world: WorldModel) -> None:
    assert [chunks_for(world, s) for s in (0.01, 1 / 16, 5 / 16, 5.5 / 16, 81 / 16)] == [1, 1, 2, 3, 21]
    assert [chunks_for(world, s, goes_on=True) for s in (0.01, 4 / 16, 5 / 16)] == [1, 1, 2]
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError):
            chunks_for(world, seconds)


def test_bad_briefs(world: WorldModel) -> None:
    for brief in (lambda: Brief(clip=clip(1), source=clip(1)), lambda: Brief(chunks=0)):
        with pytest.raises(InputError):
            brief()
    with pytest.raises(InputError, match="no prompts"):
        made(WorldModel.load("pendulum"), Brief("a corgi", chunks=1))


def test_pictures_and_clips_are_read_at_the_worlds_size_and_speed(tmp_path: Path) -> None:
    picture = np.zeros((40, 100, 3), np.uint8)
    picture[:, 30:70, 0] = 200
    write_picture(tmp_path / "new" / "picture.png", picture)
    assert (read_picture(tmp_path / "new" / "picture.png", (20, 20)) == (200, 0, 0)).all()  # the middle
    assert fitted(picture, (64, 32)).shape == (64, 32, 3)
    frames = np.repeat(np.arange(0, 240, 20, dtype=np.uint8), 32 * 32 * 3).reshape(12, 32, 32, 3)
    write_video(tmp_path / "clip.mp4", frames, 8.0)
    for fps, count in ((8.0, 12), (16.0, 24), (4.0, 6)):
        read = read_clip(tmp_path / "clip.mp4", (32, 32), fps)
        assert read.shape == (count, 32, 32, 3)
        assert np.abs(read[-1].astype(int) - frames[-1]).max() < 12
    (tmp_path / "text.txt").write_text("no picture")
    for call in (read_picture, lambda p, size: read_clip(p, size, 8.0)):
        for name, words in (("text.txt", "OpenCV reads"), ("absent", "no such file")):
            with pytest.raises(DataError, match=words):
                call(tmp_path / name, (32, 32))
    with pytest.raises(DataError):
        write_picture(tmp_path / "picture.nothing", picture)


def test_the_commands_write_playable_files(path: Path, tmp_path: Path) -> None:
    write_picture(tmp_path / "picture.png", clip(1)[0])
    out, cache = tmp_path / "video.mp4", tmp_path / "prompts"
    more = ("--image", tmp_path / "picture.png", "--chunks", 3, "--guidance", 2, "--aspect", "16:9")
    arguments = ("generate", path, "--prompt", "a corgi", *more, "--prompt-cache", cache, "--out", out)
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    assert "13 frames of 32 x 48" in done.output
    reader = cv2.VideoCapture(str(out))
    assert reader.get(cv2.CAP_PROP_FRAME_COUNT) == 13 and reader.get(cv2.CAP_PROP_FPS) == 16
    record = json.loads(out.with_name("video.mp4.json").read_text())
    assert len(record["chunks"]) == 4 and record["complete"]
    assert len(list(cache.glob("*.safetensors"))) == 2
    told = ("rollout", path, "--prompt", "a corgi", "--chunks", 2, "--out", tmp_path / "rollout.gif")
    done = CliRunner().invoke(app, [str(a) for a in told])
    assert done.exit_code == 0 and "5 frames" in done.output, done.output


@pytest.mark.slow
def test_ctrl_c_writes_what_is_there(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "video.mp4"
    asked = ("generate", str(path), "--prompt", "a cat", "--chunks", "100000", "--out", str(out))
    process = subprocess.Popen(
        [sys.executable, "-m", "worldmodel", *asked],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    seen, deadline = "", time.monotonic() + 120
    while "nats=" not in seen and time.monotonic() < deadline:
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130 and "frames were ready" in errors.splitlines()[-1]
    record = json.loads(out.with_name("video.mp4.json").read_text())
    frames = sum(c["frames"] for c in record["chunks"])
    assert not record["complete"] and frames >= 1
    assert cv2.VideoCapture(str(out)).get(cv2.CAP_PROP_FRAME_COUNT) == frames
