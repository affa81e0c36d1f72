"""Measure a world on held-out real episodes: likelihoods, pictures by horizon, the simulator's own quantities, reward.

Everything is computed per clip (one start per held-out episode) and reported as a mean or median over clips with a
bootstrap confidence interval over *clips*. Axis letters: B clips, T chunks, F pixel frames of a chunk.
"""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from gymnasium import spaces
from tqdm import tqdm

from worldmodel.errors import DataError
from worldmodel.files import config_from_dict, write_json
from worldmodel.training.collect import CollectConfig, collect
from worldmodel.training.episodes import EpisodeDataset, EpisodeSplit, Windows, split_indices
from worldmodel.training.probes import PROBES, wrap
from worldmodel.world import WorldModel

HELD_OUT_SEED = 1_000_003
"""Seed of fresh evaluation episodes; training collections use small ones."""


@dataclass(frozen=True)
class EvaluateConfig:
    """context: real chunks observed first. horizon: chunks imagined and judged. long_horizon: chunks of the open-loop
    endurance test. clips: at most so many held-out clips. bootstrap: resamples of the 95 % intervals.
    """

    context: int = 3
    horizon: int = 16
    long_horizon: int = 100
    clips: int = 90
    bootstrap: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Clips:
    """Held-out clips: frames (B, T, F, height, width, 3), actions (B, T, ...), rewards and terminated (B, T),
    observations (B, T, F, ...).
    """

    frames: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    observations: np.ndarray


@dataclass
class Report:
    """Numbers as nested JSON: every leaf that was resampled is {"value", "low", "high", "n"}."""

    numbers: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, np.ndarray] = field(default_factory=dict)


def interval(
    values: np.ndarray, statistic: Callable[..., np.ndarray], config: EvaluateConfig
) -> dict[str, float | int]:
    """A statistic of per-clip values (B,) with its 95 % bootstrap interval over clips; NaN rows are left out."""
    values = values[~np.isnan(values)]
    if not len(values):
        return {"value": math.nan, "low": math.nan, "high": math.nan, "n": 0}
    rng = np.random.default_rng(config.seed)
    resampled = statistic(values[rng.integers(len(values), size=(config.bootstrap, len(values)))], axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return {
        "value": float(statistic(values, axis=0)),
        "low": float(low),
        "high": float(high),
        "n": len(values),
    }


def by_horizon(
    values: np.ndarray, statistic: Callable[..., np.ndarray], config: EvaluateConfig
) -> list[dict[str, float | int]]:
    """`interval` for every column of (B, T)."""
    return [interval(column, statistic, config) for column in values.T]


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """dB (B, T) of the mean squared error of chunks (B, T, F, height, width, 3) uint8, capped at 60."""
    mse = np.square(a.astype(np.float32) - b.astype(np.float32)).mean((2, 3, 4, 5))
    return 10.0 * np.log10(255.0**2 / np.maximum(mse, 255.0**2 / 1e6))


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity (B, T) of chunks, luma, Gaussian window of 11 (Wang et al., 2004)."""

    def blur(x: np.ndarray) -> np.ndarray:
        return np.asarray(cv2.GaussianBlur(x, (11, 11), 1.5))

    def one(x: np.ndarray, y: np.ndarray) -> float:
        x, y = (cv2.cvtColor(p, cv2.COLOR_RGB2GRAY).astype(np.float64) for p in (x, y))
        mx, my = blur(x), blur(y)
        vx, vy, vxy = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        return float((((2 * mx * my + c1) * (2 * vxy + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())

    return np.array(
        [
            [np.mean([one(x, y) for x, y in zip(p, q, strict=True)]) for p, q in zip(r, s, strict=True)]
            for r, s in zip(a, b, strict=True)
        ]
    )


def held_out_clips(dataset: EpisodeDataset, world: WorldModel, length: int, limit: int) -> Clips:
    """One clip of ``length`` chunks from the middle of each held-out episode that is long enough.

    Held out are the last tenth of the episodes of the collection that the world was trained on (same seed), and all
    episodes of any other collection.

    Raises:
        DataError: no held-out episode is that long.
    """
    trained_on = dataset.info["collect"] == world.spec.environment
    indices = split_indices(dataset.episodes, "test") if trained_on else range(dataset.episodes)
    split = EpisodeSplit(indices, dataset.frame_skip, lru_cache(maxsize=4)(dataset.episode))
    windows: list[Windows] = []
    for row, index in enumerate(tqdm(indices, desc="read held-out episodes", unit="episode", leave=False)):
        chunks = int(split.lengths[row])
        if chunks >= length and len(windows) < limit:
            windows.append(split.window(index, (chunks - length) // 2, length))
    if not windows:
        raise DataError(f"{dataset.folder}: no held-out episode has {length} chunks; collect longer episodes")
    return Clips(*(np.concatenate([getattr(w, name) for w in windows]) for name in Clips.__annotations__))


def wrong_actions(space: spaces.Space[Any], actions: np.ndarray) -> np.ndarray:
    """Actions that did not happen: mirrored in their range for Box, another clip's for other spaces."""
    if isinstance(space, spaces.Box) and np.isfinite(space.low).all() and np.isfinite(space.high).all():
        return (space.low + space.high - actions).astype(actions.dtype)
    return np.roll(actions, 1, axis=0)


def likelihoods(world: WorldModel, clips: Clips, config: EvaluateConfig) -> dict[str, Any]:
    """Nats per chunk and bits per dimension with the true, a wrong and no action; reward read off real latents.

    Each chunk is scored given the real past with true actions; noise is one draw per chunk.
    """
    state = world.initial_state(list(range(len(clips.frames))))
    wrong = wrong_actions(world.spec.action_space, clips.actions)
    nats: dict[str, list[np.ndarray]] = {"true": [], "wrong": [], "none": []}
    rewards = []
    for t in tqdm(range(clips.frames.shape[1]), desc="teacher-forced likelihood", unit="chunk"):
        frames = clips.frames[:, t]
        if t >= config.context:
            nats["wrong"].append(world.score(state, frames, wrong[:, t]).log_prob.numpy())
            nats["none"].append(world.score(state, frames, None).log_prob.numpy())
        state, chunk = world.observe(state, frames, clips.actions[:, t])
        if t >= config.context:
            nats["true"].append(chunk.log_prob.numpy())
            rewards.append(chunk.reward.numpy())
    dims = math.prod(world.latent_shape)
    result: dict[str, Any] = {}
    for name, values in nats.items():
        per_clip = np.mean(values, axis=0)
        result[name] = {
            "nats_per_chunk": interval(per_clip, np.mean, config),
            "bits_per_dim": interval(-per_clip / (dims * math.log(2)), np.mean, config),
        }
    result["mean_z2_half_plus_log_sigma"] = {
        name: float(-np.mean(values) / dims - 0.5 * math.log(2 * math.pi)) for name, values in nats.items()
    }
    result["noise_floor"] = 0.5 + math.log(world.flow.config.noise_std)
    result["reward"] = r_squared(np.stack(rewards, axis=1), clips.rewards[:, config.context :], config)
    return result


def r_squared(predicted: np.ndarray, true: np.ndarray, config: EvaluateConfig) -> dict[str, float | int]:
    """Coefficient of determination over all chunks (B, T), with a bootstrap over clips."""

    def score(rows: np.ndarray) -> float:
        p, t = predicted[rows].ravel(), true[rows].ravel()
        return float(1.0 - np.square(p - t).sum() / max(np.square(t - t.mean()).sum(), 1e-12))

    rng, n = np.random.default_rng(config.seed), len(true)
    resampled = [score(rng.integers(n, size=n)) for _ in range(config.bootstrap)]
    low, high = np.percentile(resampled, [2.5, 97.5])
    return {"r2": score(np.arange(n)), "low": float(low), "high": float(high), "n": int(true.size)}


def open_loop(
    world: WorldModel, clips: Clips, config: EvaluateConfig, horizon: int
) -> tuple[np.ndarray, np.ndarray]:
    """Frames (B, horizon, F, ...) imagined after ``context`` real chunks under true actions; rewards (B, horizon)."""
    state = world.initial_state(list(range(len(clips.frames))))
    c = config.context
    state, _ = world.observe_clip(state, clips.frames[:, :c], clips.actions[:, :c])
    frames, rewards = [], []
    for t in tqdm(range(horizon), desc="open loop", unit="chunk"):
        state, chunk = world.step(state, clips.actions[:, c + t])
        frames.append(chunk.frames.numpy())
        rewards.append(chunk.reward.numpy())
    return np.stack(frames, axis=1), np.stack(rewards, axis=1)


def teacher_forced(world: WorldModel, clips: Clips, config: EvaluateConfig) -> np.ndarray:
    """Frames (B, T - context, F, ...): each chunk imagined from the real past before it."""
    state = world.initial_state(list(range(len(clips.frames))))
    frames = []
    for t in tqdm(range(config.context + config.horizon), desc="teacher-forced pictures", unit="chunk"):
        if t >= config.context:
            frames.append(world.step(state, clips.actions[:, t])[1].frames.numpy())
        state, _ = world.observe(state, clips.frames[:, t], clips.actions[:, t])
    return np.stack(frames, axis=1)


@torch.no_grad()
def codec_only(world: WorldModel, frames: np.ndarray) -> np.ndarray:
    """Frames (B, T, F, ...) through the codec and back."""
    back = []
    for clip in frames:
        pixels = torch.from_numpy(clip.reshape(1, -1, *clip.shape[2:])).to(world.device)
        state = world.codec.initial_state(1)
        latents, _ = world.codec.encode(pixels, state)
        back.append(world.codec.decode(latents, state)[0].cpu().numpy().reshape(clip.shape))
    return np.stack(back)


def pictures(world: WorldModel, clips: Clips, config: EvaluateConfig, report: Report) -> None:
    """PSNR, SSIM and the probe's error by horizon, for four ways to predict."""
    c, horizon = config.context, config.horizon
    real = clips.frames[:, c : c + horizon]
    imagined, rewards = open_loop(world, clips, config, horizon)
    ways = {
        "open_loop": imagined,
        "teacher_forced": teacher_forced(world, clips, config),
        "codec_only": codec_only(world, real),
        "repeat_last_chunk": np.repeat(clips.frames[:, c - 1 : c], horizon, axis=1),
    }
    probe = PROBES.get(str(world.spec.environment.get("env")))
    numbers: dict[str, Any] = {}
    for name, frames in tqdm(ways.items(), desc="PSNR and SSIM", unit="way"):
        numbers[name] = {
            "psnr": by_horizon(psnr(frames, real), np.mean, config),
            "ssim": by_horizon(ssim(frames, real), np.mean, config),
        }
        if probe is not None:
            off_picture, truth = probe
            true_angle = truth(clips.observations[:, c : c + horizon, -1])
            error = np.degrees(np.abs(wrap(off_picture(frames[:, :, -1]) - true_angle)))
            numbers[name]["angle_error_degrees"] = by_horizon(error, np.median, config)
    total = np.square(ways["codec_only"].astype(np.float32) - real).mean()
    numbers["codec_only"]["psnr_of_mean_error"] = float(10 * np.log10(255.0**2 / total))
    numbers["open_loop"]["reward"] = r_squared(rewards, clips.rewards[:, c : c + horizon], config)
    report.numbers["pictures"] = numbers
    report.pictures.update({"real": real[:4], **{k: v[:4] for k, v in ways.items()}})


def endurance(world: WorldModel, clips: Clips, config: EvaluateConfig, report: Report) -> None:
    """A long open loop: does the picture stay sharp and the motion plausible?

    Sharpness: PSNR of every imagined frame to the nearest real one (of the same probe reading) in a bank of real
    frames. Motion: change of the probe's reading from frame to frame against real clips' changes.
    """
    probe = PROBES.get(str(world.spec.environment.get("env")))
    if probe is None or not config.long_horizon:
        return
    off_picture, _ = probe
    rows, c = min(16, len(clips.frames)), config.context
    state = world.initial_state([10_000 + i for i in range(rows)])
    state, _ = world.observe_clip(state, clips.frames[:rows, :c], clips.actions[:rows, :c])
    rng, space = np.random.default_rng(config.seed), world.spec.action_space
    bank = clips.frames.reshape(-1, *clips.frames.shape[3:])
    order = np.argsort(off_picture(bank))
    angles = off_picture(bank)[order]
    sharpness, speeds, kept = [], [], []
    space.seed(config.seed)
    held = np.stack([space.sample() for _ in range(rows)])
    last = None
    for t in tqdm(range(config.long_horizon), desc=f"{config.long_horizon} chunks open loop", unit="chunk"):
        if t % 4 == 0:
            fresh = np.stack([space.sample() for _ in range(rows)])
            held = np.where(rng.random(len(held)).reshape(-1, *[1] * (held.ndim - 1)) < 0.5, fresh, held)
        state, chunk = world.step(state, held.astype(space.dtype))
        frames = chunk.frames.numpy()
        reading = off_picture(frames)
        nearest = order[np.clip(np.searchsorted(angles, np.nan_to_num(reading)), 0, len(order) - 1)]
        sharpness.append(psnr(frames[:, None], bank[nearest][:, None])[:, 0])
        path = reading if last is None else np.concatenate((last[:, None], reading), axis=1)
        speeds.append(np.degrees(np.abs(wrap(np.diff(path, axis=1)))).mean(1))
        last = reading[:, -1]
        if t % max(1, config.long_horizon // 12) == 0 or t == config.long_horizon - 1:
            kept.append(frames[:4, -1])
    real_speed = np.degrees(np.abs(wrap(np.diff(off_picture(clips.frames), axis=2))))
    tenth = max(1, config.long_horizon // 10)
    report.numbers["endurance"] = {
        "chunks": config.long_horizon,
        "sharpness_psnr_first_tenth": interval(np.mean(sharpness[:tenth], axis=0), np.mean, config),
        "sharpness_psnr_last_tenth": interval(np.mean(sharpness[-tenth:], axis=0), np.mean, config),
        "degrees_a_frame_last_tenth": interval(np.mean(speeds[-tenth:], axis=0), np.mean, config),
        "degrees_a_frame_real": interval(real_speed.mean((1, 2)), np.mean, config),
        "frames_without_a_reading": int(np.isnan(np.stack(speeds)).sum()),
    }
    report.pictures["endurance"] = np.stack(kept, axis=1)


def git_revision() -> str:
    """The revision of the working tree, with "+changes" if it is not clean, or "unknown" outside a checkout."""
    here = Path(__file__).parent
    try:
        run = lambda *a: subprocess.run(  # noqa: E731
            ["git", *a], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        return str(run("rev-parse", "--short", "HEAD")) + (
            "+changes" if run("status", "--porcelain", "-uno") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def evaluate(
    world: WorldModel, dataset: EpisodeDataset, out: str | Path, config: EvaluateConfig | None = None
) -> dict[str, Any]:
    """Measure a world; writes ``evaluation.json``, ``evaluation.png`` and ``pictures.png`` into ``out``.

    Raises:
        DataError: the dataset has another frame size or chunk, or no held-out episode is long enough.
    """
    config = config or EvaluateConfig()
    if dataset.frame_size != world.spec.frame_size or dataset.frame_skip != world.chunk_frames:
        raise DataError(
            f"{dataset.folder}: frames {dataset.frame_size} in chunks of {dataset.frame_skip}, the world has "
            f"{world.spec.frame_size} in chunks of {world.chunk_frames}"
        )
    report = Report()
    clips = held_out_clips(dataset, world, config.context + config.horizon, config.clips)
    report.numbers = {
        "world": world.spec.name,
        "fingerprint": world.fingerprint,
        "git_revision": git_revision(),
        "data": {"environment": world.spec.environment.get("env"), "held_out_clips": len(clips.frames)},
        "context_chunks": config.context,
    }
    report.numbers["likelihood"] = likelihoods(world, clips, config)
    pictures(world, clips, config, report)
    endurance(world, clips, config, report)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "evaluation.json", _finite(report.numbers))
    from worldmodel.training.plots import plot_report

    plot_report(report, folder)
    return report.numbers


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
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = home / "worldmodel" / "held_out" / f"{world.spec.name}-{episodes}-{world.fingerprint[:8]}"
    collect(config, folder)
    return EpisodeDataset.open(folder)


def summary(numbers: dict[str, Any]) -> str:
    """The figures of an evaluation as a short text."""
    likelihood, ways = numbers["likelihood"], numbers["pictures"]

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
        f"reward R2: teacher-forced {likelihood['reward']['r2']:.4f}, open loop {ways['open_loop']['reward']['r2']:.4f}"
    )
    lines.append(f"codec: {ways['codec_only']['psnr_of_mean_error']:.2f} dB")
    for metric in ("angle_error_degrees", "psnr", "ssim"):
        for name in ("open_loop", "teacher_forced", "repeat_last_chunk"):
            values = ways[name].get(metric)
            if values:
                chosen = [h for h in (1, 2, 5, 8, 12, 16) if h <= len(values)]
                lines.append(
                    f"{metric:20s} {name:18s} " + "  ".join(f"@{h} {shown(values[h - 1])}" for h in chosen)
                )
    if "endurance" in numbers:
        e = numbers["endurance"]
        lines.append(
            f"open loop of {e['chunks']} chunks: PSNR to the nearest real frame "
            f"{shown(e['sharpness_psnr_first_tenth'])} -> "
            f"{shown(e['sharpness_psnr_last_tenth'])}; degrees a frame {shown(e['degrees_a_frame_last_tenth'])} "
            f"(real {shown(e['degrees_a_frame_real'])})"
        )
    return "\n".join(lines)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
