"""Pictures of what a monitor said: the episode with its heat map, and its curves.

Axis letters: T chunks, F pixel frames of a chunk; height, width pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from agents.anomaly.channels import Clip
from agents.anomaly.monitor import AnomalyRecord

BAND, STRIP = 36, 56
"""Heights in pixels of the line of text above the picture and of the curve below it."""
RED, GREY, WHITE, INK = (220, 40, 30), (170, 170, 170), (255, 255, 255), (40, 40, 40)
CLEAR = 0.45
"""Heat that is not shown: about twenty times as strange as usual, which hardly any place of a normal chunk reaches."""
HIGHEST = 8.0
"""Score at the top of a curve."""


def overlay(frames: np.ndarray, heatmap: np.ndarray, scale: int = 4) -> np.ndarray:
    """Frames (F, height, width, 3) uint8, enlarged, under a heat map (height, width) in [0, 1]: red is strange.

    Clear is what is about as strange as in normal chunks (`CLEAR`), or no stranger than half of this picture.
    """
    height, width = heatmap.shape
    size = (scale * width, scale * height)
    floor = max(CLEAR, float(np.median(heatmap)))
    heat = cv2.resize(heatmap, size, interpolation=cv2.INTER_LINEAR)[..., None]
    heat = np.clip((heat - floor) / (1.0 - floor), 0.0, 1.0)
    colour = cv2.applyColorMap((255 * np.sqrt(heat)).astype(np.uint8), cv2.COLORMAP_JET)[..., ::-1]
    weight = 0.7 * np.minimum(2 * heat, 1.0)
    large = np.repeat(np.repeat(frames, scale, axis=1), scale, axis=2)
    return (large * (1 - weight) + colour * weight).round().astype(np.uint8)


def overlay_video(clip: Clip, records: Sequence[AnomalyRecord], scale: int = 4) -> np.ndarray:
    """(T F, height, width, 3) uint8: the real frames beside their heat map, a line of text, the curve of the score."""
    scores = [record.score for record in records]
    pictures = []
    for frames, record in zip(clip.frames, records, strict=True):
        plain = np.repeat(np.repeat(frames, scale, axis=1), scale, axis=2)
        pair = np.concatenate((plain, overlay(frames, record.heatmap, scale)), axis=2)
        band, strip = _text(record, pair.shape[2]), _curve(scores, record, pair.shape[2], records)
        if record.alarm:
            pair[:, :3], pair[:, -3:], pair[:, :, :3], pair[:, :, -3:] = (RED,) * 4
        pictures += [np.concatenate((band, picture, strip)) for picture in pair]
    video = np.stack(pictures)
    return np.pad(video, ((0, 0), (0, video.shape[1] % 2), (0, video.shape[2] % 2), (0, 0)))


def _text(record: AnomalyRecord, width: int) -> np.ndarray:
    band = np.full((BAND, width, 3), WHITE, dtype=np.uint8)
    first = f"chunk {record.chunk}   p {record.p_value:.1e}   drift {record.statistic:.1f}"
    second = "normal"
    if record.alarm:
        kinds = " and ".join(k for k in ("instant", "drifting") if getattr(record, k))
        second = f"ALARM ({kinds}), began at chunk {record.onset}"
    colour = RED if record.alarm else INK
    cv2.putText(band, first, (4, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.42, INK, 1, cv2.LINE_AA)
    cv2.putText(band, second, (4, 31), cv2.FONT_HERSHEY_SIMPLEX, 0.42, colour, 1, cv2.LINE_AA)
    return band


def _curve(
    scores: list[float], record: AnomalyRecord, width: int, records: Sequence[AnomalyRecord]
) -> np.ndarray:
    """The score so far, alarms in red."""
    strip = np.full((STRIP, width, 3), WHITE, dtype=np.uint8)
    step = width / len(scores)
    for other in records[: record.chunk + 1]:
        left, right = int(other.chunk * step), max(int((other.chunk + 1) * step) - 1, int(other.chunk * step))
        top = STRIP - 1 - int((STRIP - 2) * min(other.score / HIGHEST, 1.0))
        cv2.rectangle(strip, (left, top), (right, STRIP - 1), RED if other.alarm else GREY, cv2.FILLED)
    return strip


def plot_records(axes: Any, records: Sequence[AnomalyRecord], limits: tuple[float, float]) -> None:
    """An episode on matplotlib axes: evidence and drift of every chunk, each relative to its alarm's limit."""
    chunks = [r.chunk for r in records]
    evidence, drift = zip(*(r.relative(limits) for r in records), strict=True)
    axes.plot(chunks, evidence, ".-", color="C0", label="this chunk")
    axes.plot(chunks, drift, "-", color="C1", label="drift")
    axes.axhline(1.0, color="0.4", lw=0.8, ls="--")
    for record in records:
        if record.alarm:
            axes.axvspan(record.chunk - 0.5, record.chunk + 0.5, color="C3", alpha=0.15, lw=0)
    top = 1.2 * max((v for v in (*evidence, *drift) if np.isfinite(v)), default=0.0)
    axes.set_yscale("symlog", linthresh=1.0)
    axes.set_ylim(0.0, max(top, 2.2))
    ticks = [t for t in (0, 0.5, 1, 2, 5, 10, 20, 50, 100, 1000) if t <= max(top, 2.2)]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_yticks([], minor=True)
    axes.set_ylabel("times the limit")
    axes.grid(alpha=0.3)
