"""An OpenCV window that plays frames at the world's speed."""

from __future__ import annotations

import os
import time

import cv2
import numpy as np

from worldmodel import WorldModelError

SIDE = 384  # pixels, the shown picture's longer side at least


def windows_available() -> bool:
    """Whether this OpenCV was built with windows; the headless wheel was not."""
    lines = (line.split() for line in cv2.getBuildInformation().splitlines())
    return ["GUI:", "NONE"] not in lines


def screen_found() -> bool:
    """Whether somebody sees pygame's windows. Without a display it draws unseen, which SDL_VIDEODRIVER may ask for."""
    import pygame

    try:
        pygame.display.init()
    except pygame.error:
        return False
    return "SDL_VIDEODRIVER" in os.environ or pygame.display.get_driver() not in ("dummy", "offscreen")


class Window:
    """A window; open after the first `show`.

    Raises:
        WorldModelError: this OpenCV was built without windows.
    """

    def __init__(self, title: str, fps: float) -> None:
        if not windows_available():
            raise WorldModelError(
                "a window needs an OpenCV with windows: pip uninstall opencv-python-headless, pip install opencv-python; "
                'or do without: render_mode "rgb_array", or worldmodel watch --out FILE.mp4'
            )
        self._title = title
        self.fps = fps
        self._due = 0.0

    def show(self, frames: np.ndarray) -> None:
        """Show frames (n, height, width, 3) uint8 RGB one after the other."""
        for frame in frames:
            scale = max(1, SIDE // max(frame.shape[:2]))
            picture = np.repeat(np.repeat(frame[..., ::-1], scale, axis=0), scale, axis=1)
            cv2.imshow(self._title, np.ascontiguousarray(picture))
            wait = self._due - time.monotonic()
            cv2.waitKey(max(1, round(1000 * wait)))
            self._due = max(time.monotonic(), self._due) + 1.0 / self.fps

    def close(self) -> None:
        """Close the window; closing twice is fine."""
        cv2.destroyAllWindows()
