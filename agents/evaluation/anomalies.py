"""How well a monitor notices what goes wrong with the real Pendulum-v1: the table of anomalies, false alarms, delays.

Everything is collected from the simulator with seeds of its own: calibration, validation (which picks the combination of
channels) and test never share an episode. Axis letters: E episodes, T chunks; P perturbed, N normal episodes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from agents.anomaly.calibration import MonitorConfig, Tracked
from agents.anomaly.channels import episode_clip, measure_clips
from agents.anomaly.conformal import COMBINATIONS
from agents.anomaly.detection import Wins, interval, localisation, resamples, share_interval
from agents.anomaly.monitor import MONITOR_SEED, AnomalyMonitor
from agents.anomaly.perturbations import ENV_ID, ONSET, PERTURBATIONS, Perturbation, perturb_pictures
from worldmodel import InputError, WorldModel
from worldmodel.files import config_from_dict, config_to_dict
from worldmodel.published import cache_folder
from worldmodel.training.collect import CollectConfig, collect
from worldmodel.training.episodes import Episode, EpisodeDataset

CALIBRATION_SEED, VALIDATION_SEED, FRESH_SEED, TEST_SEED = 2_000_003, 4_000_037, 3_000_017, 5_000_011


@dataclass(frozen=True)
class AnomalyEvaluation:
    """Numbers of episodes. calibration, fresh: normal ones, to calibrate on and to count false alarms in. perturbed,
    validation: of each perturbation, with ``chunks`` chunks. alpha: false alarms asked for, a share of episodes.
    bootstrap: resamples of the 95 % intervals, over episodes.
    """

    calibration: int = 300
    fresh: int = 200
    perturbed: int = 40
    validation: int = 15
    chunks: int = 36
    alpha: float = 0.05
    bootstrap: int = 1000
    seed: int = 0
    monitor: MonitorConfig = MonitorConfig()


class Episodes(NamedTuple):
    """Measured once, judged often; one entry an episode.

    values: (T, channels). labels: (T,), 1 for perturbed chunks, 0 for normal ones, -1 for neither. begin: the first
    perturbed chunk. localised: by perturbed chunk, `localisation` (n, 2), where a mask exists.
    """

    values: list[np.ndarray]
    labels: list[np.ndarray]
    begin: list[int]
    localised: list[np.ndarray]


class Judged(NamedTuple):
    """One entry an episode. scores: (T, columns), larger the stranger. alarms: (T,) bool."""

    scores: list[np.ndarray]
    alarms: list[np.ndarray]


def evaluate_anomalies(
    world: WorldModel, config: AnomalyEvaluation | None = None, progress: bool = True
) -> dict[str, Any]:
    """The table, as JSON: AUROC of every channel, of a chunk's evidence and of the monitor's score, a row an anomaly.

    Chunks are the unit. Positives are chunks that a perturbation acts in; negatives the chunks of fresh normal episodes at
    the same times. Episodes are collected at the first call (minutes) and kept in the user's cache folder.

    Raises:
        InputError: the world was not learned from Pendulum-v1.
    """
    config = config or AnomalyEvaluation()
    if world.spec.environment.get("env") != "Pendulum-v1":
        raise InputError(f"world {world.spec.name} is not of Pendulum-v1, whose anomalies are known")
    normal = _episodes(world, "normal", config.calibration, CALIBRATION_SEED)
    monitor = AnomalyMonitor(world, config.monitor)
    monitor.calibrate([episode_clip(e) for e in normal], config.alpha, progress)
    del normal
    validation = {
        name: _measure(
            monitor, p, _perturbed(world, p, config.validation, VALIDATION_SEED, config.chunks), progress
        )
        for name, p in PERTURBATIONS.items()
    }
    choice = {
        name: _validate(monitor.with_config(replace(config.monitor, combination=name)), validation)
        for name in COMBINATIONS
    }
    best = max(choice, key=lambda name: choice[name])
    monitor = monitor.with_config(replace(config.monitor, combination=best))
    nothing_wrong = [(e, np.ones((1, 1), bool)) for e in _episodes(world, "fresh", config.fresh, FRESH_SEED)]
    fresh = _judge(monitor, _measure(monitor, None, nothing_wrong, progress))
    rows = {
        name: _measure(monitor, p, _perturbed(world, p, config.perturbed, TEST_SEED, config.chunks), progress)
        for name, p in PERTURBATIONS.items()
    }
    return {
        "config": config_to_dict(config),
        "combination": {"chosen": best, "mean_auroc_on_validation": choice},
        "limits_nats": {"evidence": monitor.limits[0], "drift": monitor.limits[1]},
        "false_alarms": _false_alarms(fresh, config),
        **_table(monitor, fresh, rows, config),
    }


# ---- episodes -------------------------------------------------------------------------------------------------------
def _episodes(world: WorldModel, name: str, count: int, seed: int, **changes: Any) -> list[Episode]:
    """Real episodes like those of the newest round that the world was trained on, kept in the cache folder."""
    own = config_from_dict(CollectConfig, world.spec.environment, "world.json: environment")
    made = replace(own, episodes=count, seed=seed, workers=2, **changes)
    described = json.dumps(config_to_dict(made), sort_keys=True)
    key = hashlib.sha256(described.encode()).hexdigest()[:12]
    folder = cache_folder() / "anomalies" / f"{name.replace(' ', '-')}-{key}"
    collect(made, folder)
    dataset = EpisodeDataset.open(folder)
    return [dataset.episode(i) for i in range(count)]


def _perturbed(
    world: WorldModel, perturbation: Perturbation, count: int, seed: int, chunks: int
) -> list[tuple[Episode, np.ndarray]]:
    """Episodes that go wrong, and the mask of the pixels that a fault of the camera changes."""
    if perturbation.picture is not None:
        plain = _episodes(world, "camera", count, seed, chunks=chunks)
        return [perturb_pictures(e, perturbation, world.chunk_frames) for e in plain]
    arguments = {"perturbation": perturbation.name, "chunk_steps": world.chunk_frames}
    changes = {"env": ENV_ID, "env_kwargs": arguments, "chunks": chunks}
    everywhere = np.ones(world.spec.frame_size, dtype=bool)
    return [(e, everywhere) for e in _episodes(world, perturbation.name, count, seed, **changes)]


# ---- measuring and judging ------------------------------------------------------------------------------------------
def _measure(
    monitor: AnomalyMonitor,
    perturbation: Perturbation | None,
    episodes: list[tuple[Episode, np.ndarray]],
    progress: bool,
) -> Episodes:
    """Measure episodes with their masks; None: nothing is wrong with them."""
    count = len(episodes)
    found = Episodes([np.zeros(0)] * count, [np.zeros(0)] * count, [0] * count, [np.zeros((0, 2))] * count)
    title = perturbation.name if perturbation else "fresh episodes"
    clips = [episode_clip(e) for e, _ in episodes]
    for i, seen in measure_clips(monitor.world, clips, title, MONITOR_SEED, progress):
        episode, mask = episodes[i]
        chunks, seed = len(seen.values), int(episode.meta["seed"])
        labels = np.zeros(chunks, np.int64) if perturbation is None else perturbation.labels(chunks, seed)
        found.values[i], found.labels[i] = seen.values, labels
        found.begin[i] = int(np.argmax(labels == 1))
        if perturbation is not None and not mask.all():
            maps = [monitor.heat.heatmap(seen.cells[t], seen.pixels[t]) for t in np.flatnonzero(labels == 1)]
            found.localised[i] = np.array([localisation(heat, mask) for heat in maps])
    return found


def _columns(monitor: AnomalyMonitor) -> list[str]:
    """Of the table: single channels, a chunk's own evidence, and the monitor's score, which minds the last chunks too."""
    assert monitor.calibration is not None
    return [*(c.name for c in monitor.calibration.channels), "chunk alone", "combined"]


def _judge(monitor: AnomalyMonitor, episodes: Episodes) -> Judged:
    assert monitor.calibration is not None
    judged = Judged([], [])
    for values in episodes.values:
        _, verdict = monitor.calibration.judge(Tracked(), values)
        columns = (-np.log(verdict.channels), verdict.evidence[:, None], -np.log(verdict.p_value)[:, None])
        judged.scores.append(np.concatenate(columns, axis=1))
        judged.alarms.append(verdict.instant | verdict.drifting)
    return judged


def _validate(monitor: AnomalyMonitor, validation: dict[str, Episodes]) -> float:
    """Mean AUROC of the score; negatives are the chunks before a perturbation begins."""
    judged = {name: _judge(monitor, episodes) for name, episodes in validation.items()}
    warmup = monitor.config.warmup
    negatives = [
        scores[warmup : validation[name].begin[i], -1]
        for name, rows in judged.items()
        for i, scores in enumerate(rows.scores)
    ]
    return float(
        np.mean(
            [
                Wins(
                    [
                        s[label == 1, -1]
                        for s, label in zip(rows.scores, validation[name].labels, strict=True)
                    ],
                    negatives,
                ).auroc()
                for name, rows in judged.items()
            ]
        )
    )


def _false_alarms(fresh: Judged, config: AnomalyEvaluation) -> dict[str, Any]:
    rang = np.array([float(alarms.any()) for alarms in fresh.alarms])
    rng = np.random.default_rng(config.seed)
    return {"asked": config.alpha, "per_episode": share_interval(rang, config.bootstrap, rng)}


def _table(
    monitor: AnomalyMonitor, fresh: Judged, rows: dict[str, Episodes], config: AnomalyEvaluation
) -> dict[str, Any]:
    """Rows and their mean. The rows' episodes share their seeds, so one resampling is that of every row."""
    rng = np.random.default_rng(config.seed)
    columns = _columns(monitor)
    matched = slice(ONSET[0], config.chunks)
    negatives = [scores[matched] for scores in fresh.scores]
    normal = resamples(len(negatives), config.bootstrap, rng)
    drawn = resamples(config.perturbed, config.bootstrap, rng)
    limit = np.quantile(np.concatenate(negatives)[:, -1], 0.99)
    table: dict[str, Any] = {}
    values, resampled = (
        np.zeros((len(rows), len(columns))),
        np.zeros((len(rows), len(columns), config.bootstrap)),
    )
    for r, (name, episodes) in enumerate(rows.items()):
        judged = _judge(monitor, episodes)
        positives = [s[label == 1] for s, label in zip(judged.scores, episodes.labels, strict=True)]
        for c in range(len(columns)):
            wins = Wins([p[:, c] for p in positives], [n[:, c] for n in negatives])
            values[r, c], resampled[r, c] = wins.auroc(), wins.auroc(drawn, normal)
        above = np.array([(p[:, -1] > limit).sum() for p in positives], dtype=np.float64)
        count = np.array([len(p) for p in positives], dtype=np.float64)
        hits = interval(above.sum() / count.sum(), (drawn @ above) / (drawn @ count), len(positives))
        table[name] = {
            "auroc": {
                column: interval(values[r, c], resampled[r, c], len(positives))
                for c, column in enumerate(columns)
            },
            "tpr_at_1_percent_fpr": hits,
            **_delays(judged, episodes, config, rng),
        }
        if len(episodes.localised[0]):
            means = np.stack([scores.mean(0) for scores in episodes.localised])
            table[name]["localisation"] = {
                "pixel_auroc": share_interval(means[:, 0], config.bootstrap, rng),
                "hottest_pixel_inside": share_interval(means[:, 1], config.bootstrap, rng),
            }
    mean = {
        column: interval(values[:, c].mean(), resampled[:, c].mean(0), config.perturbed)
        for c, column in enumerate(columns)
    }
    return {"perturbations": table, "mean_auroc": mean}


def _delays(
    judged: Judged, episodes: Episodes, config: AnomalyEvaluation, rng: np.random.Generator
) -> dict[str, Any]:
    """Chunks from the beginning to the first alarm after it (0: at once), of the episodes in which one rings."""
    delays = [
        int(np.argmax(alarms[begin:])) if alarms[begin:].any() else -1
        for alarms, begin in zip(judged.alarms, episodes.begin, strict=True)
    ]
    detected = np.array([float(d >= 0) for d in delays])
    found = sorted(d for d in delays if d >= 0)
    middle = (len(delays) - 1) // 2
    return {
        "detected": share_interval(detected, config.bootstrap, rng),
        "median_delay_chunks": found[middle] if middle < len(found) else None,
        "delays_chunks": delays,
    }
