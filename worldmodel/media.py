"""Pictures and videos that a user brings, at a world's size and speed."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from worldmodel.errors import DataError

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
"""What pictures are written as."""


def fitted(picture: np.ndarray, frame_size: tuple[int, int]) -> np.ndarray:
    """A picture (H, W, 3) uint8 scaled to cover (height, width) pixels, the rest cut off evenly."""
    height, width = frame_size
    scale = max(height / picture.shape[0], width / picture.shape[1])
    size = max(width, round(picture.shape[1] * scale)), max(height, round(picture.shape[0] * scale))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    scaled = cv2.resize(picture, size, interpolation=how)
    top, left = (size[1] - height) // 2, (size[0] - width) // 2
    return np.ascontiguousarray(scaled[top : top + height, left : left + width])


def read_picture(path: Path, frame_size: tuple[int, int]) -> np.ndarray:
    """(height, width, 3) uint8 RGB from a picture file.

    Raises:
        DataError: no such file, or no picture.
    """
    picture = cv2.imread(str(path), cv2.IMREAD_COLOR) if path.is_file() else None
    if picture is None:
        raise DataError(f"{path}: {'not a picture that OpenCV reads' if path.is_file() else 'no such file'}")
    return fitted(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), frame_size)


def read_clip(path: Path, frame_size: tuple[int, int], fps: float) -> np.ndarray:
    """(n, height, width, 3) uint8 RGB from a video file, at ``fps`` frames a second (the nearest frames).

    Raises:
        DataError: no such file, or no video.
    """
    capture = cv2.VideoCapture(str(path)) if path.is_file() else None
    if capture is None or not capture.isOpened():
        raise DataError(f"{path}: {'not a video that OpenCV reads' if path.is_file() else 'no such file'}")
    step = fps / (capture.get(cv2.CAP_PROP_FPS) or fps)  # frames of ours for one of the file's
    frames: list[np.ndarray] = []
    seen = 0
    while True:
        good, picture = capture.read()
        if not good:
            break
        seen += 1
        wanted = int(seen * step + 1e-6) - len(frames)
        if wanted > 0:
            frames += [fitted(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), frame_size)] * wanted
    capture.release()
    if not frames:
        raise DataError(f"{path}: a video without frames")
    return np.stack(frames)


def write_picture(path: Path, picture: np.ndarray) -> None:
    """A picture (height, width, 3) uint8 RGB to a file, in the format of its suffix.

    Raises:
        DataError: OpenCV does not write such files.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        done = cv2.imwrite(str(path), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    except cv2.error as error:
        raise DataError(f"{path}: not a picture format that OpenCV writes; use .png") from error
    if not done:
        raise DataError(f"{path} cannot be written")
