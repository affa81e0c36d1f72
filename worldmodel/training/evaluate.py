"""Evaluate a world on held-out real episodes: JSON, a page of plots, pictures."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from worldmodel.condition.spaces import packed_size
from worldmodel.errors import CheckpointError, ConfigError, DataError
from worldmodel.files import config_from_dict, config_to_dict, finite, read_json, writable, write_json
from worldmodel.published import cache_folder
from worldmodel.training.collect import CollectConfig, collect
from worldmodel.training.episodes import EpisodeDataset, EpisodeSplit, Windows, counted, stack_windows
from worldmodel.training.measure import (
    Clips,
    EvaluateConfig,
    Report,
    endurance,
    likelihoods,
    pictures,
    shown_r2,
)
from worldmodel.training.plots import plot_report
from worldmodel.training.provenance import first_held_out
from worldmodel.training.provenance import git_revision as git_revision
from worldmodel.world import WorldModel

HELD_OUT_SEED = 1_000_003
"""Seed of fresh evaluation episodes; training collections use small ones."""


def held_out_episodes(dataset: EpisodeDataset, world: WorldModel) -> range:
    """Those that the world was not trained on. Raises DataError where there are none."""
    indices = range(first_held_out(world.spec, dataset), dataset.episodes)
    if not indices:
        raise DataError(
            f"{dataset.folder}: {world.spec.name} was trained on {counted(dataset.episodes)} of it, so none is held out; "
            "collect more, or with another --seed"
        )
    return indices


def fitting_horizon(dataset: EpisodeDataset, world: WorldModel, config: EvaluateConfig) -> int:
    """The chunks to imagine: ``config.horizon``, or so few that half of the held-out episodes are long enough.

    Raises:
        DataError: as `held_out_episodes`.
    """
    middle = int(np.median(dataset.lengths()[held_out_episodes(dataset, world).start :]))
    return max(1, min(config.horizon, middle - config.context))


def held_out_clips(
    dataset: EpisodeDataset,
    world: WorldModel,
    length: int,
    limit: int,
    from_start: bool = False,
    context: int = 0,
) -> Clips:
    """One clip of ``length`` chunks from each held-out episode that is long enough: from a random place, or its start.

    Held out are the last tenth of the episodes of any collection that the world was trained on, whatever follows them in
    a longer collection of the same seed, and all episodes of a collection of another seed or environment. ``context``
    chunks of ``length`` are not a part of the horizon, which the error tells.

    Raises:
        DataError: no episode is held out, or none of these is that long.
    """
    indices = held_out_episodes(dataset, world)
    split = EpisodeSplit(indices, dataset.frame_skip, lru_cache(maxsize=4)(dataset.episode))
    rng = np.random.default_rng(0)
    windows: list[Windows] = []
    for row, index in enumerate(tqdm(indices, desc="read held-out episodes", unit="episode", leave=False)):
        chunks = int(split.lengths[row])
        if chunks >= length and len(windows) < limit:
            place = 0 if from_start else int(rng.integers(chunks - length + 1))
            windows.append(split.window(index, place, length))
    if not windows:
        longest = int(split.lengths.max())
        fits = (
            f"--horizon {longest - context}" if longest > context else f"--context {longest - 1} --horizon 1"
        )
        shorter = f"give {fits} or " if longest > 1 else ""
        raise DataError(
            f"{dataset.folder}: no held-out episode has {length} chunks, the longest has {longest}; {shorter}collect "
            "longer episodes"
        )
    w = stack_windows(windows)
    policies = np.array([str(dataset.episode(int(index)).meta.get("policy")) for index in w.episode])
    return Clips(w.frames, w.actions, w.rewards, w.terminated, w.observations, policies)


def check_report(file: Path, world: WorldModel) -> None:
    """Refuse a folder for an evaluation's JSON ``file`` that cannot be written, or holds that of another world.

    Raises:
        ConfigError: another world's. CheckpointError: it cannot be written, or the file is damaged.
    """
    writable(file.parent)
    old = read_json(file) if file.is_file() else {"fingerprint": world.fingerprint}
    if not isinstance(old, dict) or old.get("fingerprint") != world.fingerprint:
        raise ConfigError(f"{file} is of another world (of other weights); choose another --out")


def evaluate(
    world: WorldModel, dataset: EpisodeDataset, out: str | Path, config: EvaluateConfig | None = None
) -> dict[str, Any]:
    """Measure a world; writes ``evaluation.json``, ``evaluation.png`` and ``pictures.png`` into ``out``.

    Raises:
        DataError: the dataset has another frame size, chunk or action space, or no held-out episode is long enough.
        CheckpointError, ConfigError: as `check_report`.
    """
    config = config or EvaluateConfig()
    if dataset.frame_size != world.spec.frame_size or dataset.frame_skip != world.chunk_frames:
        raise DataError(
            f"{dataset.folder}: frames {dataset.frame_size} in chunks of {dataset.frame_skip}, the world has "
            f"{world.spec.frame_size} in chunks of {world.chunk_frames}"
        )
    space = world.spec.action_space
    if dataset.action_space != space and packed_size(dataset.action_space) + packed_size(space):
        raise DataError(
            f"{dataset.folder}: actions are {dataset.action_space}, the world takes {space}; give data with such actions"
        )
    folder, report = Path(out), Report()
    check_report(folder / "evaluation.json", world)
    length = config.context + config.horizon
    clips = held_out_clips(dataset, world, length, config.clips, context=config.context)
    beginnings = held_out_clips(dataset, world, length, config.clips, from_start=True)
    report.numbers = {
        "world": world.spec.name,
        "fingerprint": world.fingerprint,
        "git_revision": git_revision(),
        "data": {"environment": world.spec.environment.get("env"), "held_out_clips": len(clips.frames)},
        "context_chunks": config.context,
        "sampling": config_to_dict(world.spec.sampling),
    }
    report.numbers["likelihood"] = likelihoods(world, clips, config)
    report.numbers["pictures"] = pictures(world, clips, config, report)
    report.numbers["pictures_from_episode_start"] = pictures(world, beginnings, config, report)
    endurance(world, clips, config, report)
    write_json(folder / "evaluation.json", finite(report.numbers))
    plot_report(report, folder)
    return report.numbers


def own_folder(folder: Path, note: str, fingerprint: str) -> Path:
    """``folder``, or one beside it where ``note`` in it tells the figures of a world of other weights."""
    try:
        told = read_json(folder / note)
    except CheckpointError:
        return folder
    theirs = isinstance(told, dict) and told.get("fingerprint") not in (None, fingerprint)
    return folder.with_name(f"{folder.name}-{fingerprint[:8]}") if theirs else folder


def held_out_dataset(world: WorldModel, episodes: int) -> EpisodeDataset:
    """Fresh real episodes from the world's own environment, collected like its training data but with another seed.

    They are kept in the user's cache folder and collected once.

    Raises:
        DataError: the world does not say which environment it was learned from.
    """
    if "env" not in world.spec.environment:
        raise DataError(f"world {world.spec.name} names no environment to collect from; give --data")
    config = config_from_dict(CollectConfig, world.spec.environment, "world.json: environment")
    config = replace(config, episodes=episodes, seed=HELD_OUT_SEED, workers=2)
    folder = cache_folder() / "held_out" / f"{world.spec.name}-{episodes}-{world.fingerprint[:8]}"
    collect(config, folder)
    return EpisodeDataset.open(folder)


def summary(numbers: dict[str, Any]) -> str:
    """The figures of an evaluation as a short text."""
    likelihood, ways = numbers["likelihood"], numbers["pictures"]
    begun = numbers["pictures_from_episode_start"]

    def shown(value: dict[str, float]) -> str:
        return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"

    lines = [
        f"world {numbers['world']}, revision {numbers['git_revision']}, {numbers['data']['held_out_clips']} held-out clips"
    ]
    for name in ("true", "none", "wrong"):
        row = likelihood[name]
        lines.append(
            f"{name:6s} action: {shown(row['nats_per_chunk'])} nats a chunk, {shown(row['bits_per_dim'])} bits/dim, "
            f"z^2/2 + log sigma {likelihood['mean_z2_half_plus_log_sigma'][name]:.3f} "
            f"(floor {likelihood['noise_floor']:.3f})"
        )
    lines.append(
        f"reward R2: teacher-forced {shown_r2(likelihood['reward'])}, open loop {shown_r2(ways['open_loop']['reward'])}"
    )
    lines.append(f"codec: {ways['codec_only']['psnr_of_mean_error']:.2f} dB")

    def by_horizon(title: str, values: list[dict[str, float]] | None) -> None:
        if values:
            chosen = [h for h in (1, 2, 5, 8, 12, 16) if h <= len(values)]
            at = "  ".join(f"@{h} {shown(values[h - 1])}" for h in chosen)
            lines.append(f"{title:40s} {at} (n {values[0]['n']})")

    for place, results in (("from the first chunks of an episode", begun), ("from a random place", ways)):
        lines.append(f"{place}, {numbers['context_chunks']} real chunks, then:")
        for metric in ("angle_error_degrees", "psnr", "ssim"):
            for name in ("open_loop", "teacher_forced", "repeat_last_chunk", "perturbed_simulator"):
                by_horizon(f"  {metric} {name}", results.get(name, {}).get(metric))
        for policy, values in results["open_loop"].get("angle_error_degrees_by_policy", {}).items():
            by_horizon(f"  angle error, open loop, {policy}", values)
    if "endurance" in numbers:
        e = numbers["endurance"]
        lines.append(
            f"open loop of {e['chunks']} chunks: PSNR to the nearest real frame "
            f"{shown(e['sharpness_psnr_first_tenth'])} -> "
            f"{shown(e['sharpness_psnr_last_tenth'])}; degrees a frame {shown(e['degrees_a_frame_last_tenth'])} "
            f"(real {shown(e['degrees_a_frame_real'])})"
        )
    return "\n".join(lines)
