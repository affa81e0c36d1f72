"""Viewers: what they are shown, what they skip, and that nobody waits for them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest

from envs import RemoteEnv
from envs.serving.connection import Connection
from envs.serving.protocol import ServingError
from envs.serving.server import WorldServer
from envs.serving.watch import Film, View, Viewer, thinned, watch
from worldmodel import InputError


@pytest.fixture
def env(toy_server: WorldServer) -> Iterator[RemoteEnv]:
    env = RemoteEnv(toy_server.url, max_chunks=None)
    env.reset(seed=0)
    yield env
    env.close()


@contextmanager
def viewer(env: RemoteEnv, quality: int | None = None) -> Iterator[Viewer]:
    connection = Connection(env.session.connection.url)
    yield Viewer(connection, env.session.id, quality)
    connection.close()


def seen(view: View | None) -> View:
    assert view is not None
    return view


def test_a_view_carries_frames_step_action_and_likelihood(env: RemoteEnv) -> None:
    with viewer(env) as raw, viewer(env, 95) as compressed:
        observation, _, terminated, _, info = env.step([0.5])
        view, lossy = seen(raw.next()), seen(compressed.next())
    np.testing.assert_array_equal(view.frames, observation)
    assert view.log_prob == info["log_prob"] and view.bits_per_dim == info["bits_per_dim"]
    assert json.loads(view.action or "") == [0.5]
    assert view.seq == 1 and view.over == terminated
    assert lossy.frames.shape == view.frames.shape
    assert np.abs(lossy.frames.astype(int) - view.frames).mean() < 30
    text = " ".join(view.caption())
    assert "step 1" in text and "[0.5]" in text and f"{info['log_prob']:.1f} nats" in text
    assert f"{info['bits_per_dim']:.3f} bits/dim" in text
    pictures = view.pictures()
    assert pictures.shape[0] == 4 and pictures.shape[1] % 2 == pictures.shape[2] % 2 == 0
    np.testing.assert_array_equal(pictures[:, :384:12, :384:12], view.frames)
    assert pictures[:, 384:].any()


def test_a_slow_viewer_gets_the_newest_and_skips_the_rest(env: RemoteEnv) -> None:
    with viewer(env) as slow:
        first = seen(slow.next())
        for _ in range(5):
            last = env.step([0.0])[0]
        view = seen(slow.next())
        np.testing.assert_array_equal(view.frames, last)
        assert view.at == first.at + 5
        assert slow.next(0.05) is None


def test_a_waiting_viewer_is_woken(env: RemoteEnv) -> None:
    with viewer(env) as waiting:
        at = seen(waiting.next()).at
        timer = threading.Timer(0.2, lambda: env.step([0.0]))
        timer.start()
        assert seen(waiting.next(10.0)).at == at + 1
        timer.join()


def test_the_newest_session_is_followed(toy_server: WorldServer) -> None:
    connection = Connection(toy_server.url)
    follower = Viewer(connection)
    for seed in (1, 2):
        env = RemoteEnv(toy_server.url)
        observation, _ = env.reset(seed=seed)
        view = follower.next(10.0) or follower.next(10.0)
        np.testing.assert_array_equal(
            seen(view).frames[-1], cv2.imdecode(_jpeg(observation[-1]), cv2.IMREAD_COLOR)[..., ::-1]
        )
        env.close()
        assert follower.next(0.1) is None
    connection.close()


def _jpeg(frame: np.ndarray) -> np.ndarray:
    return cv2.imencode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])[1]


def test_a_named_session_that_is_gone_is_an_error(env: RemoteEnv) -> None:
    with viewer(env) as late:
        env.close()
        with pytest.raises(ServingError) as failed:
            late.next()
        assert failed.value.code == "no_session"


def _length(path: Path) -> int:
    video, frames = cv2.VideoCapture(str(path)), 0
    while video.read()[0]:
        frames += 1
    return frames


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize("chunks_a_second", [2, 5, 20])
def test_a_film_keeps_pace_with_the_clock(tmp_path: Path, suffix: str, chunks_a_second: int) -> None:
    """20 frames a second, whether chunks of 4 come too slowly, in time, or four times too fast."""
    now = 0.0
    path = tmp_path / f"film{suffix}"
    pictures = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    with Film(path, lambda: now) as film:
        for i in range(1, 3 * chunks_a_second + 1):
            now = i / chunks_a_second
            film.add(pictures, 20.0)
    assert abs(_length(path) - 60) <= 20 / chunks_a_second + 4
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_thinned() -> None:
    pictures = np.arange(8)
    assert thinned(pictures, 0).tolist() == []
    assert thinned(pictures, 1).tolist() == [7]
    assert thinned(pictures, 2).tolist() == [0, 7]
    assert thinned(pictures, 20).tolist() == list(range(8))


def test_watch_writes_a_video_while_the_world_goes_on(env: RemoteEnv, tmp_path: Path) -> None:
    stop = threading.Event()

    def play() -> None:
        while not stop.is_set():
            env.step([0.0])

    player = threading.Thread(target=play)
    player.start()
    connection = Connection(env.session.connection.url)
    try:
        began = time.monotonic()
        count = watch(connection, env.session.id, tmp_path / "live.mp4", 1.5, 85)
        took = time.monotonic() - began
    finally:
        stop.set()
        player.join()
        connection.close()
    assert count > 1
    assert 4 < _length(tmp_path / "live.mp4") <= 20 * took + 10  # its pace is another test's
    with pytest.raises(InputError, match=r"\.mp4 or \.webm"):
        Film(tmp_path / "live.gif")


@pytest.mark.slow
def test_a_2_fps_viewer_of_a_16_fps_world(toy_server: WorldServer) -> None:
    """Age of what it is shown at most 0.2 s; the producer loses less than 5 % of its steps."""
    env = RemoteEnv(toy_server.url, step_mode="frame", max_chunks=None)
    env.reset(seed=0)
    made: dict[int, float] = {}
    stop = threading.Event()

    def produce(seconds: float) -> int:
        began, steps = time.monotonic(), 0
        while time.monotonic() - began < seconds and not stop.is_set():
            env.step([0.0])
            steps += 1
            made[env.session.seq] = time.monotonic()
            time.sleep(max(0.0, began + steps / 16 - time.monotonic()))
        return steps

    alone = produce(5.0)
    watched: list[int] = []
    producer = threading.Thread(target=lambda: watched.append(produce(5.0)))
    producer.start()
    ages = []
    with viewer(env, 85) as slow:
        while producer.is_alive():
            view = slow.next(1.0)
            if view is not None and view.seq in made:
                ages.append(time.monotonic() - made[view.seq])
            time.sleep(0.5)
    producer.join()
    env.close()
    print(
        f"age p50 {np.median(ages):.3f} s, most {max(ages):.3f} s; steps alone {alone}, watched {watched[0]}"
    )
    assert np.median(ages) <= 0.2
    assert watched[0] > 0.95 * alone
