"""Episodes on disk and in memory; the format is described in docs/episodes.md. No pickle anywhere.

Axis letters: B batch, T chunks, F pixel frames of a chunk, K chunks of an episode; height, width pixels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from gymnasium import spaces
from tqdm import tqdm

from worldmodel.condition.spaces import space_from_json, space_to_json
from worldmodel.errors import CheckpointError, ConfigError, DataError, InputError
from worldmodel.files import DAMAGED_ARRAYS, read_json, write_atomic

FORMAT_VERSION = 1
KEYS = ("complete", "episodes", "frame_skip", "frame_size", "fps", "action_space")
"""What ``dataset.json`` must tell."""
DTYPES: dict[str, type[np.generic]] = {
    "rewards": np.float32,
    "terminated": np.bool_,
    "truncated": np.bool_,
    "observations": np.float32,
}
"""Of an episode's arrays, as which they are read whatever they were written as."""
SplitName = Literal["train", "validation", "test"]
Actions = Any
"""An array with chunks first, or a dict of such arrays for a Dict space."""


class Episode(NamedTuple):
    """One episode of K chunks.

    frames (1 + F K, height, width, 3) uint8: frame 0 is what reset showed. actions: (K, ...) in the action
    space's dtype. rewards (K,) float32, summed over the chunk. terminated, truncated (K,) bool. observations
    (1 + F K, ...) float32: the simulator's own, for evaluation only. meta: seed, policy.
    """

    frames: np.ndarray
    actions: Actions
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    observations: np.ndarray
    meta: dict[str, Any]


class Windows(NamedTuple):
    """B windows of T chunks; chunk t was caused by action t. Fields as in `Episode`.

    frames (B, T, F, height, width, 3), actions (B, T, ...), rewards, terminated, truncated (B, T),
    observations (B, T, F, ...), episode and start (B,) int: where each window comes from.
    """

    frames: np.ndarray
    actions: Actions
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    observations: np.ndarray
    episode: np.ndarray
    start: np.ndarray


def stored_space(space: spaces.Space[Any]) -> dict[str, Any]:
    """As `space_to_json`, of a space whose actions an episode can hold.

    Raises:
        ConfigError: another kind of space, or a Dict within a Dict.
    """
    if isinstance(space, spaces.Dict) and any(isinstance(s, spaces.Dict) for s in space.spaces.values()):
        raise ConfigError(
            "episodes hold no actions of a Dict within a Dict; wrap the environment to make it one Dict"
        )
    return space_to_json(space)


def episode_path(folder: Path, index: int) -> Path:
    """Where episode ``index`` of a dataset lies."""
    return Path(folder) / "episodes" / f"{index:06d}.npz"


def save_episode(path: Path, episode: Episode) -> None:
    """Write one episode atomically.

    Raises:
        CheckpointError: the file cannot be written.
    """
    if isinstance(episode.actions, Mapping):
        actions = {f"actions/{name}": array for name, array in episode.actions.items()}
    else:
        actions = {"actions": episode.actions}
    arrays = episode._asdict() | {"meta": np.array(json.dumps(episode.meta))} | actions
    if isinstance(episode.actions, Mapping):
        del arrays["actions"]

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)

    write_atomic(path, write)


def load_episode(path: Path, frame_skip: int) -> Episode:
    """Read one episode of chunks of ``frame_skip`` frames and check that its arrays agree.

    Raises:
        DataError: missing, truncated, corrupt, arrays of lengths that do not agree, or rewards that are not finite.
    """
    arrays = _read(path)
    try:
        meta = json.loads(str(arrays["meta"]))
        actions: Actions = arrays.get("actions")
        if actions is None:
            prefix = "actions/"
            actions = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
        rest = {name: arrays[name].astype(dtype, copy=False) for name, dtype in DTYPES.items()}
        episode = Episode(arrays["frames"], actions, **rest, meta=meta)
    except (KeyError, ValueError) as error:
        raise _damaged(path, error) from error
    _check_rewards(path, episode.rewards)
    count = len(episode.rewards)
    lengths = [len(part) for part in (actions.values() if isinstance(actions, dict) else [actions])]
    lengths += [len(episode.terminated), len(episode.truncated)]
    frames = 1 + frame_skip * count
    if not count or {*lengths} != {count} or {len(episode.frames), len(episode.observations)} != {frames}:
        raise DataError(f"{path} holds arrays of lengths that do not agree; delete it and collect again")
    if episode.frames.dtype != np.uint8 or episode.frames.ndim != 4 or episode.frames.shape[-1] != 3:
        raise DataError(
            f"{path} holds frames of {episode.frames.dtype} {episode.frames.shape}, expected RGB uint8"
        )
    return episode


def _read(path: Path, *names: str) -> dict[str, np.ndarray]:
    """Arrays of an episode's file, all by default."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names or file.files}
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; collect the dataset again to fill the gap") from error
    except DAMAGED_ARRAYS as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:120]
    return DataError(f"{path} is truncated or corrupt ({reason}); delete it and collect again")


def _check_rewards(path: Path, rewards: np.ndarray) -> None:
    if not np.isfinite(rewards).all():
        chunk = int(np.argmin(np.isfinite(rewards)))
        raise DataError(
            f"{path}: chunk {chunk} has the reward {rewards[chunk]}, expected finite numbers; mend its source and "
            "collect again"
        )


def split_indices(episodes: int, name: SplitName) -> range:
    """The episodes of a split: the last 10 % are "test", the 5 % before them "validation", the rest "train".

    Raises:
        InputError: no split of that name.
    """
    test = max(1, round(0.1 * episodes)) if episodes > 1 else 0
    validation = max(1, round(0.05 * episodes)) if episodes > 2 else 0
    ends = {"train": episodes - test - validation, "validation": episodes - test, "test": episodes}
    starts = {"train": 0, "validation": ends["train"], "test": ends["validation"]}
    if name not in ends:
        raise InputError(f"no split {name!r}; choose from train, validation, test")
    return range(starts[name], ends[name])


def counted(episodes: int) -> str:
    """A number of episodes, for a reader."""
    return f"{episodes} episode{'' if episodes == 1 else 's'}"


@dataclass(frozen=True)
class EpisodeDataset:
    """A folder of episodes, with its description (`dataset.json`) read and its files present."""

    folder: Path
    info: dict[str, Any]

    @classmethod
    def open(cls, folder: Path | str) -> EpisodeDataset:
        """Open a folder that `collect` filled.

        Raises:
            DataError: not a dataset, of another version, or with episodes missing.
        """
        folder = Path(folder)
        try:
            info = read_json(folder / "dataset.json")
        except CheckpointError as error:
            raise DataError(f"{folder} is not a dataset ({error}); worldmodel collect makes one") from error
        if not isinstance(info, dict) or info.get("format_version") != FORMAT_VERSION:
            raise DataError(f"{folder}/dataset.json is not of format version {FORMAT_VERSION}; collect again")
        if lacking := [key for key in KEYS if key not in info]:
            raise DataError(f"{folder}/dataset.json lacks {', '.join(lacking)}; collect again")
        if not info["complete"]:
            raise DataError(f"{folder} is unfinished; run the same collect command again to complete it")
        absent = [i for i in range(info["episodes"]) if not episode_path(folder, i).exists()]
        if absent:
            raise DataError(f"{folder} lacks {len(absent)} of {info['episodes']} episodes; collect again")
        return cls(folder, info)

    @property
    def episodes(self) -> int:
        """Number of episodes."""
        return self.info["episodes"]

    @property
    def collected(self) -> dict[str, Any]:
        """With which settings they were collected; empty where that is not told."""
        return dict(self.info.get("collect") or {})

    @property
    def frame_skip(self) -> int:
        """F, pixel frames of a chunk."""
        return self.info["frame_skip"]

    @property
    def frame_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        height, width = self.info["frame_size"]
        return height, width

    @property
    def action_space(self) -> spaces.Space[Any]:
        """The environment's action space."""
        return space_from_json(self.info["action_space"])

    def episode(self, index: int) -> Episode:
        """Episode ``index``, read from disk. Raises DataError as `load_episode`, and for frames of another size."""
        path = episode_path(self.folder, index)
        episode = load_episode(path, self.frame_skip)
        if episode.frames.shape[1:3] != self.frame_size:
            raise DataError(
                f"{path} holds frames of {episode.frames.shape[1:3]} pixels, dataset.json says {self.frame_size}; "
                "correct one of them"
            )
        return episode

    def lengths(self) -> np.ndarray:
        """(episodes,) chunks of each, from their rewards alone, which are checked. Raises DataError as `load_episode`."""
        counts = []
        for index in tqdm(range(self.episodes), desc="read rewards", unit="episode", delay=2, leave=False):
            path = episode_path(self.folder, index)
            rewards = _read(path, "rewards")["rewards"]
            _check_rewards(path, rewards)
            counts.append(len(rewards))
        return np.array(counts)

    def indices(self, name: SplitName) -> range:
        """The episodes of a split. Raises DataError where it has none."""
        found = split_indices(self.episodes, name)
        if not found:
            enough = next(n for n in range(1, 4) if split_indices(n, name))
            raise DataError(
                f"{self.folder} has {counted(self.episodes)}, too few for a {name} split; "
                f"collect --episodes {enough} or more"
            )
        return found

    def split(self, name: SplitName, in_memory: bool = True) -> EpisodeSplit:
        """A split to sample from; ``in_memory`` reads all its episodes now (uint8).

        Raises:
            DataError: the split is empty, or an episode cannot be read.
        """
        indices = self.indices(name)
        if in_memory:
            bar = tqdm(indices, desc=f"load {name}", unit="episode", delay=2, leave=False)
            return EpisodeSplit(
                indices, self.frame_skip, {index: self.episode(index) for index in bar}.__getitem__
            )
        return EpisodeSplit(indices, self.frame_skip, lru_cache(maxsize=64)(self.episode))


class EpisodeSplit:
    """Episodes to sample from. Every sample is a function of the rng that is passed in."""

    def __init__(self, indices: range, frame_skip: int, load: Any) -> None:
        self.indices = indices
        self.frame_skip = frame_skip
        self._load = load
        self.lengths = np.array([len(load(index).rewards) for index in indices])

    def episode(self, index: int) -> Episode:
        """Episode by its number in the dataset."""
        return self._load(index)

    @property
    def chunks(self) -> int:
        """Number of chunks in the split."""
        return int(self.lengths.sum())

    def sample_chunks(self, n: int, rng: np.random.Generator, aligned: bool = True) -> np.ndarray:
        """``n`` chunks (n, F, height, width, 3) uint8, uniform over the split.

        Aligned chunks start where an action starts; the others start at any frame, frame 0 included.
        """
        flat = rng.integers(self.chunks, size=n)
        shift = np.ones(n, dtype=np.int64) if aligned else rng.integers(self.frame_skip, size=n)
        return np.stack([self._chunk(int(i), int(s)) for i, s in zip(flat, shift, strict=True)])

    def _chunk(self, flat: int, shift: int) -> np.ndarray:
        ends = np.cumsum(self.lengths)
        row = int(np.searchsorted(ends, flat, side="right"))
        frames = self.episode(self.indices[row]).frames
        first = self.frame_skip * (flat - int(ends[row] - self.lengths[row])) + shift
        first = min(first, len(frames) - self.frame_skip)
        return frames[first : first + self.frame_skip]

    def sample_windows(self, n: int, length: int, rng: np.random.Generator) -> Windows:
        """``n`` windows of ``length`` chunks, uniform over all places where one fits.

        Raises:
            DataError: no episode is that long.
        """
        places = np.maximum(self.lengths - length + 1, 0)
        if not places.sum():
            raise DataError(f"no episode has {length} chunks (the longest has {self.lengths.max()})")
        flat = rng.integers(places.sum(), size=n)
        ends = np.cumsum(places)
        rows = np.searchsorted(ends, flat, side="right")
        return stack_windows(
            [
                self.window(self.indices[int(row)], int(place - ends[row] + places[row]), length)
                for row, place in zip(rows, flat, strict=True)
            ]
        )

    def window(self, episode: int, start: int, length: int) -> Windows:
        """The window of ``length`` chunks that starts at chunk ``start``, with B = 1."""
        record, chunks = self.episode(episode), slice(start, start + length)
        pixels = slice(1 + self.frame_skip * start, 1 + self.frame_skip * (start + length))

        def by_chunk(array: np.ndarray) -> np.ndarray:
            return array[pixels].reshape(1, length, self.frame_skip, *array.shape[1:])

        actions = record.actions
        return Windows(
            frames=by_chunk(record.frames),
            actions={k: v[None, chunks] for k, v in actions.items()}
            if isinstance(actions, dict)
            else actions[None, chunks],
            rewards=record.rewards[None, chunks],
            terminated=record.terminated[None, chunks],
            truncated=record.truncated[None, chunks],
            observations=by_chunk(record.observations),
            episode=np.array([episode]),
            start=np.array([start]),
        )


def stack_windows(parts: list[Windows]) -> Windows:
    """One batch from several."""

    def join(values: list[Any]) -> Any:
        if isinstance(values[0], dict):
            return {key: np.concatenate([value[key] for value in values]) for key in values[0]}
        return np.concatenate(values)

    return Windows(*(join([part[i] for part in parts]) for i in range(len(Windows._fields))))
