"""Collect episodes from a Gymnasium environment that renders: chunked action repeat, mixed policies."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import zipfile
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import gymnasium
import numpy as np
from gymnasium import spaces
from tqdm import tqdm

from worldmodel.errors import ConfigError, DataError
from worldmodel.files import config_to_dict, read_json, remove_leftovers, require_at_least, write_json
from worldmodel.training.episodes import FORMAT_VERSION, Episode, episode_path, save_episode, stored_space
from worldmodel.training.policies import WIDE_STARTS, find_policy, make_policy

LARGEST_OBSERVATION = 1024  # numbers; larger ones (images) are not kept beside the frames


@dataclass(frozen=True)
class PolicyShare:
    """A behaviour policy by name (see `policies.find_policy`) and its relative share of the episodes."""

    name: str
    share: float = 1.0


@dataclass(frozen=True)
class CollectConfig:
    """What to collect.

    env, env_kwargs: for `gymnasium.make`; `module:Name-v0` imports the module first. episodes; chunks: K,
    at most, of each. frame_skip: F, simulator steps that hold one action, each recorded as a frame.
    frame_size: (height, width) after an area resize. hide: attributes of the simulator set to None while it
    renders (Pendulum's "last_u" draws the torque). wide_starts: share of episodes that start from the
    environment's wide start (`WIDE_STARTS`).
    """

    env: str = "Pendulum-v1"
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    episodes: int = 400
    chunks: int = 50
    frame_skip: int = 4
    frame_size: tuple[int, int] = (64, 64)
    policies: tuple[PolicyShare, ...] = (PolicyShare("random"), PolicyShare("random_held"))
    hide: tuple[str, ...] = ()
    wide_starts: float = 0.0
    seed: int = 0
    workers: int = 2

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be used."""
        require_at_least(1, self, "episodes", "chunks", "frame_skip", "frame_size", "workers")
        if not self.policies or not all(0 < policy.share < math.inf for policy in self.policies):
            raise ConfigError("policies must name at least one policy, each with a finite share above 0")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}, expected at least 0")
        for policy in self.policies:
            if ":" not in policy.name:  # of others the module is imported when they are needed
                find_policy(policy.name)
        if self.wide_starts and self.env not in WIDE_STARTS:
            raise ConfigError(
                f"no wide start for {self.env}; known for {', '.join(WIDE_STARTS)}; set it to 0"
            )


def pendulum() -> CollectConfig:
    """900 episodes of Pendulum-v1 without the torque arrow."""
    return CollectConfig(
        env="Pendulum-v1",
        episodes=900,
        policies=(PolicyShare("random_held", 1.0), PolicyShare("pendulum_swing", 2.0)),
        hide=("last_u",),
        wide_starts=0.6,
    )


def restless_pendulum() -> CollectConfig:
    """900 more of it that seldom stand still: repeating the last chunk misses by about 24, 46 and 73 degrees after 1, 2
    and 5 chunks.
    """
    policies = (PolicyShare("random_held", 1.0), PolicyShare("pendulum_restless", 2.0))
    return replace(pendulum(), policies=policies, seed=1)


def lunarlander() -> CollectConfig:
    """1,600 episodes of LunarLander-v3, about 30 chunks each; every one has a terrain of its own."""
    return CollectConfig(
        env="LunarLander-v3",
        episodes=1_600,
        chunks=80,
        policies=(PolicyShare("random_held", 1.0), PolicyShare("lunar_lander", 3.0)),
    )


def collect(config: CollectConfig, folder: Path) -> None:
    """Fill ``folder`` with episodes; those already there are kept, so an interrupted run continues.

    Episode i is a function of (config, i) alone: neither the workers nor an interruption change it.

    Raises:
        ConfigError: the environment cannot be made or rendered, a policy is for another one, or the folder holds another
            collection. DataError: a worker was killed, or a reward is not finite.
        KeyboardInterrupt: after Ctrl-C, with every file on disk whole.
    """
    folder = Path(folder)
    remove_leftovers(folder / "episodes")
    info = _describe(config)
    _check_same_collection(folder, info)
    todo = [i for i in range(config.episodes) if not _is_whole(episode_path(folder, i))]
    write_json(folder / "dataset.json", info | {"complete": not todo})
    groups = [todo[i : i + 4] for i in range(0, len(todo), 4)]
    bar = tqdm(
        total=config.episodes,
        initial=config.episodes - len(todo),
        desc=f"collect {config.env}",
        unit="episode",
    )
    context = multiprocessing.get_context("spawn")
    with bar, ProcessPoolExecutor(config.workers, context, initializer=_quiet_worker) as pool:
        try:
            futures = [pool.submit(_collect_group, config, folder, group) for group in groups]
            for future in futures:
                future.add_done_callback(
                    lambda f: bar.update(0 if f.cancelled() or f.exception() else f.result())
                )
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker was killed, perhaps for want of memory; run the same command to continue, with fewer --workers"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    write_json(folder / "dataset.json", info | {"complete": True})


def collect_episode(config: CollectConfig, env: gymnasium.Env[Any, Any], index: int) -> Episode:
    """Episode ``index`` of a collection, a function of (config, index).

    Raises:
        ConfigError: the environment renders no RGB frames. DataError: a reward is not finite.
    """
    rng = np.random.default_rng((config.seed, index))
    shares = np.array([policy.share for policy in config.policies])
    name = config.policies[int(rng.choice(len(shares), p=shares / shares.sum()))].name
    seed = int(rng.integers(2**31))
    policy = make_policy(name, env.action_space, rng)
    observation, _ = env.reset(seed=seed)
    wide = bool(rng.random() < config.wide_starts)
    if wide:
        observation = WIDE_STARTS[config.env](env, rng)
    frames, observations = [take_picture(env, config)], [_flat(env, observation)]
    actions, terminated, truncated = [], [], []
    rewards: list[float] = []
    for _ in range(config.chunks):
        action, total, ended, cut = policy(env, observation), 0.0, False, False
        for _ in range(config.frame_skip):
            if not (ended or cut):
                observation, reward, ended, cut, _ = env.step(action)
                total += float(reward)
                frames.append(take_picture(env, config))
                observations.append(_flat(env, observation))
            else:
                frames.append(frames[-1])
                observations.append(observations[-1])
        if not abs(total) <= np.finfo(np.float32).max:
            raise DataError(
                f"{config.env}: episode {index}, chunk {len(rewards)} has the reward {total}, expected a finite number; "
                "mend the environment"
            )
        actions.append(action)
        rewards.append(total)
        terminated.append(bool(ended))
        truncated.append(bool(cut))
        if ended or cut:
            break
    truncated[-1] = not terminated[-1]
    return Episode(
        np.stack(frames),
        _stack_actions(env.action_space, actions),
        np.array(rewards, dtype=np.float32),
        np.array(terminated),
        np.array(truncated),
        np.stack(observations),
        {"index": index, "seed": seed, "policy": name, "wide_start": wide},
    )


def _make(config: CollectConfig) -> gymnasium.Env[Any, Any]:
    """The environment, without a time limit of its own inside the episode."""
    limit = config.chunks * config.frame_skip + 1
    try:
        return gymnasium.make(
            config.env,
            render_mode="rgb_array",
            max_episode_steps=limit,
            disable_env_checker=True,
            **config.env_kwargs,
        )
    except (gymnasium.error.Error, ImportError, TypeError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, gymnasium.error.NameNotFound | gymnasium.error.NamespaceNotFound):
            reason += (
                " (give module:NAME-v0 if a module registers it, or a recipe, or a recipe file that is there)"
            )
        raise ConfigError(f"cannot make {config.env} with render_mode rgb_array: {reason}") from error


def take_picture(env: gymnasium.Env[Any, Any], config: CollectConfig) -> np.ndarray:
    """(height, width, 3) uint8: the simulator's own picture, area-averaged down."""
    simulator = env.unwrapped
    kept = {name: getattr(simulator, name) for name in config.hide}
    for name in kept:
        setattr(simulator, name, None)
    picture: Any = env.render()
    for name, value in kept.items():
        setattr(simulator, name, value)
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.shape[2:] != (3,):
        raise ConfigError(
            f"{config.env} does not render an RGB uint8 picture; only such environments can be used"
        )
    height, width = config.frame_size
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)


def _flat(env: gymnasium.Env[Any, Any], observation: Any) -> np.ndarray:
    """The observation as float32 numbers; none if it is large or cannot be flattened."""
    space = env.observation_space
    if not space.is_np_flattenable or spaces.flatdim(space) > LARGEST_OBSERVATION:
        return np.zeros(0, dtype=np.float32)
    return np.asarray(spaces.flatten(space, observation), dtype=np.float32)


def _stack_actions(space: gymnasium.Space[Any], actions: list[Any]) -> Any:
    if isinstance(space, spaces.Dict):
        return {name: _stack_actions(sub, [a[name] for a in actions]) for name, sub in space.spaces.items()}
    return np.array(actions) if isinstance(space, spaces.Text) else np.array(actions, dtype=space.dtype)


def _quiet_worker() -> None:
    """Ctrl-C is the parent's to handle, whose end is a worker's too; one thread a worker; no window, no banner."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    cv2.setNumThreads(1)
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # a parent that was killed tells no worker to end


def _collect_group(config: CollectConfig, folder: Path, indices: list[int]) -> int:
    env = _make(config)
    try:
        for index in indices:
            save_episode(episode_path(folder, index), collect_episode(config, env, index))
    finally:
        env.close()
    return len(indices)


def _is_whole(path: Path) -> bool:
    """Whether an episode's archive is complete (its directory comes last)."""
    return path.exists() and zipfile.is_zipfile(path)


def _describe(config: CollectConfig) -> dict[str, Any]:
    env = _make(config)
    try:
        observation, _ = env.reset(seed=0)
        take_picture(env, config)
        for policy in config.policies:
            _check_policy(policy.name, env, observation)
        return {
            "format_version": FORMAT_VERSION,
            "episodes": config.episodes,
            "frame_skip": config.frame_skip,
            "frame_size": list(config.frame_size),
            "fps": float(env.metadata.get("render_fps") or 30),
            "action_space": stored_space(env.action_space),
            "collect": config_to_dict(replace(config, workers=1)),
            "provenance": {
                "gymnasium": gymnasium.__version__,
                "numpy": np.__version__,
                "opencv": cv2.__version__,
                "python": sys.version.split()[0],
            },
        }
    except AttributeError as error:
        raise ConfigError(f"{config.env}: cannot hide {', '.join(config.hide)}: {error}") from error
    finally:
        env.close()


def _check_policy(name: str, env: gymnasium.Env[Any, Any], observation: Any) -> None:
    make, action, why = find_policy(name), None, ""
    try:
        action = make(env.action_space, np.random.default_rng(0))(env, observation)
        fits = env.action_space.contains(action)
    except (AttributeError, ImportError, LookupError, TypeError, ValueError) as error:
        fits, why = False, f"{type(error).__name__}: {' '.join(str(error).split())}"
    if fits:
        return
    if ":" in name:
        why = why or f"it returned {action!r:.80}, expected one of {env.action_space}"
        raise ConfigError(f"the policy {name!r} does not act in {env.spec.id if env.spec else env}: {why}")
    raise ConfigError(f"the policy {name!r} is for another environment; random and random_held suit any")


def _check_same_collection(folder: Path, info: dict[str, Any]) -> None:
    """A folder with episodes may grow by more of the same collection, and of no other."""
    if not (folder / "dataset.json").exists() or not any(folder.glob("episodes/*.npz")):
        return
    old = read_json(folder / "dataset.json")
    if not isinstance(old, dict) or old.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{folder}/dataset.json is not of format version {FORMAT_VERSION}; choose another folder"
        )
    if not isinstance(old.get("collect"), dict):
        raise DataError(f"{folder}/dataset.json lacks collect; choose another folder")
    before, now = ({**data["collect"], "episodes": 0} for data in (old, info))
    changed = [key for key in now if json.dumps(before.get(key)) != json.dumps(now[key])]
    if changed:
        raise ConfigError(
            f"{folder} holds another collection ({', '.join(changed)} differ); choose another folder"
        )
