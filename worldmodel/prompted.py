"""Sessions under prompts: how a prompt changes, what the window's condition is, and the past under the empty prompt.

All functions are pure and work on the deep block's `Context`, whose u of the last frames let any past be written again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from worldmodel.condition.prompts import Prompts
from worldmodel.errors import InputError
from worldmodel.flow.context import Context
from worldmodel.flow.flow import Flow
from worldmodel.flow.window import reencode
from worldmodel.state import WorldState


def check_captions(captions: Sequence[str] | None, rows: int) -> tuple[str, ...]:
    """One caption for each session, the empty one by default.

    Raises:
        InputError: not as many strings.
    """
    if captions is None:
        return ("",) * rows
    if isinstance(captions, str) or not all(isinstance(c, str) for c in captions) or len(captions) != rows:
        raise InputError(f"prompts are {captions!r:.80}, expected a sequence of {rows} strings")
    return tuple(captions)


def conditions(
    prompts: Prompts | None, captions: Sequence[str] | None, rows: int, guided: bool, device: torch.device
) -> tuple[tuple[str, ...] | None, Tensor | None, Tensor | None]:
    """Captions of new sessions, their condition tokens, and those of the empty prompt where it is kept up (``guided``).

    Raises:
        InputError: captions in a world that takes none, or not one for each session.
    """
    if prompts is None:
        if captions is not None:
            raise InputError("this world takes no prompts; leave them out")
        return None, None, None
    checked = check_captions(captions, rows)
    text = prompts(checked).to(device)
    return checked, text, prompts([""] * rows).to(text) if guided else None


def switched(flow: Flow, prompts: Prompts, state: WorldState, captions: Sequence[str]) -> WorldState:
    """Sessions whose caption changes go on from their last frames, encoded again under the new one.

    At most ``context`` frames' u are kept, as where a window is full. Those with the same caption are untouched. Nothing
    that has happened changes: u, likelihoods and noise stay.

    Raises:
        InputError: not one caption for each session.
    """
    after = check_captions(captions, state.rows)
    old, frames = state.prompts or (), state.context.frames
    most = min(flow.config.context, state.context.window - 1)
    groups: dict[int, list[int]] = {}  # frames kept (-1: as they are) -> rows
    for b, caption in enumerate(after):
        groups.setdefault(-1 if caption == old[b] else min(frames[b], most), []).append(b)
    if set(groups) == {-1}:
        return state
    parts = []
    for keep, rows in groups.items():
        part = state.context.select(rows)
        if keep >= 0:
            effective = [_in_effect(prompts, after[b], keep < int(state.steps[b])) for b in rows]
            text = prompts(effective).to(state.context.u)
            part = reencode(flow.deep, replace(part, text=text), keep)
        parts.append(part)
    order = [b for rows in groups.values() for b in rows]
    context = Context.concat(parts)
    if order != sorted(order):
        context = context.select([order.index(b) for b in range(state.rows)])
    return replace(state, context=context, prompts=after)


def _in_effect(prompts: Prompts, caption: str, started: bool) -> str:
    return prompts.without_start(caption) if started else caption


def continued(prompts: Prompts, state: WorldState) -> Context:
    """The context before it makes room: a window that now loses the video's first frame is told so.

    Such windows were trained with a prefix before their caption; see `Prompts.without_start`.
    """
    context, captions = state.context, state.prompts or ()
    rows = [
        b
        for b, frames in enumerate(context.frames)
        if frames >= context.window and frames == int(state.steps[b])
        if prompts.without_start(captions[b]) != captions[b]
    ]
    if not rows or context.text is None:
        return context
    text = context.text.clone()
    text[rows] = prompts([prompts.without_start(captions[b]) for b in rows]).to(text)
    return replace(context, text=text)


def with_unconditional(flow: Flow, prompts: Prompts, context: Context) -> Context:
    """The context with a past under the empty prompt, written from the frames' u where there is none."""
    if context.uncond is not None:
        return context
    parts, row = [], 0
    for cohort in context.cache.cohorts:
        part = context.select(range(row, row + cohort.rows))
        text = prompts([""] * cohort.rows).to(context.u)
        plain = reencode(flow.deep, replace(part, text=text), cohort.frames)
        parts.append(replace(part, uncond=plain.cache, uncond_text=text))
        row += cohort.rows
    return Context.concat(parts)
