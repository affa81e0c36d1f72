"""`AnomalyMonitor`: is what really happens still what the world knows? Calibrated to a false-alarm rate an episode.

Axis letters: T chunks, F pixel frames of a chunk; h, w latent grid; height, width pixels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from agents.anomaly.calibration import Calibration, MonitorConfig, Tracked, Verdict
from agents.anomaly.channels import Clip, Measurement, channels_of, check_clip, measure, measure_clips
from worldmodel import CheckpointError, InputError, WorldModel
from worldmodel.files import config_from_dict, config_to_dict, load_metadata, load_tensors, save_tensors

FORMAT = 1
BLIND = 4.0
"""Squared grey levels of the codec's error that a heat map overlooks."""
MONITOR_SEED = 20_000
"""Noise of calibration and monitoring sessions."""


@dataclass(frozen=True)
class AnomalyRecord:
    """What a monitor says of one chunk.

    chunk: its number in the episode, from 0. score: -log10 of p_value, 0 to 12. p_value: how often a normal chunk (with
    the chunks before it) is so strange. channels: the p-value of every channel. evidence: nats of this chunk alone.
    statistic: the CUSUM of evidence. alarm: either of instant (this chunk) and drifting (a slow change). onset: the
    chunk at which the anomaly began, or None without an alarm. heatmap: (height, width) float32 in [0, 1), where it is.
    """

    chunk: int
    score: float
    p_value: float
    channels: dict[str, float]
    evidence: float
    statistic: float
    instant: bool
    drifting: bool
    onset: int | None
    heatmap: np.ndarray

    @property
    def alarm(self) -> bool:
        """Something is wrong."""
        return self.instant or self.drifting

    def relative(self, limits: tuple[float, float]) -> tuple[float, float]:
        """Evidence and statistic, relative to their alarms' limits; of a limit of 0, infinite where above it."""
        evidence, statistic = (
            value / limit if limit else (math.inf if value > 0 else 0.0)
            for value, limit in zip((self.evidence, self.statistic), limits, strict=True)
        )
        return evidence, statistic


@dataclass(frozen=True)
class HeatScale:
    """What is usual where: cells (h, w) and pixels (height, width), means of `Measurement`'s maps."""

    cells: np.ndarray
    pixels: np.ndarray

    @classmethod
    def fit(cls, cells: np.ndarray, pixels: np.ndarray) -> HeatScale:
        """From maps of normal chunks, (n, h, w) and (n, height, width)."""
        return cls(cells.mean(0, dtype=np.float64), pixels.mean(0, dtype=np.float64))

    def heatmap(self, cells: np.ndarray, pixels: np.ndarray) -> np.ndarray:
        """(height, width) float32 in [0, 1): 0 as usual, 0.6 a hundred times as strange as usual, 0.94 a million times.

        Strange is what the codec cannot draw, by pixel, times what the world did not expect, by latent cell (clean z^2).
        """
        height, width = pixels.shape
        unexpected = np.log(np.maximum(cells / np.maximum(self.cells, 1e-9), 1.0))
        coarse = cv2.resize(unexpected.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
        error, usual = (cv2.GaussianBlur(m.astype(np.float32), (0, 0), 1.5) for m in (pixels, self.pixels))
        fine = np.log(np.maximum(error / (usual + BLIND), 1.0))
        return (1.0 - np.exp(-(coarse + fine) / 5.0)).astype(np.float32)


class AnomalyMonitor:
    """Watches one session: `calibrate` (or `load`), `reset`, then `step` chunk by chunk.

    ``calibration`` is None until then; ``heat`` is the scale of heat maps; ``takes_actions`` where chunks come with what
    caused them. What calibration did not show is anomalous, be it wrong or only new.
    """

    def __init__(self, world: WorldModel, config: MonitorConfig | None = None) -> None:
        self.world = world
        self.config = config or MonitorConfig()
        self.calibration: Calibration | None = None
        self.takes_actions = self.config.actions and world.actions is not None
        self._channels = channels_of(world, self.takes_actions)
        self._alpha = 0.0
        self._values: list[np.ndarray] = []
        self.heat = HeatScale(np.ones(world.latent_shape[1:]), np.ones(world.spec.frame_size))
        self.reset()

    # ---- calibration ------------------------------------------------------------------------------------------------
    def calibrate(self, normal_episodes: Sequence[Clip], alpha: float = 0.05, progress: bool = True) -> None:
        """Learn what is normal; about a share ``alpha`` of normal *episodes* will raise an alarm (`Calibration.fit`).

        Episodes are to be like those that are watched later: their behaviour, and about their length.

        Raises:
            InputError: too few episodes for alpha (it says how many are needed), or of the wrong shape.
        """
        clips = [Clip(*clip) for clip in normal_episodes]
        for i, clip in enumerate(clips):
            check_clip(self.world, clip, self.takes_actions, f"normal episode {i}")
        Calibration.check(len(clips), alpha)
        values: list[np.ndarray] = [np.zeros(0)] * len(clips)
        cells, pixels = [], []
        for i, seen in measure_clips(self.world, clips, "calibrate", MONITOR_SEED, progress):
            values[i] = seen.values
            cells.append(seen.cells.mean(0))
            pixels.append(seen.pixels.mean(0))
        self._adopt(values, alpha, HeatScale.fit(np.stack(cells), np.stack(pixels)))

    def _adopt(self, values: list[np.ndarray], alpha: float, heat: HeatScale) -> None:
        self.calibration = Calibration.fit(self.config, self._channels, values, alpha)
        self._alpha, self._values, self.heat = alpha, values, heat
        self.reset()

    def with_config(self, config: MonitorConfig) -> AnomalyMonitor:
        """A monitor calibrated on the same episodes with another configuration; nothing is measured again.

        Raises:
            InputError: not calibrated, or a configuration that differs in whether actions are known.
        """
        self._calibrated()
        if config.actions != self.config.actions:
            raise InputError("the channels of monitors with and without actions differ; calibrate a new one")
        other = AnomalyMonitor(self.world, config)
        other._adopt(self._values, self._alpha, self.heat)
        return other

    @property
    def alpha(self) -> float:
        """The false-alarm rate an episode that it is calibrated to.

        Raises:
            InputError: not calibrated.
        """
        self._calibrated()
        return self._alpha

    @property
    def limits(self) -> tuple[float, float]:
        """Evidence and statistic, nats, above which the instant and the drift alarm ring.

        Raises:
            InputError: not calibrated.
        """
        calibration = self._calibrated()
        return calibration.evidence_limit, calibration.drift_limit

    def _calibrated(self) -> Calibration:
        if self.calibration is None:
            raise InputError(
                "the monitor is not calibrated; call calibrate(normal_episodes, alpha), or load one"
            )
        return self.calibration

    # ---- watching ---------------------------------------------------------------------------------------------------
    def reset(self, seed: int = MONITOR_SEED) -> None:
        """A new episode begins."""
        self._state = self.world.initial_state([seed])
        self._tracked = Tracked()

    def step(self, frames: np.ndarray, action: Any = None) -> AnomalyRecord:
        """Judge the next real chunk (F, height, width, 3) uint8, caused by ``action``.

        Raises:
            InputError: not calibrated, or the wrong shape, dtype or range; the monitor is then as before.
        """
        calibration = self._calibrated()
        if (action is not None) != self.takes_actions:
            raise InputError(
                f"action is {action!r:.40}, but the monitor is {'' if self.takes_actions else 'not '}to know actions; see "
                "MonitorConfig.actions"
            )
        batch = {k: np.asarray(v)[None] for k, v in action.items()} if isinstance(action, dict) else action
        if not isinstance(action, dict) and action is not None:
            batch = np.asarray(action)[None]
        self._state, seen = measure(self.world, self._state, np.asarray(frames)[None], batch)
        self._tracked, verdict = calibration.judge(self._tracked, seen.values)
        chunk = self._tracked.chunk - 1
        return self._record(chunk, 0, verdict, Measurement(*(part[0] for part in seen)))

    def score_episode(self, frames: np.ndarray, actions: Any = None) -> list[AnomalyRecord]:
        """A record for every chunk of an episode, frames (T, F, height, width, 3) uint8; the watched session stays.

        Raises:
            InputError: as `step`.
        """
        return next(self.score_episodes([Clip(np.asarray(frames), actions)], progress=False))[1]

    def score_episodes(
        self, clips: Sequence[Clip], progress: bool = True
    ) -> Iterator[tuple[int, list[AnomalyRecord]]]:
        """(index, records) of several episodes, measured side by side, the longest first.

        Raises:
            InputError: as `step`, with the episode's number.
        """
        calibration = self._calibrated()
        clips = [Clip(*clip) for clip in clips]
        for i, clip in enumerate(clips):
            check_clip(self.world, clip, self.takes_actions, f"episode {i}")
        for i, seen in measure_clips(self.world, clips, "score", MONITOR_SEED, progress):
            _, verdict = calibration.judge(Tracked(), seen.values)
            yield (
                i,
                [
                    self._record(t, t, verdict, Measurement(*(part[t] for part in seen)))
                    for t in range(len(seen.values))
                ],
            )

    def _record(self, chunk: int, row: int, verdict: Verdict, seen: Measurement) -> AnomalyRecord:
        onset = int(verdict.onset[row])
        p_value = float(verdict.p_value[row])
        return AnomalyRecord(
            chunk,
            max(0.0, -float(np.log10(p_value))),
            p_value,
            {c.name: float(p) for c, p in zip(self._channels, verdict.channels[row], strict=True)},
            float(verdict.evidence[row]),
            float(verdict.drift[row]),
            bool(verdict.instant[row]),
            bool(verdict.drifting[row]),
            None if onset < 0 else onset,
            self.heat.heatmap(seen.cells, seen.pixels),
        )

    # ---- on disk ----------------------------------------------------------------------------------------------------
    def save(self, path: str | Path) -> None:
        """Write the calibration to one safetensors file, atomically: the channels' normal values and the configuration.

        Raises:
            InputError: not calibrated. CheckpointError: it cannot be written.
        """
        self._calibrated()
        header = {
            "format": FORMAT,
            "world": self.world.fingerprint,
            "alpha": self._alpha,
            "config": config_to_dict(self.config),
            "channels": [c.name for c in self._channels],
        }
        tensors = {
            "values": np.concatenate(self._values),
            "lengths": np.array([len(v) for v in self._values]),
            "cells": self.heat.cells.astype(np.float64),
            "pixels": self.heat.pixels.astype(np.float64),
        }
        named = {k: torch.from_numpy(v) for k, v in tensors.items()}
        save_tensors(Path(path), named, {"worldmodel_monitor": json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path, world: WorldModel) -> AnomalyMonitor:
        """A monitor that `save` wrote, for the same world.

        Raises:
            CheckpointError: no monitor, corrupt, of another format version, or of another world.
        """
        tensors, metadata = load_tensors(Path(path)), load_metadata(Path(path))
        try:
            header = json.loads(metadata["worldmodel_monitor"])
            if header["format"] != FORMAT:
                raise CheckpointError(
                    f"{path}: monitor format {header['format']}, expected {FORMAT}; calibrate again"
                )
            if header["world"] != world.fingerprint:
                raise CheckpointError(f"{path}: calibrated with another world; calibrate again with this one")
            arrays = {k: v.double().numpy() for k, v in tensors.items()}
            lengths = arrays["lengths"].astype(int)
            monitor = cls(world, config_from_dict(MonitorConfig, header["config"], str(path)))
            channels = [c.name for c in monitor._channels]
            if header["channels"] != channels:
                raise CheckpointError(f"{path}: other channels than {', '.join(channels)}; calibrate again")
            if arrays["values"].shape != (lengths.sum(), len(channels)) or (lengths < 1).any():
                raise ValueError("values and lengths do not agree")
            if not all(np.isfinite(a).all() for a in arrays.values()):
                raise ValueError("values that are not finite")
            heat = HeatScale(arrays["cells"], arrays["pixels"])
            if (heat.cells.shape, heat.pixels.shape) != (world.latent_shape[1:], world.spec.frame_size):
                raise ValueError("maps of another size")
            values = np.split(arrays["values"], np.cumsum(lengths)[:-1])
            monitor._adopt(values, float(header["alpha"]), heat)
            return monitor
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: not a saved monitor ({error!r:.80})") from error
