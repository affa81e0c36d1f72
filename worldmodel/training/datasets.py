"""A source's clips as our episodes on disk, converted once: chunks of F frames of the world's size (docs/datasets.md)."""

from __future__ import annotations

import json
import zipfile
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from gymnasium import spaces
from tqdm import tqdm

from worldmodel.condition.spaces import packed_size
from worldmodel.errors import ConfigError, DataError
from worldmodel.files import different, read_json, write_json
from worldmodel.training.episodes import (
    FORMAT_VERSION,
    Episode,
    EpisodeDataset,
    episode_path,
    save_episode,
    stored_space,
)
from worldmodel.training.sources import Clip, Source, open_source


def converted(
    name: str,
    folder: Path,
    frame_size: tuple[int, int],
    frame_skip: int,
    space: spaces.Space[Any] | None,
    camera: str | None = None,
) -> EpisodeDataset:
    """The dataset ``name`` as episodes for chunks of ``frame_skip`` frames of ``frame_size`` (height, width).

    Our own episodes of that size are used where they are; anything else is converted into ``folder``, once; an
    interrupted conversion continues. Pictures are cut to the aspect ratio about their centre, then resized.
    ``space``: the world's actions, None where it takes none. Where the dataset's are the same, a chunk takes the mean
    (Box) or the first of its frames' actions; where not, all of them, stacked: a Box of (F, ...), a MultiDiscrete of F.

    Raises:
        DataError: the dataset is missing or corrupt, has no actions where the world takes some, or its chunks are of
            another length.
    """
    if (Path(name) / "dataset.json").is_file():
        own = EpisodeDataset.open(name)
        if own.frame_size != frame_size or own.frame_skip != frame_skip:
            raise DataError(
                f"{name} has chunks of {own.frame_skip} frames of {own.frame_size}, the world {frame_skip} of "
                f"{frame_size}; collect with --frame-size, or choose another world"
            )
        _check_actions(name, own.action_space, space)
        return own
    source = open_source(name, camera)
    _check_actions(name, source.space, space)
    held = frame_skip == 1 or source.space is None or source.space == space
    info = {
        "format_version": FORMAT_VERSION,
        "episodes": len(source),
        "frame_skip": frame_skip,
        "frame_size": list(frame_size),
        "fps": source.fps,
        "action_space": stored_space(_chunk_space(source.space, 1 if held else frame_skip)),
        "collect": {"env": name, "camera": camera},
        "provenance": {"numpy": np.__version__, "opencv": cv2.__version__},
    }
    file = folder / "dataset.json"
    begun = file.exists() and any(folder.glob("episodes/*.npz"))
    changed = different(read_json(file), json.loads(json.dumps(info))) if begun else []
    if {key.partition(".")[0] for key in changed} - {"complete", "provenance"}:
        raise ConfigError(f"{folder} holds another conversion; delete it, or use another run folder")
    todo = [i for i in range(len(source)) if not zipfile.is_zipfile(_exists(episode_path(folder, i)))]
    write_json(file, info | {"complete": not todo})
    for index in tqdm(todo, desc="convert", unit="episode", disable=not todo):
        save_episode(
            episode_path(folder, index),
            _episode(source.clip(index), source, index, frame_size, frame_skip, held),
        )
    write_json(file, info | {"complete": True})
    return EpisodeDataset.open(folder)


def _check_actions(name: str, have: spaces.Space[Any] | None, wanted: spaces.Space[Any] | None) -> None:
    if wanted is not None and (have is None or not packed_size(have)):
        raise DataError(
            f"{name} has no actions, but the world takes some; put every clip's beside it (clip.npy, clip.csv or "
            "clip.json), or take a world without actions"
        )


def _exists(path: Path) -> Any:
    return path if path.exists() else ""


def _episode(
    clip: Clip, source: Source, index: int, frame_size: tuple[int, int], skip: int, held: bool
) -> Episode:
    frames = np.stack([_fitted(f, frame_size) for f in islice(clip.frames, len(clip.rewards) + 1)])
    steps = min(len(frames) - 1, len(clip.rewards))
    count = -(-steps // skip) if clip.ended else steps // skip
    if count < 1:
        raise DataError(f"{source.name}: clip {index} has {steps + 1} frames, expected at least {skip + 1}")
    used = np.minimum(np.arange(count * skip), steps - 1)  # an end inside a chunk: its last frame stays
    shown = np.minimum(np.arange(count * skip + 1), steps)
    rewards = np.where(np.arange(count * skip) < steps, clip.rewards[used], 0.0).reshape(count, skip).sum(1)
    last = np.arange(count) == count - 1
    if source.space is None:
        actions: Any = np.full(count, clip.caption)
    else:
        actions = _chunk_actions(source.space, clip.actions, used, 1 if held else skip, skip)
    return Episode(
        frames[shown],
        actions,
        rewards.astype(np.float32),
        last & clip.ended,
        last & (not clip.ended),
        np.zeros((count * skip + 1, 0), dtype=np.float32),
        {"index": index, "caption": clip.caption},
    )


def _fitted(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The largest centred part of the picture of that aspect ratio, resized to (height, width)."""
    have, want = picture.shape[:2], size
    scale = min(have[0] / want[0], have[1] / want[1])
    height, width = (min(round(w * scale), h) for w, h in zip(want, have, strict=True))
    top, left = (have[0] - height) // 2, (have[1] - width) // 2
    part = picture[top : top + height, left : left + width]
    way = cv2.INTER_AREA if scale >= 1 else cv2.INTER_CUBIC
    return cv2.resize(np.ascontiguousarray(part), (want[1], want[0]), interpolation=way)


def _chunk_space(space: spaces.Space[Any] | None, n: int) -> spaces.Space[Any]:
    """The space of ``n`` actions of ``space`` together; Text for none."""
    if space is None:
        return spaces.Text(1024)
    if n == 1:
        return space
    if isinstance(space, spaces.Dict):
        return spaces.Dict({k: _chunk_space(v, n) for k, v in space.spaces.items()})
    if isinstance(space, spaces.Box):
        low, high = (np.repeat(b[None], n, axis=0) for b in (space.low, space.high))
        return spaces.Box(low, high, dtype=space.dtype)
    if isinstance(space, spaces.Discrete):
        return spaces.MultiDiscrete(np.full(n, space.n))
    if isinstance(space, spaces.MultiDiscrete):
        return spaces.MultiDiscrete(np.repeat(space.nvec[None], n, axis=0))
    raise DataError(f"actions of {space} are not supported; use Discrete, MultiDiscrete, Box or Dict")


def _chunk_actions(space: spaces.Space[Any], actions: Any, used: np.ndarray, n: int, skip: int) -> Any:
    """Actions (T, ...) of frames to those of chunks (K, ...), in `_chunk_space`."""
    if isinstance(space, spaces.Dict):
        return {k: _chunk_actions(v, actions[k], used, n, skip) for k, v in space.spaces.items()}
    rows = np.asarray(actions)[used].reshape(-1, skip, *(space.shape or ()))
    if n == 1:
        chosen = rows.mean(axis=1) if isinstance(space, spaces.Box) else rows[:, 0]
        return chosen.astype(space.dtype)
    if isinstance(space, spaces.Discrete):
        return (rows - space.start).astype(np.int64)
    return rows.astype(space.dtype)
