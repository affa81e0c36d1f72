"""Gymnasium spaces as JSON and back, and actions checked against them. No code is ever evaluated."""

from __future__ import annotations

import string
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from gymnasium import spaces

from worldmodel.errors import ConfigError, InputError

_DTYPES = ("float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32")


def space_to_json(space: spaces.Space[Any]) -> dict[str, Any]:
    """A JSON object for Discrete, MultiDiscrete, Box, Dict and Text.

    Raises:
        ConfigError: another kind of space.
    """
    if isinstance(space, spaces.Discrete):
        return {"kind": "Discrete", "n": int(space.n), "start": int(space.start)}
    if isinstance(space, spaces.MultiDiscrete):
        return {
            "kind": "MultiDiscrete",
            "nvec": np.asarray(space.nvec).tolist(),
            **({"start": np.asarray(space.start).tolist()} if np.any(space.start) else {}),
        }
    if isinstance(space, spaces.Box):
        bounds = {name: [str(float(x)) for x in getattr(space, name).flat] for name in ("low", "high")}
        return {"kind": "Box", "shape": list(space.shape), "dtype": str(space.dtype), **bounds}
    if isinstance(space, spaces.Dict):
        return {"kind": "Dict", "spaces": {k: space_to_json(v) for k, v in space.spaces.items()}}
    if isinstance(space, spaces.Text):
        return {"kind": "Text", "min_length": int(space.min_length), "max_length": int(space.max_length)}
    raise ConfigError(
        f"action space {space} is not supported; use Discrete, MultiDiscrete, Box, Dict or Text"
    )


def space_from_json(data: Mapping[str, Any]) -> spaces.Space[Any]:
    """The space that `space_to_json` wrote.

    Raises:
        ConfigError: not such an object.
    """
    try:
        kind = data["kind"]
        if kind == "Discrete":
            return spaces.Discrete(int(data["n"]), start=int(data.get("start", 0)))
        if kind == "MultiDiscrete":
            nvec = np.asarray(data["nvec"], dtype=np.int64)
            return spaces.MultiDiscrete(nvec, start=np.asarray(data.get("start", 0 * nvec), dtype=np.int64))
        if kind == "Box":
            if data["dtype"] not in _DTYPES:
                raise ConfigError(f"Box dtype {data['dtype']!r} is not one of {', '.join(_DTYPES)}")
            shape = tuple(int(n) for n in data["shape"])
            low, high = (
                np.array([float(x) for x in data[name]], dtype=data["dtype"]).reshape(shape)
                for name in ("low", "high")
            )
            return spaces.Box(low, high, shape, getattr(np, data["dtype"]))
        if kind == "Dict":
            return spaces.Dict({k: space_from_json(v) for k, v in data["spaces"].items()})
        if kind == "Text":
            least = int(data.get("min_length", 1))
            return spaces.Text(int(data["max_length"]), min_length=least, charset=string.printable)
    except (AttributeError, KeyError, TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"not a description of a space: {data!r:.120} ({error})") from error
    raise ConfigError(f"unknown kind of space {kind!r}; expected Discrete, MultiDiscrete, Box, Dict or Text")


def packed_size(space: spaces.Space[Any]) -> int:
    """P, the number of floats of one packed action; Text conditions as a prompt and has none."""
    if isinstance(space, spaces.Dict):
        return sum(packed_size(sub) for sub in space.spaces.values())
    return 0 if isinstance(space, spaces.Text) else int(spaces.flatdim(space))


def prompt_key(space: spaces.Space[Any]) -> str | None:
    """Where an action's prompt is: "" for a Text space, its key in a Dict, None where actions have no prompt.

    Raises:
        ConfigError: a Dict with several Text spaces.
    """
    if not isinstance(space, spaces.Dict):
        return "" if isinstance(space, spaces.Text) else None
    keys = [key for key, sub in space.spaces.items() if isinstance(sub, spaces.Text)]
    if len(keys) > 1:
        raise ConfigError(f"an action has one prompt at most, this space has Text at {', '.join(keys)}")
    return keys[0] if keys else None


def prompts_of(space: spaces.Space[Any], actions: Any, rows: int) -> list[str] | None:
    """The prompts of a batch of actions, or None where the space has none, or no action is given.

    Raises:
        InputError: not ``rows`` strings, or a prompt longer than the space's.
    """
    key = prompt_key(space)
    if key is None or actions is None:
        return None
    if key:
        assert isinstance(space, spaces.Dict)
        if not isinstance(actions, Mapping) or key not in actions:
            raise InputError(f"action must be a dict with keys {sorted(space.spaces)}, got {_short(actions)}")
        return _texts(space.spaces[key], actions[key], rows)
    return _texts(space, actions, rows)


def _texts(space: spaces.Space[Any], values: Any, rows: int) -> list[str]:
    assert isinstance(space, spaces.Text)
    given = values.tolist() if isinstance(values, np.ndarray) else values
    if not isinstance(given, list | tuple) or not all(isinstance(text, str) for text in given):
        raise InputError(f"action is of type {type(values).__name__}, expected {rows} prompts (strings)")
    if len(given) != rows:
        raise InputError(f"{len(given)} prompts for {rows} sessions, expected one for each")
    if longest := max((len(text) for text in given if len(text) > space.max_length), default=0):
        raise InputError(f"a prompt has {longest} characters, expected at most {space.max_length}")
    return list(given)


def pack_actions(space: spaces.Space[Any], actions: Any, rows: int) -> np.ndarray:
    """A batch of actions to (rows, P) float32 in [-1, 1]: one-hot for discrete parts, bounds mapped to -1 and 1 for Box.

    ``actions`` has ``rows`` on its first axis (a dict of such arrays for Dict).

    Raises:
        InputError: wrong shape or type, NaN, or out of range; the message names the first bad row.
    """
    if isinstance(space, spaces.Dict):
        if not isinstance(actions, Mapping) or set(actions) != set(space.spaces):
            raise InputError(f"action must be a dict with keys {sorted(space.spaces)}, got {_short(actions)}")
        parts = [pack_actions(sub, actions[key], rows) for key, sub in space.spaces.items()]
        return np.concatenate(parts, axis=1)
    if isinstance(space, spaces.Text):
        return np.zeros((len(_texts(space, actions, rows)), 0), dtype=np.float32)
    try:
        array = np.asarray(actions)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"action is not an array: {_line(error)}") from error
    shape = (rows, *(space.shape or ()))
    if array.dtype == object or array.dtype.kind not in "fiub" or array.shape != shape:
        raise InputError(
            f"action has shape {array.shape} and dtype {array.dtype}, expected {shape} of {space.dtype}"
        )
    if isinstance(space, spaces.Box):
        return _pack_box(space, array)
    if array.dtype.kind not in "iu":
        raise InputError(f"action has dtype {array.dtype}, expected integers for {_line(space)}")
    if isinstance(space, spaces.Discrete):
        return _one_hot(array.astype(np.int64) - int(space.start), int(space.n), space)
    if isinstance(space, spaces.MultiDiscrete):
        columns = (array.astype(np.int64) - np.asarray(space.start)).reshape(rows, -1)
        sizes = np.asarray(space.nvec).reshape(-1)
        return np.concatenate(
            [_one_hot(c, int(n), space) for c, n in zip(columns.T, sizes, strict=True)], axis=1
        )
    raise InputError(f"actions of {_line(space)} cannot be packed")


@lru_cache(maxsize=64)
def _limits(low: bytes, high: bytes, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Least and greatest values that are taken, flat, and centre and half width of what they are packed from."""
    lowest, highest = (np.frombuffer(b, dtype=dtype).astype(np.float64) for b in (low, high))
    slack = 1e-6 * np.maximum(1.0, np.abs(np.where(np.isfinite(highest), highest, 1.0)))
    bounded = np.isfinite(lowest) & np.isfinite(highest) & (highest > lowest)
    low_end, high_end = np.where(bounded, lowest, -1.0), np.where(bounded, highest, 1.0)
    most = float(np.finfo(np.float32).max)
    least, greatest = np.maximum(lowest - slack, -most), np.minimum(highest + slack, most)
    return least, greatest, (high_end + low_end) / 2, (high_end - low_end) / 2


def _pack_box(space: spaces.Box, array: np.ndarray) -> np.ndarray:
    values = array.astype(np.float64).reshape(len(array), -1)
    low, high = np.asarray(space.low), np.asarray(space.high)
    least, greatest, centre, half = _limits(low.tobytes(), high.tobytes(), low.dtype.str)
    good = (values >= least) & (values <= greatest)
    if not good.all():
        row = int(np.argwhere(~good)[0][0])
        raise InputError(f"action {_line(array[row])} (row {row}) is outside {_line(space)}")
    return ((values - centre) / half).astype(np.float32)


def _one_hot(index: np.ndarray, n: int, space: spaces.Space[Any]) -> np.ndarray:
    if ((index < 0) | (index >= n)).any():
        row = int(np.argwhere((index < 0) | (index >= n))[0][0])
        raise InputError(f"action of row {row} is outside {_line(space)}")
    return np.eye(n, dtype=np.float32)[index]


def _short(value: Any) -> str:
    return _line(sorted(map(str, value))) if isinstance(value, Mapping) else type(value).__name__


def _line(value: Any) -> str:
    return f"{' '.join(str(value).split()):.120}"
