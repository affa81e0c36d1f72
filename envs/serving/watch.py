"""Eyes on a served world: pull the newest change of a session, write its numbers under it, show it or film it.

A viewer asks for the next change only when it is done with the last (credit), so a slow one skips and slows nobody.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2
import numpy as np

from envs.recorder import CODECS, quiet_opencv
from envs.serving.connection import Connection, Unanswered
from envs.serving.protocol import Reply, ServingError
from envs.serving.session import LOST
from envs.window import SIDE, Window
from worldmodel.errors import InputError, WorldModelError

LINE = 20  # pixels, a line of the caption
WAIT = 1.0  # seconds that one request waits for a change


@dataclass(frozen=True)
class View:
    """What one change of a session brought.

    frames: (n, height, width, 3) uint8. at: counts changes; those between two views were skipped. log_prob: nats of
    the chunk. action: JSON text, or None at a reset.
    """

    frames: np.ndarray
    at: int
    seq: int
    action: str | None
    reward: float
    over: bool
    log_prob: float
    bits_per_dim: float
    world: str
    fps: float

    def caption(self) -> list[str]:
        """The lines under a picture: step, action, nats and bits/dim."""
        ended = "   END" if self.over else ""
        return [
            f"{self.world}   step {self.seq}   action {_short(self.action)}{ended}",
            f"{self.log_prob:.1f} nats   {self.bits_per_dim:.3f} bits/dim   reward {self.reward:.3g}",
        ]

    def pictures(self) -> np.ndarray:
        """(n, height, width, 3) uint8 RGB: the frames, enlarged, over their caption; sides are even."""
        n, height, width = self.frames.shape[:3]
        scale = max(1, SIDE // max(height, width))
        lines = self.caption()
        wide = max(width * scale, SIDE)
        canvas = np.zeros(
            (n, (height * scale + LINE * len(lines) + 9) // 2 * 2, (wide + 1) // 2 * 2, 3), np.uint8
        )
        large = self.frames.repeat(scale, axis=1).repeat(scale, axis=2)
        left = (canvas.shape[2] - large.shape[2]) // 2
        canvas[:, : large.shape[1], left : left + large.shape[2]] = large
        strip = np.zeros((canvas.shape[1] - large.shape[1], canvas.shape[2], 3), np.uint8)
        for i, line in enumerate(lines):
            at = (4, LINE * (i + 1) - 5)
            cv2.putText(strip, line, at, cv2.FONT_HERSHEY_SIMPLEX, 0.42, (255, 255, 255), 1, cv2.LINE_AA)
        canvas[:, large.shape[1] :] = strip
        return canvas


def _short(action: str | None) -> str:
    """With three significant digits, in at most 24 characters."""
    if action is None:
        return "-"
    with contextlib.suppress(ValueError):  # else as it came
        action = json.dumps(json.loads(action, parse_float=lambda number: float(f"{float(number):.3g}")))
    return action if len(action) <= 24 else action[:21] + "..."


class Viewer:
    """Pulls the changes of one session, or of the key's newest one, over a connection of its own.

    Args:
        session: its name; None for the newest, whichever that comes to be when the last one ends.
        quality: of JPEG, 1 to 100; None for raw frames.
    """

    def __init__(
        self, connection: Connection, session: bytes | None = None, quality: int | None = 85
    ) -> None:
        self._connection = connection
        self._wanted = session
        self._session = session
        self._quality = quality
        self._after = 0

    def next(self, wait: float = WAIT) -> View | None:
        """The newest change after the last one that was given, or None if there is none within ``wait`` seconds.

        Raises:
            ServingError: no server, a failed handshake, or (with a session named) no such session.
        """
        if self._session is None and not self._found(wait):
            return None
        args = {"after": self._after, "wait": float(wait), "jpeg": self._quality}
        try:
            reply = self._connection.ask(
                "next", self._connection.timeout + wait, session=self._session, args=args
            )
        except ServingError as error:
            if self._wanted is not None or isinstance(error, Unanswered) or error.code not in LOST:
                raise
            self._session, self._after = None, 0
            return None
        if not reply.arrays:
            self._session, self._after = self._wanted, 0 if self._wanted is None else self._after
            return None
        self._after = int(reply.result["at"])
        return _view(reply)

    def _found(self, wait: float) -> bool:
        sessions = self._connection.ask("sessions").result["sessions"]
        if sessions:
            self._session, self._after = bytes(sessions[0]), 0
        else:
            time.sleep(wait)
        return bool(sessions)


def _view(reply: Reply) -> View:
    said: Any = reply.result
    try:
        info = said["info"]
        return View(
            _frames(reply),
            int(said["at"]),
            int(said["seq"]),
            said["action"],
            float(said["reward"]),
            bool(said["terminated"] or said["truncated"]),
            float(info["log_prob"]),
            float(info["bits_per_dim"]),
            str(said["world"]),
            float(said["fps"]) or 1.0,  # a world of pictures has none
        )
    except (KeyError, TypeError, ValueError, cv2.error) as error:
        raise ServingError("bad_frame", f"not a view of a session: {error!r:.80}") from error


def _frames(reply: Reply) -> np.ndarray:
    if "frames" in reply.arrays:
        return reply.arrays["frames"]
    data, at, frames = reply.arrays["jpeg"], 0, []
    for size in reply.result["sizes"]:
        picture = cv2.imdecode(data[at : at + size], cv2.IMREAD_COLOR)
        if picture is None:
            raise ValueError("a JPEG that cannot be read")
        frames.append(picture[..., ::-1])
        at += size
    return np.stack(frames)


class Film:
    """A video file that keeps pace with the clock: what comes faster is thinned, what comes slower is held.

    Raises:
        InputError: a suffix other than .mp4 or .webm, or no folder for it. WorldModelError: this OpenCV cannot write it.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        if not CODECS.get(path.suffix):
            raise InputError(f"{path.name}: expected a name that ends in .mp4 or .webm")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}; choose another folder") from error
        self.path = path
        self.written = 0
        self._clock = clock
        self._began: float | None = None
        self._fps = 0.0
        self._last: np.ndarray | None = None
        self._writer: cv2.VideoWriter | None = None
        self._part = path.with_name(f".{path.stem}.part{path.suffix}")

    def add(self, pictures: np.ndarray, fps: float) -> None:
        """Pictures (n, height, width, 3) uint8 RGB that have come now."""
        if self._began is None:
            self._open(pictures.shape[1:3], fps)
            self._began = self._clock() - len(pictures) / fps
        self._write(pictures, self._due())

    def _due(self) -> int:
        assert self._began is not None
        return round((self._clock() - self._began) * self._fps) - self.written

    def _open(self, size: tuple[int, ...], fps: float) -> None:
        code = cv2.VideoWriter.fourcc(*CODECS[self.path.suffix])
        with quiet_opencv():
            self._writer, self._fps = cv2.VideoWriter(str(self._part), code, fps, (size[1], size[0])), fps
        if not self._writer.isOpened():
            raise WorldModelError(f"cannot write {self.path}; try .mp4 or .webm, or another folder")

    def _write(self, pictures: np.ndarray, count: int) -> None:
        assert self._writer is not None
        held = [] if self._last is None else [self._last] * (count - len(pictures))
        for picture in (*held, *thinned(pictures, count)):
            self._writer.write(np.ascontiguousarray(picture[..., ::-1]))
            self.written += 1
        self._last = pictures[-1]

    def __enter__(self) -> Film:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the file, also when stopped by Ctrl-C: what has come is kept."""
        if self._writer is None or self._last is None:
            return
        self._write(self._last[None], max(0, self._due()))
        self._writer.release()
        self._part.replace(self.path)


def thinned(pictures: np.ndarray, count: int) -> np.ndarray:
    """At most ``count`` of the pictures, evenly spread, the last one among them."""
    if count <= 0:
        return pictures[:0]
    chosen = np.linspace(len(pictures) - 1, 0, min(count, len(pictures))).round().astype(int)
    return pictures[np.sort(chosen)]


def watch(
    connection: Connection,
    session: bytes | None,
    out: Path | None,
    seconds: float | None,
    quality: int | None,
) -> int:
    """Show a session in a window, or write a video file; the number of changes seen.

    ``seconds``: when to stop; None for never. Ctrl-C stops too, and keeps what was filmed.

    Raises:
        ServingError: see `Viewer.next`. WorldModelError: no windows here, or nothing to film with.
    """
    viewer, seen = Viewer(connection, session, quality), 0
    end = None if seconds is None else time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        film = None if out is None else stack.enter_context(Film(out))
        window: Window | None = None
        if film is None:
            window = Window("worldmodel watch", 1.0)  # refuses here, where OpenCV has no windows
            stack.callback(window.close)
        stack.enter_context(contextlib.suppress(KeyboardInterrupt))
        for view in views(viewer, end):
            if film is not None:
                film.add(view.pictures(), view.fps)
            elif window is not None:
                window.fps = view.fps
                window.show(view.pictures())
            seen += 1
    return seen


def views(viewer: Viewer, end: float | None) -> Iterator[View]:
    """The changes of a session until a moment of `time.monotonic`."""
    while end is None or time.monotonic() < end:
        left = WAIT if end is None else min(WAIT, max(0.0, end - time.monotonic()))
        view = viewer.next(left)
        if view is not None:
            yield view
