"""Actions on the wire: leaves of nested dicts as named arrays and texts. docs/protocol.md is the same in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from envs.serving.protocol import DTYPES, MAX_DEPTH, ServingError


def encode_action(
    action: Any, name: str = "action", sequence: bool = False
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """An action as arrays and texts: a leaf is "action", a leaf of a dict "action/KEY" (~1 for /, ~0 for ~).

    sequence: it is a sequence of actions, and a text is a list of strings.

    Raises:
        ServingError: ``bad_frame``: a leaf that is neither a string nor an array of numbers.
    """
    if isinstance(action, Mapping):
        arrays: dict[str, np.ndarray] = {}
        texts: dict[str, Any] = {}
        for key, value in action.items():
            inner = encode_action(value, f"{name}/{str(key).replace('~', '~0').replace('/', '~1')}", sequence)
            arrays |= inner[0]
            texts |= inner[1]
        return arrays, texts
    if isinstance(action, str) and not sequence:
        return {}, {name: action}
    array = np.asarray(action)
    if sequence and array.dtype.kind == "U" and array.ndim == 1:
        return {}, {name: array.tolist()}
    if array.dtype.kind not in "iufb":
        raise ServingError("bad_frame", f"{name} of type {type(action).__name__} is not an array of numbers")
    if array.dtype.newbyteorder("<").str not in DTYPES:
        array = array.astype(np.int64 if array.dtype.kind in "iu" else np.float64)
    return {name: array}, {}


def decode_action(arrays: Mapping[str, np.ndarray], texts: Mapping[str, Any]) -> Any:
    """The action, or sequence of them, that `encode_action` took apart, or None where there is none.

    Raises:
        ServingError: ``bad_frame``: names that do not make one action.
    """
    action: Any = None
    leaves = {k: v for k, v in arrays.items() if k.split("/")[0] == "action"}
    if set(leaves) & set(texts) or any(k.split("/")[0] != "action" for k in texts):
        raise _bad("texts are leaves of the action that are not arrays")
    for name, value in {**leaves, **texts}.items():
        path = [part.replace("~1", "/").replace("~0", "~") for part in name.split("/")[1:]]
        if not path:
            if action is not None:
                raise _bad("an action is either a leaf or a dict")
            action = value
            continue
        if len(path) > MAX_DEPTH:
            raise _bad(f"an action nested deeper than {MAX_DEPTH}")
        action = {} if action is None else action
        place = action
        for part in path[:-1]:
            place = place.setdefault(part, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict) or path[-1] in place:
            raise _bad("an action is either a leaf or a dict")
        place[path[-1]] = value
    return action


def _bad(message: str) -> ServingError:
    return ServingError("bad_frame", message)
