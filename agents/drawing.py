"""Pictures of plans."""

from __future__ import annotations

import cv2
import numpy as np

from agents.actions import take
from agents.planners import Plan

MARGIN, LINE = 4, 16
WHITE, INK = 255, (40, 40, 40)


def draw_plan(plan: Plan, scale: int = 2) -> np.ndarray:
    """A contact sheet (height, width, 3) uint8: a row for each of the best futures, best first, a column for each chunk.

    Every cell is the last frame of an imagined chunk, enlarged ``scale`` times, over its action and predicted reward;
    a row begins with the future's return.
    """
    futures = plan.futures
    rows = [_strip(f"return {futures.returns[k]:.1f}", plan, k, scale) for k in range(len(futures.returns))]
    title = (
        f"value {plan.value:.1f}, {plan.iterations} x {len(plan.returns)} candidates, {plan.seconds:.2f} s"
    )
    return np.concatenate((_label(title, rows[0].shape[1]), *rows))


def _label(text: str, width: int) -> np.ndarray:
    band = np.full((LINE, width, 3), WHITE, dtype=np.uint8)
    return np.asarray(cv2.putText(band, text, (2, 12), cv2.FONT_HERSHEY_SIMPLEX, 0.36, INK, 1, cv2.LINE_AA))


def _strip(head: str, plan: Plan, row: int, scale: int) -> np.ndarray:
    futures, cells = plan.futures, []
    for chunk, frames in enumerate(futures.frames[row]):
        picture = np.repeat(np.repeat(frames[-1], scale, axis=0), scale, axis=1)
        with np.printoptions(precision=1, suppress=True, floatmode="fixed"):
            action = " ".join(str(take(take(futures.actions, row), chunk)).split())
        under = _label(f"{action} {futures.reward[row, chunk]:.1f}", picture.shape[1])
        cells.append(
            np.pad(np.concatenate((picture, under)), ((0, 0), (0, MARGIN), (0, 0)), constant_values=WHITE)
        )
    line = np.concatenate(cells, axis=1)
    return np.concatenate((_label(head, line.shape[1]), line))
