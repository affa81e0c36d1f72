"""What a batch of environments is given, taken apart slot by slot: the local and the remote one share it."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode

from envs.options import check_max_chunks
from worldmodel.errors import InputError


def check_slots(num_envs: int, render_mode: str | None) -> int:
    """The number of slots.

    Raises:
        InputError: not an integer of at least 1, or a render mode that only one environment has.
    """
    if isinstance(num_envs, bool) or not isinstance(num_envs, int) or num_envs < 1:
        raise InputError(f"num_envs is {num_envs!r}, expected an integer of at least 1")
    if render_mode == "human":
        raise InputError('a batch has no window; use render_mode "rgb_array" or "rgb_array_list"')
    return num_envs


def check_autoreset(mode: AutoresetMode | str) -> AutoresetMode:
    """Gymnasium's mode, or the one with this value.

    Raises:
        InputError: no such mode.
    """
    try:
        return AutoresetMode(mode)
    except ValueError as error:
        known = ", ".join(mode.value for mode in AutoresetMode)
        raise InputError(f"autoreset_mode is {mode!r}, expected one of {known}") from error


def slot_horizons(value: int | None | Sequence[int | None], slots: int) -> list[int | None]:
    """``max_chunks`` of every slot, from one for all or one for each.

    Raises:
        InputError: another number of them, or one that is none.
    """
    values = list(value) if isinstance(value, Sequence | np.ndarray) else [value] * slots
    if len(values) != slots:
        raise InputError(f"max_chunks has {len(values)} entries for {slots} slots")
    return [check_max_chunks(v) for v in values]


def slot_seeds(seed: int | Sequence[int | None] | None, slots: int) -> list[int | None]:
    """The seed of every slot: ``seed + i``, or one for each.

    Raises:
        InputError: another number of them, or one that is no integer.
    """
    if seed is None:
        return [None] * slots
    try:
        if isinstance(seed, Sequence | np.ndarray):
            seeds = [None if each is None else operator.index(each) for each in seed]
        else:
            seeds = [operator.index(seed) + b for b in range(slots)]
    except TypeError as error:
        raise InputError(f"seed is {seed!r:.80}, expected an integer, or one for each slot") from error
    if len(seeds) != slots:
        raise InputError(f"{len(seeds)} seeds for {slots} slots; give one for each, or one integer")
    return seeds


def masked_slots(mask: Any, slots: int) -> list[int]:
    """The slots that a ``reset_mask`` marks; all of them for None.

    Raises:
        InputError: not a bool array (slots,) with at least one True.
    """
    if mask is None:
        return list(range(slots))
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape != (slots,):
        raise InputError(f"reset_mask must be a bool array of shape ({slots},), got {mask!r:.80}")
    if not mask.any():
        raise InputError("reset_mask has no True in it; mark at least one slot")
    return [int(b) for b in np.flatnonzero(mask)]


def slot_actions(space: spaces.Space[Any], actions: Any, slots: int) -> Any:
    """Batched actions as arrays with ``slots`` on the first axis (a dict of them for Dict).

    Raises:
        InputError: another number of actions, or no array.
    """
    if isinstance(space, spaces.Dict) and isinstance(actions, Mapping):
        return {
            key: slot_actions(space.spaces.get(key, space), value, slots) for key, value in actions.items()
        }
    try:
        array = np.asarray(actions)
    except ValueError as error:
        raise InputError(f"actions are not an array: {error}") from error
    if array.ndim < 1 or len(array) != slots:
        raise InputError(
            f"actions have shape {array.shape}, expected {slots} actions of {space} on the first axis"
        )
    return array


def pick(actions: Any, rows: int | list[int]) -> Any:
    """The actions of some slots, or of one."""
    if isinstance(actions, Mapping):
        return {key: pick(value, rows) for key, value in actions.items()}
    return actions[rows]
