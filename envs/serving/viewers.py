"""Eyes on sessions: `next` requests that wait for a change, and broadcasts that keep only the newest one."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import zmq

from envs.serving.messages import encode_reply, join_frames
from envs.serving.protocol import Reply, Request, ServingError
from envs.serving.security import KeyPair
from envs.serving.sessions import Session, Waiter
from envs.serving.transport import bound
from worldmodel.errors import InputError

log = logging.getLogger(__name__)

MAX_BROADCASTS = 8
MAX_PARKED = 1024
MAX_WAIT = 30.0
MAX_ACTION_TEXT = 2048
MAX_ASKED = 1024  # bytes of what a subscriber sends at a time; libzmq keeps 44 for each byte of a topic


@dataclass(frozen=True)
class Parked:
    """A viewer that waits for ``session`` to change; quality of JPEG, or None for raw frames."""

    session: Session
    waiter: Waiter
    after: int
    expires: float
    quality: int | None


def picture(session: Session, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a viewer is told beside the frames."""
    shown = session.shown
    assert shown is not None
    small = shown.action is not None and _size(shown.action) <= MAX_ACTION_TEXT
    text = json.dumps(_plain(shown.action)) if small else None
    if text is not None and len(text) > MAX_ACTION_TEXT:
        text = None
    result = {k: v for k, v in shown.result.items() if k in ("reward", "terminated", "truncated", "info")}
    about = {"at": session.at, "seq": session.seq, "world": facts["world"], "fps": facts["fps"]}
    return {**result, **about, "action": text}


def _plain(action: Any) -> Any:
    if isinstance(action, Mapping):
        return {key: _plain(value) for key, value in action.items()}
    return action if isinstance(action, str) else np.asarray(action).tolist()


def _size(action: Any) -> int:
    """Numbers and characters of an action."""
    if isinstance(action, Mapping):
        return sum(map(_size, action.values()))
    return len(action) if isinstance(action, str) else np.size(action)


def jpegs(frames: np.ndarray, quality: int) -> tuple[np.ndarray, list[int]]:
    """Frames (n, height, width, 3) uint8 as JPEG files one after the other, (bytes,) uint8, and their lengths."""
    files = []
    for frame in frames:
        done, data = cv2.imencode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
        if not done:
            raise ValueError(f"OpenCV made no JPEG of a frame {frame.shape}")
        files.append(data.reshape(-1))
    return np.concatenate(files), [len(file) for file in files]


class Viewers:
    """Who waits for which session.

    Args:
        reply: sends a reply to whoever waits for it.
        post: has the front's thread make a call.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        keys: KeyPair | None,
        facts: Mapping[str, Any],
        reply: Callable[[Waiter, Reply], None],
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        self._context = context
        self._keys = keys
        self._facts = facts
        self._reply = reply
        self._post = post
        self._parked: list[Parked] = []
        self._broadcasts: dict[bytes, tuple[zmq.Socket[bytes], str, int]] = {}
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="worldmodel-jpeg")
        self._encoding: dict[tuple[bytes, int, int], Future[tuple[np.ndarray, list[int]]]] = {}

    def park(self, request: Request, session: Session, waiter: Waiter, now: float) -> None:
        """`next`: answer when the session has changed, at once if it has.

        Raises:
            ServingError: ``busy``: too many wait. ``invalid``: a quality that is none.
        """
        wait = min(MAX_WAIT, max(0.0, float(request.args.get("wait", 10.0))))
        quality = _quality(request, None)
        parked = Parked(session, waiter, int(request.args.get("after", 0)), now + wait, quality)
        if parked.session.at > parked.after:
            self._answer(parked)
        elif len(self._parked) >= MAX_PARKED:
            raise ServingError("busy", f"{MAX_PARKED} viewers are waiting", 1.0)
        else:
            self._parked = [p for p in self._parked if p.waiter != parked.waiter] + [parked]

    def changed(self, session: Session) -> None:
        """A session has changed: answer those who wait for it, and broadcast."""
        if not (self._parked or self._broadcasts):
            return
        ready = [p for p in self._parked if p.session is session]
        self._parked = [p for p in self._parked if p.session is not session]
        for parked in ready:
            self._answer(parked)
        if session.name in self._broadcasts:
            quality = self._broadcasts[session.name][2]
            self._encoded(session, quality, lambda reply: self._publish(session.name, reply))

    def gone(self, session: Session, error: ServingError) -> None:
        """A session is no more."""
        for parked in [p for p in self._parked if p.session is session]:
            self._reply(parked.waiter, Reply(parked.waiter.request, error=error))
        self._parked = [p for p in self._parked if p.session is not session]
        self.silence(session)

    def tick(self, now: float) -> None:
        """Answer those who have waited long enough."""
        if not self._parked:
            return
        for parked in [p for p in self._parked if p.expires <= now]:
            result = picture(parked.session, self._facts)
            self._reply(parked.waiter, Reply(parked.waiter.request, result))
        self._parked = [p for p in self._parked if p.expires > now]

    def broadcast(self, request: Request, session: Session, address: str) -> dict[str, int]:
        """`broadcast`: the port of a PUB socket that sends every change of the session, made at the first call.

        Raises:
            ServingError: ``busy``: too many sessions are broadcast. ``invalid``: a quality that is none.
        """
        if not request.args.get("on", True):
            self.silence(session)
            return {}
        quality = _quality(request, 90) or 90
        if session.name in self._broadcasts:
            socket, url, _ = self._broadcasts[session.name]
        elif len(self._broadcasts) >= MAX_BROADCASTS:
            raise ServingError("busy", f"{MAX_BROADCASTS} sessions are broadcast; turn one off", 5.0)
        else:
            socket = self._bound(f"{address}:*")
            url = bytes(socket.last_endpoint).decode()  # type: ignore[arg-type]
        self._broadcasts[session.name] = socket, url, quality
        return {"port": int(url.rpartition(":")[2])}

    def _bound(self, url: str, patience: float = 0.0) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.PUB)
        # conflate: the newest change to each subscriber, and the newest subscription of each
        socket.linger, socket.conflate, socket.handshake_ivl = 0, True, 2000
        socket.maxmsgsize = MAX_ASKED
        return bound(socket, url, self._keys, patience)

    def rebind(self) -> None:
        """Drop all who follow a broadcast, and what they have subscribed to; who may connect comes back by themselves."""
        for name, (socket, url, quality) in list(self._broadcasts.items()):
            socket.close(0)
            del self._broadcasts[name]
            try:
                self._broadcasts[name] = self._bound(url, 5.0), url, quality
            except InputError as error:
                log.warning("a broadcast has ended: %s", error)

    def silence(self, session: Session) -> None:
        """Stop a broadcast, if there is one."""
        if session.name in self._broadcasts:
            self._broadcasts.pop(session.name)[0].close(0)

    def close(self) -> None:
        """Stop all broadcasts and the encoder, and answer those who wait."""
        stopping = ServingError("busy", "the server is about to stop", 1.0)
        for parked in self._parked:
            self._reply(parked.waiter, Reply(parked.waiter.request, error=stopping))
        for socket, _, _ in self._broadcasts.values():
            socket.close(0)
        self._broadcasts.clear()
        self._encoder.shutdown(wait=True, cancel_futures=True)

    def _answer(self, parked: Parked) -> None:
        waiter, session = parked.waiter, parked.session
        if parked.quality is None:
            assert session.shown is not None and session.shown.frames is not None
            arrays = {"frames": session.shown.frames}
            self._reply(waiter, Reply(waiter.request, picture(session, self._facts), arrays))
        else:
            self._encoded(
                session,
                parked.quality,
                lambda reply: self._reply(waiter, Reply(waiter.request, reply.result, reply.arrays)),
            )

    def _encoded(self, session: Session, quality: int, then: Callable[[Reply], None]) -> None:
        """JPEG in the encoder's thread, once for all who want the same, then a call in the front's."""
        assert session.shown is not None and session.shown.frames is not None
        about = picture(session, self._facts)
        key = session.name, session.at, quality
        future = self._encoding.get(key)
        if future is None:
            future = self._encoder.submit(jpegs, session.shown.frames, quality)
            self._encoding[key] = future
            future.add_done_callback(lambda _: self._post(lambda: self._forget(key)))

        def done(result: Future[tuple[np.ndarray, list[int]]]) -> None:
            if not result.cancelled() and result.exception() is None:
                data, sizes = result.result()
                self._post(lambda: then(Reply(result={**about, "sizes": sizes}, arrays={"jpeg": data})))

        future.add_done_callback(done)

    def _publish(self, name: bytes, reply: Reply) -> None:
        if name in self._broadcasts:
            self._broadcasts[name][0].send(join_frames(encode_reply(reply)), zmq.DONTWAIT)

    def _forget(self, key: tuple[bytes, int, int]) -> None:
        self._encoding.pop(key, None)


def _quality(request: Request, default: int | None) -> int | None:
    quality: int | None = request.args.get("jpeg", default)
    if quality is not None and not 1 <= quality <= 100:
        raise ServingError("invalid", f"jpeg is {quality}, expected a quality of 1 to 100")
    return quality
