"""A real environment that says, chunk by chunk, whether something is wrong with it."""

from __future__ import annotations

from typing import Any, SupportsFloat

import gymnasium

from agents.anomaly.monitor import AnomalyMonitor, AnomalyRecord
from worldmodel import InputError


class MonitoredEnv(gymnasium.Wrapper[Any, Any, Any, Any]):
    """A chunked environment (`envs.ChunkedEnv`) whose ``info`` carries what a monitor says of every chunk.

    Adds "anomaly_score", "anomaly_p_value", "anomaly_statistic", "anomaly_alarm", "anomaly_onset" (-1 without an alarm),
    as in `AnomalyRecord`; the whole record, with its heat map, is ``last_record``.

    Raises:
        InputError: the monitor is not calibrated, or the environment's chunks are not those of its world.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], monitor: AnomalyMonitor) -> None:
        super().__init__(env)
        expected = monitor.world.frames_shape
        if env.observation_space.shape != expected:
            raise InputError(
                f"the environment shows {env.observation_space}, expected chunks of {expected}; wrap it in ChunkedEnv"
            )
        if monitor.calibration is None:
            raise InputError(
                "the monitor is not calibrated; call its calibrate(normal_episodes, alpha) first"
            )
        self.monitor = monitor
        self.last_record: AnomalyRecord | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """As the environment; the monitor begins a new episode."""
        frames, info = self.env.reset(seed=seed, options=options)
        self.monitor.reset()
        self.last_record = None
        return frames, info | _told(None)

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """As the environment, then judged; without the action, where the monitor is not to know it."""
        frames, reward, terminated, truncated, info = self.env.step(action)
        self.last_record = self.monitor.step(frames, action if self.monitor.takes_actions else None)
        return frames, reward, terminated, truncated, info | _told(self.last_record)


def _told(record: AnomalyRecord | None) -> dict[str, float | bool | int]:
    return {
        "anomaly_score": record.score if record else 0.0,
        "anomaly_p_value": record.p_value if record else 1.0,
        "anomaly_statistic": record.statistic if record else 0.0,
        "anomaly_alarm": record.alarm if record else False,
        "anomaly_onset": -1 if record is None or record.onset is None else record.onset,
    }
