"""Other people's datasets, clip by clip: Minari, LeRobot and folders of videos. Nothing in them is evaluated or unpickled.

minari:NAME   a local Minari dataset whose observations (or infos) hold RGB pictures
FOLDER        of LeRobot (v2.0, v2.1, v3.0: meta/info.json, parquet, mp4), or of videos (clip.mp4 beside clip.txt
              with its caption and clip.npy, clip.csv or clip.json with its actions)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np
from gymnasium import spaces

from worldmodel.condition.spaces import pack_actions, space_from_json
from worldmodel.errors import ConfigError, DataError, InputError
from worldmodel.files import DAMAGED_ARRAYS, read_json

VIDEOS = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".gif")
ACTIONS = (".npy", ".csv", ".json")
GIVEN = "action_space.json"


class Clip(NamedTuple):
    """frames: at least T + 1 pictures (height, width, 3) uint8 RGB, to go through once. actions (T, ...) (or a dict of
    such), each leading from one frame to the next, or None. rewards (T,). ended: the environment ended the clip. caption:
    "" for none.
    """

    frames: Iterable[np.ndarray]
    actions: Any
    rewards: np.ndarray
    ended: bool
    caption: str


class Source(Protocol):
    """Clips of one dataset. name: as given. fps: frames a second. space: of one frame's action, None without actions."""

    name: str
    fps: float
    space: spaces.Space[Any] | None

    def __len__(self) -> int:
        """Number of clips."""
        ...

    def clip(self, index: int) -> Clip:
        """One clip. Raises DataError where it cannot be read."""
        ...


def open_source(name: str, camera: str | None = None) -> Source:
    """The source of that name; ``camera`` picks one of several pictures.

    Raises:
        DataError: no such dataset, nothing to see in it, or several cameras and none chosen.
    """
    if name.startswith("minari:"):
        return MinariSource(name, camera)
    folder = Path(name)
    if not folder.is_dir():
        raise DataError(f"{name}: no such folder; give a folder, or minari:NAME")
    if (folder / "meta" / "info.json").is_file():
        return LeRobotSource(name, camera)
    if any(p.suffix.lower() in VIDEOS for p in folder.iterdir()):
        return VideoSource(name)
    raise DataError(
        f"{name}: neither our episodes (dataset.json), nor LeRobot (meta/info.json), nor videos ({', '.join(VIDEOS)})"
    )


def space_of(arrays: Sequence[np.ndarray], where: str) -> spaces.Space[Any]:
    """The space of actions (T, ...) of all clips: what ``action_space.json`` in the folder ``where`` says; without one as
    seen, Discrete or MultiDiscrete for integers, else their bounding Box.

    Raises:
        DataError: shapes that differ, numbers below 0 where they count, that are not finite, or outside the given space.
    """
    if (Path(where) / GIVEN).is_file():
        return _given_space(Path(where) / GIVEN, arrays)
    if len({a.shape[1:] for a in arrays}) != 1:
        raise DataError(f"{where}: actions of clips differ in shape: {sorted({a.shape[1:] for a in arrays})}")
    together = np.concatenate(arrays)
    low, high = together.min(axis=0), together.max(axis=0)
    if together.dtype.kind in "iu":
        if low.min() < 0:
            raise DataError(
                f"{where}: integer actions must count from 0, got {low.min()}; write floats instead"
            )
        return spaces.Discrete(int(high) + 1) if together.ndim == 1 else spaces.MultiDiscrete(high + 1)
    if not np.isfinite(together).all():
        raise DataError(f"{where}: actions are not finite")
    low, high = low.astype(np.float32), high.astype(np.float32)
    flat = high == low
    return spaces.Box(np.where(flat, low - 1, low), np.where(flat, high + 1, high), dtype=np.float32)


def _given_space(file: Path, arrays: Sequence[np.ndarray]) -> spaces.Space[Any]:
    """The space that `space_to_json` wrote, once all actions are known to be in it."""
    try:
        space = space_from_json(read_json(file))
        for actions in arrays:
            pack_actions(space, actions.reshape(len(actions), *(space.shape or ())), len(actions))
    except (ConfigError, InputError, ValueError) as error:
        raise DataError(
            f"{file} does not describe these actions: {error}; correct it, or delete it to take the bounds of the data"
        ) from error
    return space


# ---- Minari -----------------------------------------------------------------------------------------------------------
class MinariSource:
    """A local Minari dataset: pictures from its observations, or from infos (``DataCollector(record_infos=True)``)."""

    def __init__(self, name: str, camera: str | None) -> None:
        self.name, self.camera = name, camera
        try:
            import minari
        except ImportError as error:
            raise DataError(f"{name} needs Minari: pip install 'worldmodel[minari]'") from error
        try:
            self.dataset = minari.load_dataset(name.removeprefix("minari:"))
        except (OSError, ValueError) as error:
            local = ", ".join(minari.list_local_datasets()) or "none"
            raise DataError(
                f"{name} is not on this machine (here: {local}); minari download fetches it"
            ) from error
        self.indices = [int(i) for i in self.dataset.episode_indices]
        self.space: spaces.Space[Any] | None = self.dataset.action_space
        self.fps = _render_fps(self.dataset.env_spec)

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self.indices)

    def clip(self, index: int) -> Clip:
        """One episode. Raises DataError where it holds no pictures."""
        episode = next(iter(self.dataset.iterate_episodes([self.indices[index]])))
        found = _pictures(episode.observations, "observations") | _pictures(episode.infos, "infos")
        frames = _choose(
            found, self.camera, self.name, "record RGB observations, or infos that hold pictures"
        )
        ended = bool(np.asarray(episode.terminations)[-1])
        return Clip(frames, episode.actions, np.asarray(episode.rewards, dtype=np.float64), ended, "")


def _pictures(value: Any, key: str) -> dict[str, np.ndarray]:
    """Everything in nested dicts that is (T, height, width, 3) uint8, by its path."""
    if isinstance(value, dict):
        found: dict[str, np.ndarray] = {}
        for name, part in value.items():
            found |= _pictures(part, f"{key}.{name}")
        return found
    good = (
        isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 4 and value.shape[-1] == 3
    )
    return {key: value} if good else {}


def _choose(found: dict[str, Any], camera: str | None, where: str, advice: str) -> Any:
    """The picture named ``camera``, or the only one."""
    if not found:
        raise DataError(f"{where} holds no pictures; {advice}")
    if camera is None and len(found) == 1:
        return next(iter(found.values()))
    if camera not in found:
        wrong = "several cameras" if camera is None else f"no camera {camera!r}"
        raise DataError(f"{where}: {wrong}; choose one with --camera: {', '.join(found)}")
    return found[camera]


def _render_fps(spec: Any) -> float:
    """Frames a second that an environment says it renders; 30 where it says nothing."""
    from gymnasium.envs.registration import load_env_creator

    try:
        creator = (
            load_env_creator(spec.entry_point) if isinstance(spec.entry_point, str) else spec.entry_point
        )
    except (AttributeError, ImportError):
        return 30.0
    return float(getattr(creator, "metadata", {}).get("render_fps") or 30)


# ---- LeRobot ----------------------------------------------------------------------------------------------------------
class LeRobotSource:
    """A LeRobot dataset on disk, read with pyarrow and PyAV: v2 has one file an episode, v3 many episodes a file."""

    def __init__(self, name: str, camera: str | None) -> None:
        self.name, self.root = name, Path(name)
        self.info = read_json(self.root / "meta" / "info.json")
        try:
            self.version = str(self.info["codebase_version"])
            self.fps = float(self.info["fps"])
            features = self.info["features"]
            seen = {k: str(f["dtype"]) for k, f in features.items() if f["dtype"] in ("video", "image")}
            self.rows = self._episodes()
            self.camera = _choose({k: k for k in seen}, camera, name, "record at least one camera")
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{name}/meta: not LeRobot v2 or v3 ({error!r:.80})") from error
        self.video = seen[self.camera] == "video"
        self.columns = {"action", "next.reward", "next.done"} & set(features)
        self.space: spaces.Space[Any] | None = None
        if "action" in features:
            self.space = space_of([self._column(row, "action")[:-1] for row in self.rows], name)

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self.rows)

    def _episodes(self) -> list[dict[str, Any]]:
        if self.version.startswith("v2"):
            lines = _read_text(self.root / "meta" / "episodes.jsonl").splitlines()
            rows = [json.loads(line) for line in lines if line.strip()]
            for row in rows:
                row["episode_chunk"] = row["episode_index"] // int(self.info["chunks_size"])
        elif self.version.startswith("v3"):
            files = sorted((self.root / "meta" / "episodes").glob("*/*.parquet"))
            rows = [row for file in files for row in _table(file).to_pylist()]
        else:
            raise DataError(f"{self.name}: LeRobot {self.version}, expected v2.0, v2.1 or v3.0; convert it")
        if not rows:
            raise DataError(f"{self.name}: no episodes in meta/")
        return sorted(rows, key=lambda row: int(row["episode_index"]))

    def _path(self, row: dict[str, Any], kind: str, prefix: str) -> Path:
        """Where an episode's data or video lies; v3 counts chunks and files, v2 episodes."""
        fields: dict[str, Any] = {k: row.get(f"{prefix}/{k}", 0) for k in ("chunk_index", "file_index")}
        fields |= {k: row[k] for k in ("episode_index", "episode_chunk") if k in row}
        relative = Path(str(self.info[kind]).format(video_key=self.camera, **fields))
        if relative.is_absolute() or ".." in relative.parts:
            raise DataError(f"{self.name}/meta/info.json: {kind} leads out of the dataset: {relative}")
        return self.root / relative

    def _column(self, row: dict[str, Any], name: str) -> np.ndarray:
        """One column of an episode, (length, ...)."""
        table = _table(self._path(row, "data_path", "data"), [name], int(row["episode_index"]))
        values = np.array(table[name].to_pylist())
        if len(values) != int(row["length"]):
            raise DataError(
                f"{self.name}: episode {row['episode_index']} has {len(values)} rows, expected {row['length']}"
            )
        single = values.ndim == 2 and values.shape[1] == 1 and values.dtype.kind in "iu"
        return values[:, 0] if single else values

    def clip(self, index: int) -> Clip:
        """One episode. Raises DataError where a file is missing or damaged."""
        row = self.rows[index]
        steps = int(row["length"]) - 1

        def column(name: str) -> np.ndarray | None:
            return self._column(row, name)[:steps] if name in self.columns else None

        rewards, done = column("next.reward"), column("next.done")
        tasks = row.get("tasks")
        return Clip(
            self._frames(row, steps + 1),
            column("action"),
            np.zeros(steps) if rewards is None else rewards.astype(np.float64).reshape(steps),
            bool(done is not None and rewards is not None and done.size and done[-1]),
            str(tasks[0]) if isinstance(tasks, list) and tasks else "",
        )

    def _frames(self, row: dict[str, Any], count: int) -> Iterator[np.ndarray]:
        if self.video:
            key = f"videos/{self.camera}"
            path = self._path(row, "video_path", key)
            start = float(row.get(f"{key}/from_timestamp", 0.0))
            found = 0
            for frame in islice(read_video(path, start), count):
                yield frame
                found += 1
            if found < count:
                raise DataError(f"{path}: {found} frames from {start:g} s on, expected {count}")
            return
        table = _table(self._path(row, "data_path", "data"), [self.camera], int(row["episode_index"]))
        for cell in table[self.camera].to_pylist():
            data = cell["bytes"] or (self.root / cell["path"]).read_bytes()
            picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
            if picture is None:
                raise DataError(f"{self.name}: a picture of episode {row['episode_index']} cannot be decoded")
            yield cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def _table(file: Path, columns: list[str] | None = None, episode: int | None = None) -> Any:
    """A parquet table, or one episode's rows of it.

    Raises:
        DataError: missing, corrupt, or without these columns.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{file} needs pyarrow: pip install 'worldmodel[finetune]'") from error
    filters = None if episode is None else [("episode_index", "=", episode)]
    try:
        return pyarrow.parquet.read_table(file, columns=columns, filters=filters, partitioning=None)
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{file} cannot be read ({' '.join(str(error).split()):.100}); fetch it again"
        ) from error


# ---- folders of videos ------------------------------------------------------------------------------------------------
class VideoSource:
    """Videos with captions (``clip.txt``) or actions (``clip.npy``, ``clip.csv``, ``clip.json``) beside them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.files = sorted(p for p in Path(name).iterdir() if p.suffix.lower() in VIDEOS)
        found = {f: [f.with_suffix(s) for s in ACTIONS if f.with_suffix(s).is_file()] for f in self.files}
        bare = [f.name for f, actions in found.items() if not actions]
        if bare and len(bare) < len(self.files):
            raise DataError(
                f"{name}: {', '.join(bare[:3])} without actions, others with; give them all or none"
            )
        self.actions = [] if bare else [read_actions(found[f][0]) for f in self.files]
        self.space = space_of(self.actions, name) if self.actions else None
        rates = {f.name: video_fps(f) for f in self.files}
        self.fps = next(iter(rates.values()))
        odd = [f"{f} at {r:g}" for f, r in rates.items() if abs(r - self.fps) > 0.01]
        if odd:
            raise DataError(
                f"{name}: videos must share one frame rate of {self.fps:g}, but {', '.join(odd[:3])}"
            )

    def __len__(self) -> int:
        """Number of videos."""
        return len(self.files)

    def clip(self, index: int) -> Clip:
        """One video. Raises DataError where it is damaged, or its actions are not one a frame."""
        file, text = self.files[index], self.files[index].with_suffix(".txt")
        steps = sum(1 for _ in read_video(file)) - 1
        actions = self.actions[index] if self.actions else None
        if actions is not None and len(actions) not in (steps, steps + 1):
            raise DataError(
                f"{file}: {len(actions)} actions for {steps + 1} frames, expected {steps} or one more"
            )
        caption = _read_text(text).strip() if text.is_file() else ""
        return Clip(read_video(file), actions, np.zeros(max(steps, 0)), False, caption)


def read_actions(file: Path) -> np.ndarray:
    """Actions (T,) integers or (T, ...) from an array (.npy), rows of numbers (.csv, a header allowed) or lists (.json).

    Raises:
        DataError: none of these, or rows that are not alike.
    """
    try:
        if file.suffix == ".npy":
            array = np.load(file, allow_pickle=False)
        elif file.suffix == ".json":
            data = json.loads(_read_text(file))
            array = np.array(data["actions"] if isinstance(data, dict) else data)
        else:
            rows = [line.split(",") for line in _read_text(file).splitlines() if line.strip()]
            rows = rows[1:] if any(c.strip()[:1].isalpha() for c in rows[0]) else rows
            whole = all(cell.strip().lstrip("-").isdigit() for row in rows for cell in row)
            array = np.array(rows).astype(np.int64 if whole else np.float64)
    except (*DAMAGED_ARRAYS, IndexError, TypeError) as error:
        raise DataError(
            f"{file}: not actions ({' '.join(str(error).split()):.80}); write one row a frame"
        ) from error
    if array.dtype.kind not in "iuf" or not array.size or not array.ndim:
        raise DataError(
            f"{file}: actions are {array.dtype} {array.shape}, expected one row of numbers a frame"
        )
    if array.dtype.kind == "f":
        return array.reshape(len(array), -1).astype(np.float32)
    return array.reshape(len(array)) if array.size == len(array) else array


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text ({' '.join(str(error).split()):.80})") from error


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise DataError("videos are read by PyAV: pip install 'worldmodel[finetune]'") from error
    return av


def video_fps(file: Path) -> float:
    """Frames a second of a video. Raises DataError where it cannot be read."""
    av = _av()
    try:
        with av.open(str(file)) as container:
            return float(container.streams.video[0].average_rate)
    except (av.FFmpegError, IndexError, OSError, TypeError) as error:
        raise DataError(f"{file} is no readable video ({error}); encode it again") from error


def read_video(file: Path, start: float = 0.0) -> Iterator[np.ndarray]:
    """Frames (height, width, 3) uint8 RGB in order, from ``start`` seconds on; any codec that FFmpeg knows, AV1
    (LeRobot's) included.

    Raises:
        DataError: missing or damaged.
    """
    av = _av()
    try:
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            first = start - 0.5 / float(stream.average_rate)
            if start:
                container.seek(int(start / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                if frame.time is None or frame.time >= first:
                    yield frame.to_ndarray(format="rgb24")
    except (av.FFmpegError, IndexError, OSError) as error:
        raise DataError(f"{file} is no readable video ({error}); encode it again") from error
