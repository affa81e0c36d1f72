"""Where the states of sessions are: rows of shared batches, so that those who step together are not copied; and
their actions as one.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from worldmodel import WorldState


class Batch:
    """A state, and who still needs which row of it."""

    def __init__(self, state: WorldState) -> None:
        self.state = state
        self._slots: list[weakref.ref[Slot]] = []

    def slots(self) -> list[Slot]:
        """One slot for each row."""
        slots = [Slot(self, row) for row in range(self.state.rows)]
        self._slots = [weakref.ref(slot) for slot in slots]
        return slots

    def thin(self, row_bytes: int) -> None:
        """Give the rows still needed a state of their own, where most of what this one holds is for nobody."""
        live = [slot for slot in (ref() for ref in self._slots) if slot is not None]
        if not live or len(live) == self.state.rows or held_bytes(self.state) <= 2 * len(live) * row_bytes:
            return
        batch = Batch(self.state.select([slot.row for slot in live]).gathered())
        for row, slot in enumerate(live):
            slot.batch, slot.row = batch, row
        batch._slots = [weakref.ref(slot) for slot in live]


class Slot:
    """Where the state of a session is: a row of a batch."""

    __slots__ = ("__weakref__", "batch", "row")

    def __init__(self, batch: Batch, row: int) -> None:
        self.batch = batch
        self.row = row

    def state(self) -> WorldState:
        """The session alone (B = 1), sharing no memory with the rest of a larger batch."""
        whole = self.batch.state
        return whole if whole.rows == 1 else whole.select([self.row]).gathered()


def together(slots: Sequence[Slot]) -> tuple[WorldState, list[int]]:
    """The sessions in one state, and which row each of them is; the batch itself if they are all of it."""
    batch = slots[0].batch
    rows = [slot.row for slot in slots]
    if all(slot.batch is batch for slot in slots) and sorted(rows) == list(range(batch.state.rows)):
        return batch.state, rows
    lengths = {slot.batch: slot.batch.state.context.frames for slot in slots}
    order = sorted(
        range(len(slots)),
        key=lambda i: (lengths[slots[i].batch][rows[i]], id(slots[i].batch), rows[i]),
    )
    parts: list[tuple[Batch, list[int]]] = []
    for i in order:
        if not parts or parts[-1][0] is not slots[i].batch:
            parts.append((slots[i].batch, []))
        parts[-1][1].append(rows[i])
    joined = WorldState.concat([b.state.select(chosen) for b, chosen in parts]).gathered()
    return joined, [order.index(i) for i in range(len(slots))]


def page_bytes(state: WorldState) -> int:
    """Bytes of K/V that a state keeps alive: whole pages, not just what is in view."""
    segments = [s for cache in state.caches().values() for c in cache.cohorts for s in c.segments]
    storages = [s.page.kv.untyped_storage() for s in segments]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def held_bytes(state: WorldState) -> int:
    """Bytes that a state keeps alive."""
    others = [state.noisy, state.latent, state.context.u, *state.codec.values()]
    others += [] if state.seen is None else [state.seen]
    return page_bytes(state) + sum(t.untyped_storage().nbytes() for t in others)


def row_bytes(first: WorldState) -> int:
    """Bytes that the state of one session comes to hold, from its first one; the next window needs pages as this does."""
    return held_bytes(first) + (0 if first.context.ahead is None else page_bytes(first))


def first_row(batch: Any) -> Any:
    """The first action of a batch of them."""
    return {k: first_row(v) for k, v in batch.items()} if isinstance(batch, Mapping) else batch[0]


def kinds(action: Any) -> Any:
    """Names and dtypes of an action's leaves: those with the same can be stacked, and so can texts of any lengths."""
    if isinstance(action, Mapping):
        return tuple((key, kinds(action[key])) for key in sorted(action))
    if action is None:
        return None
    return "U" if action.dtype.kind == "U" else action.dtype.str


def stacked(actions: Sequence[Any]) -> Any:
    """Batches of actions of the same `kinds` as one; None where there are none."""
    if actions[0] is None:
        return None
    if isinstance(actions[0], Mapping):
        return {key: stacked([a[key] for a in actions]) for key in actions[0]}
    return np.concatenate(actions)
