"""What a world is measured by: likelihoods, pictures by horizon, the simulator's own quantities, reward.

Everything is computed per clip and reported as a mean or median over clips with a bootstrap interval over *clips*.
Axis letters: B clips, T chunks, F pixel frames of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import torch
from gymnasium import spaces
from tqdm import tqdm

from worldmodel.chunk import actions_at
from worldmodel.files import require_at_least
from worldmodel.training.probes import (
    PERTURBATION,
    PROBES,
    pendulum_perturbed,
    pendulum_true_angle,
    wrap,
)
from worldmodel.world import WorldModel


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

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be used."""
        require_at_least(1, self, "context", "horizon", "clips", "bootstrap")
        require_at_least(0, self, "long_horizon", "seed")


@dataclass(frozen=True)
class Clips:
    """Held-out clips: frames (B, T, F, height, width, 3), actions (B, T, ...) or a dict of such, rewards and terminated
    (B, T), observations (B, T, F, ...); policies (B,) str, the behaviour that each one shows.
    """

    frames: np.ndarray
    actions: Any
    rewards: np.ndarray
    terminated: np.ndarray
    observations: np.ndarray
    policies: np.ndarray


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


def wrong_actions(space: spaces.Space[Any], actions: Any) -> Any:
    """Actions that did not happen: mirrored in their range for Box, the next choice for Discrete and MultiDiscrete, another
    clip's for other spaces; so in each part of a Dict.
    """
    if isinstance(space, spaces.Dict):
        return {key: wrong_actions(space[key], part) for key, part in actions.items()}
    if isinstance(space, spaces.Box) and np.isfinite(space.low).all() and np.isfinite(space.high).all():
        return (space.low + space.high - actions).astype(actions.dtype)
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        choices = space.n if isinstance(space, spaces.Discrete) else space.nvec
        return (actions - space.start + 1) % choices + space.start
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
            nats["wrong"].append(world.score(state, frames, actions_at(wrong, t)).log_prob.numpy())
            nats["none"].append(world.score(state, frames, None).log_prob.numpy())
        state, chunk = world.observe(state, frames, actions_at(clips.actions, t))
        if t >= config.context:
            nats["true"].append(chunk.log_prob.numpy())
            rewards.append(chunk.reward.cpu().numpy())
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


def r_squared(
    predicted: np.ndarray, true: np.ndarray, config: EvaluateConfig
) -> dict[str, float | int | None]:
    """Coefficient of determination over chunks (B, T), with a bootstrap over clips; None where ``true`` never varies."""

    def score(rows: np.ndarray) -> float:
        p, t = predicted[rows].ravel(), true[rows].ravel()
        return (
            math.nan
            if np.ptp(t) == 0
            else float(1.0 - np.square(p - t).sum() / np.square(t - t.mean()).sum())
        )

    if np.ptp(true) == 0:
        return {"r2": None, "low": None, "high": None, "n": int(true.size)}
    rng, n = np.random.default_rng(config.seed), len(true)
    resampled = [score(rng.integers(n, size=n)) for _ in range(config.bootstrap)]
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return {"r2": score(np.arange(n)), "low": float(low), "high": float(high), "n": int(true.size)}


def shown_r2(reward: Mapping[str, Any]) -> str:
    """What `r_squared` gave, for a reader."""
    return "n/a: the reward never varies" if reward["r2"] is None else f"{reward['r2']:.4f}"


def open_loop(
    world: WorldModel, clips: Clips, config: EvaluateConfig, horizon: int
) -> tuple[np.ndarray, np.ndarray]:
    """Frames (B, horizon, F, ...) imagined after ``context`` real chunks under true actions; rewards (B, horizon)."""
    state = world.initial_state(list(range(len(clips.frames))))
    c = config.context
    state, _ = world.observe_clip(state, clips.frames[:, :c], actions_at(clips.actions, slice(c)))
    frames, rewards = [], []
    for t in tqdm(range(horizon), desc="open loop", unit="chunk"):
        state, chunk = world.step(state, actions_at(clips.actions, c + t))
        frames.append(chunk.frames.cpu().numpy())
        rewards.append(chunk.reward.cpu().numpy())
    return np.stack(frames, axis=1), np.stack(rewards, axis=1)


def teacher_forced(world: WorldModel, clips: Clips, config: EvaluateConfig) -> np.ndarray:
    """Frames (B, T - context, F, ...): each chunk imagined from the real past before it."""
    state = world.initial_state(list(range(len(clips.frames))))
    frames = []
    for t in tqdm(range(config.context + config.horizon), desc="teacher-forced pictures", unit="chunk"):
        if t >= config.context:
            frames.append(world.step(state, actions_at(clips.actions, t))[1].frames.cpu().numpy())
        state, _ = world.observe(state, clips.frames[:, t], actions_at(clips.actions, t))
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


def pictures(world: WorldModel, clips: Clips, config: EvaluateConfig, report: Report) -> dict[str, Any]:
    """PSNR, SSIM and the probe's error by horizon, for four ways to predict; pictures to look at go into the report."""
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
            numbers[name]["angle_error_degrees_by_policy"] = {
                str(p): by_horizon(error[clips.policies == p], np.median, config)
                for p in np.unique(clips.policies)
            }
    if world.spec.environment.get("env") == "Pendulum-v1":
        before, actions = clips.observations[:, c - 1, -1], clips.actions[:, c : c + horizon]
        floor = pendulum_perturbed(before, actions, world.chunk_frames, config.seed)
        error = np.degrees(
            np.abs(wrap(floor - pendulum_true_angle(clips.observations[:, c : c + horizon, -1])))
        )
        numbers["perturbed_simulator"] = {
            "perturbation_degrees_and_radians_per_second": list(PERTURBATION),
            "angle_error_degrees": by_horizon(error, np.median, config),
        }
    total = np.square(ways["codec_only"].astype(np.float32) - real).mean()
    numbers["codec_only"]["psnr_of_mean_error"] = float(10 * np.log10(255.0**2 / total))
    numbers["open_loop"]["reward"] = r_squared(rewards, clips.rewards[:, c : c + horizon], config)
    report.pictures.update({"real": real[:4], **{k: v[:4] for k, v in ways.items()}})
    return numbers


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
    sharpness, speeds, kept, unread = [], [], [], 0
    space.seed(config.seed)
    held = np.stack([space.sample() for _ in range(rows)])
    last = None
    for t in tqdm(range(config.long_horizon), desc=f"{config.long_horizon} chunks open loop", unit="chunk"):
        if t % 4 == 0:
            fresh = np.stack([space.sample() for _ in range(rows)])
            held = np.where(rng.random(len(held)).reshape(-1, *[1] * (held.ndim - 1)) < 0.5, fresh, held)
        state, chunk = world.step(state, held.astype(space.dtype))
        frames = chunk.frames.cpu().numpy()
        reading = off_picture(frames)
        unread += int(np.isnan(reading).sum())
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
        "frames_without_a_reading": unread,
    }
    report.pictures["endurance"] = np.stack(kept, axis=1)
