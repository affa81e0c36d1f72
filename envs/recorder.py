"""Videos that keep every frame: a wrapper, and a function that writes .webm, .mp4 and .gif."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, SupportsFloat

import cv2
import gymnasium
import numpy as np
from gymnasium.utils import RecordConstructorArgs

from worldmodel import CheckpointError, InputError, WorldModelError
from worldmodel.files import write_atomic

CODECS = {".webm": "VP80", ".mp4": "mp4v", ".gif": ""}
"""By suffix. VP8 plays in every browser; mp4v in players, not in browsers."""


def write_video(path: str | Path, frames: np.ndarray | Sequence[np.ndarray], fps: float) -> None:
    """Write frames (n, height, width, 3) uint8 RGB to .webm, .mp4 or .gif (by suffix), atomically.

    The two video formats halve the resolution of colour, so an odd side loses a pixel: pad it or enlarge it
    first. A .gif holds whole hundredths of a second a frame.

    Raises:
        InputError: another suffix, no frames, frames of another shape or dtype, or no speed. CheckpointError: a full
        disk. WorldModelError: this OpenCV cannot write the format.
    """
    path = Path(path)
    if path.suffix not in CODECS:
        raise InputError(f"{path.name}: expected a name that ends in one of {', '.join(CODECS)}")
    pictures = np.asarray(frames)
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3 or not len(pictures):
        raise InputError(
            f"frames are {pictures.dtype} {pictures.shape}, expected uint8 (n, height, width, 3)"
        )
    if not 0 < fps < math.inf:
        raise InputError(f"fps is {fps}, expected a finite number above 0")
    bgr = np.ascontiguousarray(pictures[..., ::-1])
    write = _write_gif if path.suffix == ".gif" else _write_stream
    write_atomic(path, lambda temporary: write(temporary, path.suffix, bgr, fps))


def _write_stream(temporary: Path, suffix: str, bgr: np.ndarray, fps: float) -> None:
    named = temporary.with_name(temporary.name + suffix)  # OpenCV picks the container by suffix
    height, width = bgr.shape[1:3]
    try:
        with quiet_opencv():
            writer = cv2.VideoWriter(
                str(named), cv2.VideoWriter.fourcc(*CODECS[suffix]), fps, (width, height)
            )
        if not writer.isOpened():
            raise WorldModelError(f"this OpenCV cannot write {suffix}; try another of {', '.join(CODECS)}")
        with quiet_opencv():
            for frame in bgr:
                writer.write(frame)
            writer.release()
            written = _frames_in(named)
        if written < len(bgr):  # the writer itself says nothing
            raise CheckpointError(f"{written} of {len(bgr)} frames could be written; is the disk full?")
        named.replace(temporary)
    finally:
        named.unlink(missing_ok=True)


def _frames_in(path: Path) -> int:
    capture, count = cv2.VideoCapture(str(path)), 0
    while capture.grab():
        count += 1
    capture.release()
    return count


@contextlib.contextmanager
def quiet_opencv() -> Iterator[None]:
    """Nothing on standard error: past every log level, FFmpeg warns of a missing tag for VP8."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _write_gif(temporary: Path, suffix: str, bgr: np.ndarray, fps: float) -> None:
    animation = cv2.Animation()
    animation.frames = list(bgr)
    animation.durations = [round(1000 / fps)] * len(bgr)
    done, data = cv2.imencodeanimation(suffix, animation, [cv2.IMWRITE_GIF_DITHER, 3])  # own palette a frame
    if not done:
        raise WorldModelError(f"this OpenCV cannot write {suffix}; try another of {', '.join(CODECS)}")
    temporary.write_bytes(np.asarray(data).tobytes())


class RecordChunks(gymnasium.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Record every frame of one environment, F a chunk, at the world's own speed.

    Works around `WorldModelEnv` in both step modes and around `ChunkedEnv`. An episode's video is written
    when the next one begins and at `close`; the first goes to ``path``, the others beside it as
    ``NAME-1.SUFFIX`` and so on.

    Raises:
        InputError: a suffix that `write_video` cannot write, or an environment without chunks.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], path: str | Path) -> None:
        RecordConstructorArgs.__init__(self, path=path)
        gymnasium.Wrapper.__init__(self, env)
        self.path = Path(path)
        if self.path.suffix not in CODECS:
            raise InputError(f"{self.path.name}: expected a name that ends in one of {', '.join(CODECS)}")
        if not env.has_wrapper_attr("fps"):
            raise InputError(f"{env} has no chunks to record; wrap a WorldModelEnv or a ChunkedEnv")
        self.frames: list[np.ndarray] = []
        self.episodes = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """As the environment; begins a new video."""
        self.write()
        result = self.env.reset(seed=seed, options=options)
        self._keep()
        return result

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """As the environment; keeps its new frames."""
        result = self.env.step(action)
        self._keep()
        return result

    def write(self) -> Path | None:
        """Write what was recorded since the last reset, and where to; None if there is nothing."""
        if not self.frames:
            return None
        name = f"{self.path.stem}-{self.episodes}{self.path.suffix}" if self.episodes else self.path.name
        write_video(self.path.with_name(name), self.frames, float(self.env.get_wrapper_attr("fps")))
        self.frames = []
        self.episodes += 1
        return self.path.with_name(name)

    def close(self) -> None:
        """Write the last video, then close the environment."""
        self.write()
        super().close()

    def _keep(self) -> None:
        self.frames += list(np.array(self.env.get_wrapper_attr("new_frames")))
