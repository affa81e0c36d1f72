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
import zmq

from benchmarks.null_world import NullBackend
from envs import RemoteEnv
from envs.serving import viewers
from envs.serving.connection import Connection
from envs.serving.protocol import ServingError
from envs.serving.security import KeyStore, read_secret
from envs.serving.server import WorldServer
from envs.serving.sessions import Session
from envs.serving.watch import Film, View, Viewer, thinned, watch
from envs.serving.worker import Outcome
from tests.envs.serving.wire import Wire
from worldmodel import InputError
from worldmodel.cli_watch import watch as command


@pytest.fixture
def env(toy_server: WorldServer) -> Iterator[RemoteEnv]:
    env = RemoteEnv(toy_server.url, max_chunks=None)
    env.reset(seed=0)
    yield env
    env.close()


def test_ctrl_c_keeps_what_was_seen(
    env: RemoteEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, old = tmp_path / "live.mp4", tmp_path / "old.mp4"
    old.write_bytes(b"old")
    views = [Viewer.next]

    def interrupted(viewer: Viewer, wait: float) -> View | None:
        if not views:
            raise KeyboardInterrupt
        return views.pop()(viewer, wait)

    monkeypatch.setattr(Viewer, "next", interrupted)
    for out, said in ((path, f"1 changes seen, written to {path}\n"), (old, "0 changes seen\n")):
        command(env.session.connection.url, env.session.id.hex(), out)
        assert capsys.readouterr().err == said
    assert _length(path) >= 4
    assert old.read_bytes() == b"old"


def test_a_film_needs_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose another folder"):
        Film(tmp_path / "file" / "live.mp4")


@pytest.fixture
def null() -> Iterator[Wire]:
    with WorldServer(NullBackend(), "tcp://127.0.0.1:*") as server, Wire(server.url) as wire:
        yield wire


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


@pytest.mark.parametrize(
    ("action", "shown"),
    [
        ("[-1.2688051462173462]", "[-1.27]"),
        ('{"n": 12345, "a": 3.3333e-8}', '{"n": 12345, "a": 3.3...'),
        ('"turn 1.23456 degrees"', '"turn 1.23456 degrees"'),
        (None, "-"),
    ],
)
def test_actions_are_shown_to_three_digits(action: str | None, shown: str) -> None:
    view = View(np.zeros((1, 8, 8, 3), np.uint8), 1, 1, action, 0.0, False, 0.0, 0.0, "toy", 20.0)
    assert view.caption()[0].endswith(f"action {shown}")


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


def follower(wire: Wire, port: int, topic: bytes = b"") -> zmq.Socket[bytes]:
    """A subscriber of a broadcast."""
    socket = wire.context.socket(zmq.SUB)
    socket.linger, socket.conflate = 0, True
    if wire.keys is not None and wire.server is not None:
        socket.curve_publickey, socket.curve_secretkey = wire.keys.public, wire.keys.secret
        socket.curve_serverkey = wire.server
    socket.subscribe(topic)
    socket.connect(f"tcp://127.0.0.1:{port}")
    return socket


def test_who_subscribes_to_much_is_cut_off(null: Wire) -> None:
    """libzmq keeps 44 bytes for each byte of a topic, and reads them in the thread that serves all."""
    session = null.create()
    port = null.result("broadcast", session=session)["port"]
    greedy, sub = follower(null, port, bytes(2000)), follower(null, port)
    monitor, seq = greedy.get_monitor_socket(zmq.EVENT_DISCONNECTED), 0
    for socket in (monitor, sub):
        while not socket.poll(20):
            greedy.poll(0)  # a socket that is not looked at does not subscribe again
            seq += 1
            assert seq < 500 and null.step(session, seq).error is None
    greedy.disable_monitor()
    greedy.close(0)
    sub.close(0)


def test_a_revoked_key_sees_no_broadcast(tmp_path: Path) -> None:
    store = KeyStore(tmp_path)
    for name in ("alice", "bob"):
        store.allow(name, store.new(name).public)
    alice, bob = (read_secret(tmp_path / f"{name}.secret") for name in ("alice", "bob"))
    with WorldServer(NullBackend(), "tcp://127.0.0.1:*", keys=store) as server:
        wire, other = (Wire(server.url, keys, server.public_key) for keys in (alice, bob))
        session, seq = wire.create(), 0
        port = wire.result("broadcast", session=session)["port"]
        subs = [follower(each, port) for each in (wire, other)]
        for sub in subs:
            while not sub.poll(20):
                seq += 1
                wire.step(session, seq)
        store.revoke("bob")
        time.sleep(0.3)  # it is noticed within two looks
        for sub in subs:
            while sub.poll(0):
                sub.recv()
        while not subs[0].poll(20):  # alice comes back by herself
            seq += 1
            wire.step(session, seq)
        for later in range(1, 21):
            wire.step(session, seq + later)
        assert not subs[1].poll(200)
        for socket in (*subs, wire.socket, other.socket):
            socket.close(0)


def test_a_large_action_is_not_made_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """That takes seconds for one of 16 MiB, in the thread that serves all."""
    written: list[object] = []
    monkeypatch.setattr(viewers, "_plain", lambda action: written.append(action) or "text")
    for n, text in ((3, '"text"'), (5000, None)):
        shown = Outcome({}, {}, np.zeros((1, 2, 2, 3), np.uint8), {"a": np.zeros(n), "b": "x"})
        session = Session(b"", "", {}, 0.0, shown=shown)
        assert viewers.picture(session, {"world": "null", "fps": 20.0})["action"] == text
    assert len(written) == 1


def test_a_waiting_viewer_is_told_that_the_server_stops() -> None:
    with WorldServer(NullBackend(), "tcp://127.0.0.1:*") as server, Wire(server.url) as wire:
        sent = wire.send("next", session=wire.create(), args={"after": 1, "wait": 30.0})
        wire.result("stats")
        server.drain()
        reply = wire.reply(5.0)
        assert reply.id == sent and reply.error is not None and reply.error.code == "busy"


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
