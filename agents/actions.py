"""Actions as arrays, or, in a Dict space, as dicts of them: what planners do to both alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Actions = Any
"""(...) of a Box, Discrete or MultiDiscrete space with axes of its own in front, or a dict of such for Dict."""


def map_actions(function: Callable[..., Any], *actions: Actions) -> Actions:
    """``function`` of the arrays, key by key where they are dicts."""
    first = actions[0]
    if isinstance(first, Mapping):
        return {key: map_actions(function, *(a[key] for a in actions)) for key in first}
    return function(*(np.asarray(a) for a in actions))


def leading(actions: Actions) -> tuple[int, ...]:
    """The shape of the array, or of a dict's first."""
    while isinstance(actions, Mapping):
        actions = next(iter(actions.values()))
    return np.shape(actions)


def take(actions: Actions, index: Any, axis: int = 0) -> Actions:
    """The actions at an index, or at several, of one axis."""
    return map_actions(lambda a: np.take(a, index, axis=axis), actions)


def batch_of_one(action: Actions) -> Actions:
    """One action with an axis of one in front."""
    return map_actions(lambda a: a[None], action)
