"""What the sections of the agents' evaluation share: their dials, parts kept on disk, the real environment, intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from agents.actions import batch_of_one
from envs import ChunkedEnv
from worldmodel import InputError, WorldModel, WorldState
from worldmodel.errors import CheckpointError
from worldmodel.files import config_from_dict, finite, read_json, write_json
from worldmodel.training.collect import CollectConfig
from worldmodel.training.evaluate import HELD_OUT_SEED
from worldmodel.training.measure import EvaluateConfig, interval
from worldmodel.training.policies import make_policy

Numbers = dict[str, Any]
"""Nested JSON; what was resampled is {"value", "low", "high", "n"}, a 95 % bootstrap interval over starts."""


@dataclass(frozen=True)
class TrialConfig:
    """starts: held-out starts of an episode, ``seed``, ``seed`` + 1 and so on. chunks: at most so many of an episode,
    None for the environment's own limit. preset: of the planner. clips: held-out clips for inference, counterfactuals
    and termination. policy_chunks: imagined chunks that PPO learns from. bootstrap: resamples of an interval.
    """

    starts: int = 20
    chunks: int | None = None
    preset: str = "fast"
    clips: int = 100
    policy_chunks: int = 60_000
    bootstrap: int = 1000
    seed: int = HELD_OUT_SEED

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            InputError: naming the field.
        """
        for name in ("starts", "clips", "policy_chunks", "bootstrap"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.chunks is not None and self.chunks < 1:
            raise InputError(f"chunks is {self.chunks}, expected at least 1, or None")

    @property
    def seeds(self) -> range:
        """One for each start."""
        return range(self.seed, self.seed + self.starts)


class Progress:
    """The bars of a section and its finished parts, kept in one file: an interrupted section continues.

    What was kept under another ``key`` (fingerprint of the world, dials) is forgotten.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        self.path = path
        self.kept: dict[str, Any] = {"key": dict(key), "parts": {}, "numbers": None}
        try:
            kept = read_json(path)
        except CheckpointError:
            return
        if isinstance(kept, dict) and kept.get("key") == key and set(kept) >= set(self.kept):
            self.kept = kept

    def __call__(self, items: Iterable[Any], **options: Any) -> Any:
        """The items, with a bar."""
        return tqdm(items, leave=False, **options)

    def each(
        self, name: str, keys: Iterable[int], compute: Callable[[int], Any], unit: str = "episode"
    ) -> list[Any]:
        """``compute`` of every key, JSON-ready, None for what is not finite; those done before are read instead."""
        parts = self.kept["parts"].setdefault(name, {})
        for key in tqdm(list(keys), desc=name, unit=unit):
            if str(key) not in parts:
                parts[str(key)] = finite(compute(key))
                write_json(self.path, self.kept)
        return [parts[str(key)] for key in keys]

    def finish(self, numbers: Numbers) -> None:
        """Keep the section's figures."""
        self.kept["numbers"] = numbers
        write_json(self.path, self.kept)


def with_nan(value: Any) -> Any:
    """Numbers for plots: NaN for None."""
    if isinstance(value, dict):
        return {k: with_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [with_nan(v) for v in value]
    return math.nan if value is None else value


def camera(world: WorldModel) -> CollectConfig:
    """How the world's own data were collected.

    Raises:
        InputError: the world does not say which environment it was learned from.
    """
    if "env" not in world.spec.environment:
        raise InputError(f"world {world.spec.name} names no environment, so no agent can be proven in it")
    return config_from_dict(CollectConfig, world.spec.environment, "world.json: environment")


def real_env(world: WorldModel) -> ChunkedEnv:
    """The real environment that the world was learned from, chunked and filmed as then."""
    made = camera(world)
    return ChunkedEnv(made.env, made.frame_skip, made.frame_size, made.hide, **made.env_kwargs)


@dataclass(frozen=True)
class Walk:
    """T real chunks from a seed, under one of the behaviours that the world was learned from.

    first: (F, height, width, 3) uint8, what reset showed. frames: (T, F, height, width, 3). actions: T of them.
    observations: (T, ...) the simulator's own after each chunk. terminated: the last chunk ended the episode.
    """

    seed: int
    first: np.ndarray
    frames: np.ndarray
    actions: list[Any]
    observations: np.ndarray
    terminated: bool

    def begun(self, world: WorldModel) -> WorldState:
        """The session that has observed what reset showed."""
        return world.observe(world.initial_state([self.seed]), self.first[None, -world.first_frames :])[0]

    def before_last(self, world: WorldModel) -> WorldState:
        """The session that has observed everything but the last chunk."""
        state = self.begun(world)
        for frames, action in zip(self.frames[:-1], self.actions[:-1], strict=True):
            state, _ = world.observe(state, frames[None], batch_of_one(action))
        return state


def walk(env: ChunkedEnv, made: CollectConfig, seed: int, chunks: int) -> Walk:
    """At most so many chunks of a real episode; a function of its arguments."""
    rng = np.random.default_rng(seed)
    shares = np.array([policy.share for policy in made.policies])
    name = made.policies[int(rng.choice(len(shares), p=shares / shares.sum()))].name
    policy = make_policy(name, env.action_space, rng)
    first, info = env.reset(seed=seed)
    frames, actions, seen, terminated = [], [], [], False
    for _ in range(chunks):
        action = policy(env, info["observation"])
        chunk, _, terminated, truncated, info = env.step(action)
        frames.append(chunk)
        actions.append(action)
        seen.append(np.asarray(info["observation"]))
        if terminated or truncated:
            break
    return Walk(seed, first, np.stack(frames), actions, np.stack(seen), terminated)


def replay(env: ChunkedEnv, walked: Walk, action: Any) -> tuple[np.ndarray, np.ndarray]:
    """The chunk (F, height, width, 3) that another action in place of the last would really have caused, and the
    simulator's observation after it. The simulator is played again from its seed, so it must be deterministic.
    """
    env.env.reset(seed=walked.seed)
    for taken in walked.actions[:-1]:
        for _ in range(env.camera.frame_skip):
            env.env.step(taken)
    frames, _, _, _, info = env.step(action)
    return frames, np.asarray(info["observation"])


def mean_of(values: Any, config: TrialConfig) -> dict[str, float | int]:
    """The mean with its 95 % bootstrap interval over the values."""
    return interval(np.asarray(values, dtype=np.float64), np.mean, EvaluateConfig(bootstrap=config.bootstrap))


def resampled(
    statistic: Callable[[np.ndarray], float], rows: int, config: TrialConfig
) -> dict[str, float | int]:
    """A statistic of rows (by index) with its 95 % bootstrap interval; resamples where it is NaN are left out."""
    rng = np.random.default_rng(0)
    values = [statistic(rng.integers(rows, size=rows)) for _ in range(config.bootstrap)]
    known = [value for value in values if not math.isnan(value)]
    low, high = np.percentile(known, [2.5, 97.5]) if known else (math.nan, math.nan)
    return {"value": statistic(np.arange(rows)), "low": float(low), "high": float(high), "n": rows}


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve: the probability that a positive scores above a negative; NaN with one class alone."""
    low, high = np.sort(scores[~positive]), scores[positive]
    if not len(low) or not len(high):
        return float("nan")
    below, upto = np.searchsorted(low, high, "left"), np.searchsorted(low, high, "right")
    return float((below + upto).mean() / 2 / len(low))
