"""`worldmodel monitor`: episodes or a video against what a world knows; overlay videos, a plot, JSON and CSV."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from agents.anomaly.calibration import Calibration, MonitorConfig
from agents.anomaly.channels import Clip, episode_clip
from agents.anomaly.conformal import episodes_needed
from agents.anomaly.drawing import overlay_video, plot_records
from agents.anomaly.monitor import MONITOR_SEED, AnomalyMonitor, AnomalyRecord
from envs.recorder import write_video
from worldmodel import CheckpointError, DataError, InputError, WorldModel
from worldmodel.files import config_to_dict, writable, write_atomic, write_json
from worldmodel.media import read_clip
from worldmodel.published import cache_folder
from worldmodel.training.episodes import EpisodeDataset
from worldmodel.training.evaluate import held_out_dataset
from worldmodel.training.plots import pyplot
from worldmodel.training.sources import VIDEOS

DEFAULT_EPISODES = 200
"""Normal episodes that are collected where no calibration is given."""
DEFAULT_ALPHA = 0.05
PLOTTED = 12
"""Episodes on the page of plots, the strangest first."""


@dataclass(frozen=True)
class Source:
    """What is judged: names and clips; ``actions`` is False for videos, which hold none."""

    names: list[str]
    clips: list[Clip]
    actions: bool


def read_source(path: Path, world: WorldModel) -> Source:
    """A directory of episodes (docs/episodes.md), a video file, or a directory of video files.

    A video is cut about its centre to the world's aspect ratio, resized, brought to the world's frames a second and cut
    into chunks; what is left over is not judged.

    Raises:
        DataError: none of these, or of another frame size, chunk or action space. InputError: a video shorter than
            three chunks.
    """
    if (path / "dataset.json").exists():
        dataset = EpisodeDataset.open(path)
        _check_episodes(dataset, world)
        bar = tqdm(range(dataset.episodes), desc=f"read {path}", unit="episode", delay=2, leave=False)
        clips = [episode_clip(dataset.episode(i)) for i in bar]
        if world.actions is None:
            clips = [Clip(clip.frames, None) for clip in clips]
        return Source([f"{i:06d}" for i in range(len(clips))], clips, world.actions is not None)
    files = [path] if path.is_file() else sorted(f for f in path.glob("*") if f.suffix.lower() in VIDEOS)
    if not files:
        raise DataError(
            f"{path} is no directory of episodes, no video and no directory of videos; give one of these"
        )
    return Source([f.name for f in files], [read_video(f, world) for f in files], False)


def _check_episodes(dataset: EpisodeDataset, world: WorldModel) -> None:
    spec = world.spec
    if dataset.frame_size != spec.frame_size or dataset.frame_skip != world.chunk_frames:
        differ = (
            f"have frames {dataset.frame_size} in chunks of {dataset.frame_skip}, the world {spec.name} has "
            f"{spec.frame_size} in chunks of {world.chunk_frames}"
        )
    elif world.actions is not None and dataset.action_space != spec.action_space:
        have, takes = (" ".join(str(s).split()) for s in (dataset.action_space, spec.action_space))
        differ = f"have actions {have}, the world {spec.name} takes {takes}"
    else:
        return
    env = dataset.collected.get("env", "an unnamed environment")
    raise DataError(
        f"{dataset.folder}: episodes of {env} {differ}; give --world a world of their environment"
    )


def read_video(path: Path, world: WorldModel) -> Clip:
    """A video file as chunks of the world, without actions; see `worldmodel.media.read_clip`.

    Raises:
        DataError: it cannot be read. InputError: it is shorter than three chunks.
    """
    frames = read_clip(path, world.spec.frame_size, world.spec.fps)
    chunks = len(frames) // world.chunk_frames
    if chunks < 3:
        raise InputError(
            f"{path} has {len(frames)} frames at the world's {world.spec.fps:g} a second, expected at least "
            f"{3 * world.chunk_frames}"
        )
    return Clip(frames[: chunks * world.chunk_frames].reshape(chunks, *world.frames_shape), None)


def prepare_monitor(
    world: WorldModel, calibration: Path | None, alpha: float | None, actions: bool
) -> tuple[AnomalyMonitor, Path]:
    """A calibrated monitor and the file it lies in.

    ``calibration``: such a file, or normal episodes or videos as in `read_source`; None collects 200 fresh episodes of the
    world's own environment. ``alpha``: None for the file's own, else 0.05. What is calibrated is kept in the cache
    folder, by world, episodes and settings.

    Raises:
        CheckpointError, DataError, InputError: as reading, loading and calibrating, or a file of another alpha.
    """
    if calibration is not None and calibration.suffix == ".safetensors":
        saved = AnomalyMonitor.load(calibration, world)
        if alpha not in (None, saved.alpha):
            raise InputError(
                f"{calibration} is calibrated to alpha {saved.alpha:g}, not {alpha:g}; ask for {saved.alpha:g}, or "
                "calibrate on episodes"
            )
        return saved, calibration
    alpha = DEFAULT_ALPHA if alpha is None else alpha
    if calibration is None:
        Calibration.check(DEFAULT_EPISODES, alpha)
    else:
        episodes_needed(alpha)
    config = MonitorConfig(actions=actions)
    folder = calibration or held_out_dataset(world, DEFAULT_EPISODES).folder
    identity = {
        "world": world.fingerprint,
        "config": config_to_dict(config),
        "alpha": alpha,
        "seed": MONITOR_SEED,
        "normal": _identity(folder),
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    kept = cache_folder() / "monitors" / f"{world.spec.name}-{key}.safetensors"
    if kept.exists():
        return AnomalyMonitor.load(kept, world), kept
    normal = read_source(folder, world)
    if actions and not normal.actions:
        raise InputError(
            f"{folder} holds videos without actions, the source has actions; calibrate on episodes"
        )
    clips = normal.clips if actions else [Clip(clip.frames, None) for clip in normal.clips]
    monitor = AnomalyMonitor(world, config)
    monitor.calibrate(clips, alpha)
    monitor.save(kept)
    return monitor, kept


def _identity(folder: Path) -> Any:
    """What tells one calibration set from another."""
    if (folder / "dataset.json").exists():
        return json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    files = [folder] if folder.is_file() else sorted(folder.glob("*"))
    listed = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.is_file()]
    return {"files": listed, "read": "cut to the world's aspect ratio, at its frames a second"}


def monitor_source(
    world: WorldModel, source: Path, calibration: Path | None, out: Path, alpha: float | None, videos: int
) -> dict[str, Any]:
    """Judge every episode of a source; writes ``monitor.json``, ``scores.csv``, ``monitor.png`` and overlay videos.

    ``videos``: of so many episodes, the strangest first. Returns what is in ``monitor.json``.

    Raises:
        CheckpointError, ConfigError, DataError, InputError: as `read_source` and `prepare_monitor`.
    """
    what = read_source(source, world)
    writable(out)
    monitor, kept = prepare_monitor(world, calibration, alpha, what.actions)
    clips = what.clips
    if not monitor.config.actions:
        clips = [Clip(clip.frames, None) for clip in clips]
    by_index = dict(monitor.score_episodes(clips))
    judged = [by_index[i] for i in range(len(clips))]
    strangest = sorted(range(len(judged)), key=lambda i: -_strangeness(monitor, judged[i]))
    numbers = {
        "world": world.spec.name,
        "fingerprint": world.fingerprint,
        "calibration": str(kept),
        "alpha": monitor.alpha,
        "episodes": len(judged),
        "episodes_with_alarm": sum(any(r.alarm for r in records) for records in judged),
        "results": [
            {"name": name, **_summary(records)} for name, records in zip(what.names, judged, strict=True)
        ],
    }
    write_json(out / "monitor.json", numbers)
    write_atomic(out / "scores.csv", lambda file: _write_csv(file, what.names, judged))
    _plot(out / "monitor.png", monitor, [(what.names[i], judged[i]) for i in strangest[:PLOTTED]])
    for i in tqdm(strangest[:videos], desc="overlay videos", unit="video", delay=2, leave=False):
        write_video(out / f"{what.names[i]}.mp4", overlay_video(clips[i], judged[i]), world.spec.fps)
    return numbers


def _strangeness(monitor: AnomalyMonitor, records: Sequence[AnomalyRecord]) -> float:
    return max(max(r.relative(monitor.limits)) for r in records)


def _summary(records: Sequence[AnomalyRecord]) -> dict[str, Any]:
    """Of one episode: its alarms and its strangest chunk."""
    alarms = [r for r in records if r.alarm]
    worst = max(records, key=lambda r: r.score)
    return {
        "chunks": len(records),
        "alarm": bool(alarms),
        "first_alarm_chunk": alarms[0].chunk if alarms else None,
        "onset_chunk": alarms[0].onset if alarms else None,
        "highest_score": worst.score,
        "at_chunk": worst.chunk,
        "strangest_channel": min(worst.channels, key=lambda k: worst.channels[k]),
    }


def _write_csv(path: Path, names: Sequence[str], judged: Sequence[Sequence[AnomalyRecord]]) -> None:
    fields = ["score", "p_value", "evidence", "statistic", "instant", "drifting", "alarm"]
    channels = list(judged[0][0].channels)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["episode", "chunk", *fields, "onset", *(f"p_{c}" for c in channels)])
        for name, records in zip(names, judged, strict=True):
            for r in records:
                numbers = [f"{float(getattr(r, field)):.6g}" for field in fields]
                onset = "" if r.onset is None else r.onset
                table.writerow([name, r.chunk, *numbers, onset, *(f"{p:.4g}" for p in r.channels.values())])


def _plot(path: Path, monitor: AnomalyMonitor, episodes: Sequence[tuple[str, list[AnomalyRecord]]]) -> None:
    plt = pyplot()
    columns = min(3, len(episodes))
    rows = -(-len(episodes) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(5 * columns, 2.6 * rows), layout="constrained", squeeze=False
    )
    for axis, (name, records) in zip(axes.flat, episodes, strict=False):
        plot_records(axis, records, monitor.limits)
        axis.set(title=name, xlabel="chunk")
    for axis in axes.flat[len(episodes) :]:
        axis.axis("off")
    axes[0, 0].legend(fontsize=8)
    figure.suptitle("Evidence and drift relative to their alarms' limits; alarms shaded")
    write_atomic(path, lambda file: figure.savefig(file, dpi=100, format="png"))
    plt.close(figure)


def default_out(source: Path) -> Path:
    """``monitor/NAME`` in the working directory."""
    if not source.exists():
        raise CheckpointError(f"{source} does not exist; give a directory of episodes or a video")
    return Path("monitor") / source.stem
