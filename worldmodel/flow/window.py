"""The window of remembered frames: what happens to a `Context` when it is full.

A full row restarts from its last frames, for which the next window is made ready ahead of time, or rolls. Functions of
the deep block, whose weights write K/V, and a context; they return another context.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from worldmodel.flow.cache import Cohort, KVCache
from worldmodel.flow.context import Context
from worldmodel.flow.deep import DeepBlock
from worldmodel.records import replace

AHEAD = 2, 3
"""Least numbers of the next window's frames that are encoded at a time: one by one they would cost more passes, and where
they are few, two groups share them out.
"""


def _inverse(order: Sequence[int]) -> list[int]:
    """Where each row is to be found in a batch of rows in this order."""
    return sorted(range(len(order)), key=order.__getitem__)


def make_room(deep: DeepBlock, context: Context, keep: int | None, look_ahead: bool = True) -> Context:
    """A context in which every row has room for one more frame.

    ``keep`` frames (at most ``window - 1``): a full row restarts from its last ``keep`` u with positions from 0
    (STARFlow-V's rule for long videos). Their K/V are made ready a few frames at a time as they become known, or at
    once if ``look_ahead`` is False or there is a condition, which may change any time. ``None``: rolling, the oldest
    frame is evicted and the others keep their K/V.
    """
    full = [f >= context.window for f in context.frames]
    if keep is None:
        return _roll(deep, replace(context, ahead=None)) if any(full) else context
    keep = min(keep, context.window - 1)
    if context.text is not None:
        return _restarted(deep, context, keep) if any(full) else context
    if not look_ahead and not any(full):
        return context
    begin = context.window - keep
    context = replace(context, ahead=_look_ahead(deep, context, begin), ahead_from=begin)
    assert context.ahead is not None
    if not any(full):
        return context
    if all(full):
        return replace(context.ahead, ahead=_fresh(context.ahead), ahead_from=begin)
    some = [row for row, is_full in enumerate(full) if is_full]
    others = [row for row, is_full in enumerate(full) if not is_full]
    restarted = context.ahead.select(some)
    restarted = replace(restarted, ahead=_fresh(restarted), ahead_from=begin)
    return Context.concat((restarted, context.select(others))).select(_inverse([*some, *others]))


def _restarted(deep: DeepBlock, context: Context, keep: int) -> Context:
    """Rows whose window is full restart from their last ``keep`` u; the others are as they were."""
    if all(f >= context.window for f in context.frames):
        return reencode(deep, context, keep)
    parts, row = [], 0
    for cohort in context.cache.cohorts:
        part = context.select(range(row, row + cohort.rows))
        parts.append(reencode(deep, part, keep) if cohort.frames >= context.window else part)
        row += cohort.rows
    return Context.concat(parts)


def reencode(deep: DeepBlock, context: Context, keep: int) -> Context:
    """The context of the last ``keep`` u (every row has as many) under its condition as it is, positions from 0."""
    history = context.features
    fresh = deep.start(
        len(context.u),
        context.grid,
        context.window,
        context.text,
        context.uncond_text,
        0 if history is None else history.shape[-1],
    )
    if keep:
        features = None if history is None else history[:, -keep:]
        fresh = deep.append(deep.reserve(fresh, keep), context.u[:, -keep:], features)
    return replace(fresh, u=context.u, features=history)


def _look_ahead(deep: DeepBlock, context: Context, begin: int) -> Context:
    """The next window's context, with so many of its frames (this window's from ``begin`` on) that steady steps complete
    it when this one is full, in groups of a few frames, at most one group a step of a session.

    A session encodes a group as soon as its frames are known; a branch encodes nothing before its window is full, since
    most end before, and then all that is left. When makes no difference to what: the groups are the same.
    """
    window, keep = context.window, context.window - begin
    ahead = context.ahead
    if ahead is None or context.ahead_from != begin:
        ahead = _fresh(context)
    ahead = replace(ahead, u=context.u, features=context.features)
    size = max(min(max(AHEAD[0], -(-keep // 2)), AHEAD[1]), -(-keep // begin))

    def goal(f: int, has: int, is_branch: bool) -> int:
        if f >= window:
            return keep
        if is_branch:
            return has
        late = size * (-(-keep // size) - (window - f))  # later, a step would have to do more than one group
        return min(keep, max(late, min((f - begin) // size * size, size * (has // size + 1))))

    branch = [any(s.fold > 1 for s in c.segments) for c in context.cache.cohorts for _ in range(c.rows)]
    cases = [*zip(context.frames, ahead.frames, branch, strict=True)]
    goals = {case: goal(*case) for case in set(cases)}
    if all(stop <= has for (_, has, _), stop in goals.items()):
        return ahead
    groups: dict[tuple[int, int, int], list[int]] = {}
    for row, case in enumerate(cases):
        f, has, _ = case
        groups.setdefault((f, has, goals[case]) if goals[case] > has else (0, 0, 0), []).append(row)
    parts = []
    for (f, has, stop), rows in groups.items():
        part = ahead if len(groups) == 1 else ahead.select(rows)
        while has < stop:
            count = min(keep, size * (has // size + 1)) - has
            part = _appended(deep, part, window - f + begin + has, count)
            has += count
        parts.append(part)
    if len(parts) == 1:
        return parts[0]
    return Context.concat(parts).select(_inverse([row for rows in groups.values() for row in rows]))


def _appended(deep: DeepBlock, ahead: Context, start: int, frames: int) -> Context:
    """The context after ``frames`` of its own remembered u, from number ``start`` on, whose K/V it lacks."""
    history, stop = ahead.features, start + frames
    before = replace(ahead, u=ahead.u[:, :start], features=None if history is None else history[:, :start])
    known = None if history is None else history[:, start:stop]
    after = deep.append(deep.reserve(before, frames), ahead.u[:, start:stop], known)
    return replace(after, u=ahead.u, features=history)


def _fresh(context: Context) -> Context:
    """A context without frames for the same sessions, which have no condition tokens."""
    cohorts = tuple(Cohort(c.rows, 0, 0, ()) for c in context.cache.cohorts)
    return replace(context, cache=KVCache(cohorts), ahead=None, ahead_from=0)


def _roll(deep: DeepBlock, context: Context) -> Context:
    def roll(cache: KVCache, text: Tensor | None) -> KVCache:
        cohorts, row = [], 0
        for c in cache.cohorts:
            if c.frames >= context.window:
                prefix = None
                if c.prefix and text is not None:
                    begun = deep.begin(c.rows, text[row : row + c.rows], c.first + 1, 0)
                    prefix = begun.cohorts[0].segments[0].kv
                cohorts.append(c.evict(1, context.u.shape[2], prefix))
            else:
                cohorts.append(c)
            row += c.rows
        return KVCache(tuple(cohorts))

    uncond = None if context.uncond is None else roll(context.uncond, context.uncond_text)
    return replace(context, cache=roll(context.cache, context.text), uncond=uncond)
