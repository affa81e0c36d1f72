"""The K/V cache: explicit, append-only, forkable without a copy.

Keys are stored *rotated* (RoPE applied, then cast). A `KVCache` is a frozen record: a tuple of `Cohort`s, each some
rows of the batch with one common past. A cohort's past is a chain of `Segment`s, views into `Page`s; a segment of fold
f serves f consecutive rows with one stored row, so forking shares the past and only what comes after is new.

Appending is the slice-of-an-array trick: whoever holds the end of a page may write behind it in place, anybody else
(an older snapshot of the same page) first copies. So earlier states stay valid for ever, and the layout of a state
depends only on its own history: replay is bit-exact.

Axis letters: B rows, H heads, S tokens, K head width; layers are the leading axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from worldmodel.records import replace


class Page:
    """Storage (layers, 2, rows, H, capacity, K) for keys and values; ``claimed`` tokens belong to some cohort."""

    __slots__ = ("claimed", "kv")

    def __init__(self, kv: Tensor, claimed: int) -> None:
        self.kv = kv
        self.claimed = claimed


@dataclass(frozen=True)
class Segment:
    """Tokens ``start:stop`` of a page; each stored row serves ``fold`` consecutive rows of its cohort."""

    page: Page
    start: int
    stop: int
    fold: int = 1

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.stop - self.start

    @property
    def kv(self) -> Tensor:
        """View (layers, 2, rows / fold, H, tokens, K)."""
        return self.page.kv[:, :, :, :, self.start : self.stop]


def _grown(kv: Tensor, capacity: int) -> Page:
    """A new page that begins with a copy of ``kv`` and has room for ``capacity`` tokens."""
    shape = list(kv.shape)
    tokens, shape[-2] = shape[-2], max(capacity, shape[-2])
    storage = kv.new_empty(shape)
    storage[..., :tokens, :] = kv
    return Page(storage, tokens)


@dataclass(frozen=True)
class Cohort:
    """Rows of a batch that share one length of context.

    ``frames`` is the number of latent frames in the context, ``first`` the position (frame index) of the oldest one:
    0, or more after the rolling window has evicted frames. ``prefix`` condition tokens stand before the frames.
    """

    rows: int
    frames: int
    first: int
    segments: tuple[Segment, ...]
    prefix: int = 0

    @property
    def next_position(self) -> int:
        """Frame index of the frame that comes next."""
        return self.first + self.frames

    def fork(self, n: int) -> Cohort:
        """Each row becomes ``n`` consecutive rows; nothing is copied."""
        if n == 1:
            return self
        return replace(
            self, rows=self.rows * n, segments=tuple(replace(s, fold=s.fold * n) for s in self.segments)
        )

    def select(self, rows: Sequence[int]) -> Cohort:
        """The given rows, in that order. Shared segments stay shared where one stored row serves them all."""
        if list(rows) == list(range(self.rows)):
            return self
        segments = []
        for segment in self.segments:
            stored = [row // segment.fold for row in rows]
            fold = len(stored) if len(set(stored)) == 1 else 1
            wanted = stored[:1] if fold > 1 else stored
            kv = segment.kv
            if wanted == list(range(wanted[0], wanted[0] + len(wanted))):
                # consecutive stored rows: a view of the same storage, never written to again
                page = Page(
                    segment.page.kv[:, :, wanted[0] : wanted[0] + len(wanted)], segment.page.kv.shape[-2]
                )
                segments.append(Segment(page, segment.start, segment.stop, fold))
            else:
                index = torch.tensor(wanted, device=kv.device)
                segments.append(Segment(_grown(kv.index_select(2, index), 0), 0, segment.tokens, fold))
        return replace(self, rows=len(rows), segments=tuple(segments))

    def reserve(self, shape: KVShape, tokens: int, room: int) -> Cohort:
        """A cohort whose last segment is unshared and has ``tokens`` free slots behind it, claimed for the caller.

        ``room`` is the capacity (tokens) of a new page where one is needed.
        """
        last = self.segments[-1] if self.segments else None
        if last is not None and last.fold == 1:
            page = last.page
            if page.claimed == last.stop and last.stop + tokens <= page.kv.shape[-2]:
                page.claimed = last.stop + tokens
                return self
            page = _grown(last.kv, max(room, last.tokens + tokens))
            kept, segment = self.segments[:-1], Segment(page, 0, last.tokens)
        else:
            storage = torch.empty(
                (shape.layers, 2, self.rows, shape.heads, max(room, tokens), shape.head_dim),
                dtype=shape.dtype,
                device=shape.device,
            )
            page, kept = Page(storage, 0), self.segments
            segment = Segment(page, 0, 0)
        page.claimed = segment.stop + tokens
        return replace(self, segments=(*kept, segment))

    def release(self, tokens: int) -> None:
        """Give back slots that `reserve` claimed and nobody committed."""
        last = self.segments[-1]
        if last.page.claimed == last.stop + tokens:
            last.page.claimed = last.stop

    def extended(self, tokens: int, frames: int) -> Cohort:
        """The reserved slots become part of the past."""
        last = replace(self.segments[-1], stop=self.segments[-1].stop + tokens)
        return replace(self, frames=self.frames + frames, segments=(*self.segments[:-1], last))

    def evict(self, frames: int, tokens: int, prefix_kv: Tensor | None = None) -> Cohort:
        """Drop the oldest ``frames`` (``tokens`` tokens); the others keep their positions and their K/V.

        Where condition tokens stand in front, ``prefix_kv`` (layers, 2, rows, H, prefix, K) replaces them: their
        positions are anchored to the window, which has moved.
        """
        segments, left, skip = [], tokens, self.prefix
        for segment in self.segments:
            drop = min(left, segment.tokens - skip)
            left -= drop
            start = segment.start + skip + drop
            skip = 0
            if start < segment.stop or (segment is self.segments[-1] and segment.fold == 1):
                segments.append(replace(segment, start=start))
        if prefix_kv is not None:
            fold = segments[0].fold if segments else 1
            joined = torch.cat((prefix_kv[:, :, ::fold], *(s.kv for s in segments[:1])), dim=-2)
            segments[:1] = [Segment(Page(joined, joined.shape[-2]), 0, joined.shape[-2], fold)]
        return replace(self, frames=self.frames - frames, first=self.first + frames, segments=tuple(segments))


def _joined(cohorts: Sequence[Cohort], room: int) -> Cohort:
    """Cohorts of one length as one, on a page of its own."""
    rows, first = sum(c.rows for c in cohorts), cohorts[0]
    tokens = sum(s.tokens for s in first.segments)
    if not tokens:
        return replace(first, rows=rows, segments=())
    shape = list(first.segments[0].page.kv.shape)
    shape[2], shape[-2] = rows, max(first.prefix + room, tokens)
    storage, row = first.segments[0].page.kv.new_empty(shape), 0
    for cohort in cohorts:
        token = 0
        for s in cohort.segments:
            place = storage[:, :, row : row + cohort.rows, :, token : token + s.tokens]
            place[:] = s.kv.repeat_interleave(s.fold, dim=2)
            token += s.tokens
        row += cohort.rows
    return replace(first, rows=rows, segments=(Segment(Page(storage, tokens), 0, tokens),))


@dataclass(frozen=True)
class KVShape:
    """What a page of one transformer looks like."""

    layers: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class KVCache:
    """The past of a batch: cohorts in row order."""

    cohorts: tuple[Cohort, ...]

    @property
    def rows(self) -> int:
        """Batch size."""
        return sum(c.rows for c in self.cohorts)

    @property
    def frames(self) -> list[int]:
        """Latent frames of context, per row."""
        return [c.frames for c in self.cohorts for _ in range(c.rows)]

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values in view; shared segments count once."""
        return sum(s.kv.numel() * s.kv.element_size() for c in self.cohorts for s in c.segments)

    def fork(self, n: int) -> KVCache:
        """Each row becomes ``n`` consecutive rows, sharing the past."""
        return KVCache(tuple(c.fork(n) for c in self.cohorts))

    def select(self, rows: Sequence[int]) -> KVCache:
        """The given rows, in that order; neighbours of one cohort stay together."""
        owner = [(i, j) for i, c in enumerate(self.cohorts) for j in range(c.rows)]
        groups: list[tuple[int, list[int]]] = []
        for row in rows:
            cohort, inner = owner[row]
            if groups and groups[-1][0] == cohort:
                groups[-1][1].append(inner)
            else:
                groups.append((cohort, [inner]))
        return KVCache(tuple(self.cohorts[i].select(inner) for i, inner in groups))

    def gathered(self, room: int) -> KVCache:
        """The same pasts in pages of their own, with space for ``room`` tokens after the condition's; copies.

        Neighbouring cohorts of one length become one, so that one pass serves all their rows.
        """
        alike = groupby(self.cohorts, key=lambda c: (c.frames, c.first, c.prefix))
        return KVCache(tuple(_joined(list(group), room) for _, group in alike))

    @staticmethod
    def concat(caches: Iterable[KVCache]) -> KVCache:
        """Batches one after the other; nothing is copied."""
        return KVCache(tuple(cohort for cache in caches for cohort in cache.cohorts))
