"""The window: re-encoding equals a fresh session, rolling equals attention under a sliding mask. With
prompts too.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from einops import rearrange
from torch import Tensor

from tests.flow.helpers import GRID, draw, flow64
from worldmodel.flow.affine import Affine, affine_from_head
from worldmodel.flow.context import Context
from worldmodel.flow.flow import Flow
from worldmodel.flow.rope import concat_rotary, frame_rotary, text_rotary
from worldmodel.flow.window import make_room

TOKENS, DIM, WINDOW, KEEP, ROWS = 4, 2, 4, 2, 2
FLOW = flow64(seed=6, window=WINDOW, context=KEEP)
TEXT_FLOW = flow64(seed=6, window=WINDOW, context=KEEP, text_tokens=3, text_dim=5)
SHALLOW_TEXT_FLOW = flow64(
    seed=6, window=WINDOW, context=KEEP, text_tokens=3, text_dim=5, layers_per_block=(1, 1)
)
CPU = torch.device("cpu")
TEXT, UNCOND = draw(ROWS, 3, 5, seed=21), draw(ROWS, 3, 5, seed=22)


def frames(count: int, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    return draw(rows, count, TOKENS, DIM, seed=31), draw(rows, count, 3, seed=32)


def stream(
    flow: Flow,
    u: Tensor,
    features: Tensor,
    keep: int | None,
    text: Tensor | None = None,
    window: int = WINDOW,
) -> tuple[Context, list[Affine]]:
    """Commit frame after frame; the context at the end, and each frame's affine map (B, 1, N, D)."""
    context = flow.deep.start(len(u), GRID, window, text, UNCOND if text is not None else None, features=3)
    terms = []
    for t in range(u.shape[1]):
        context = flow.deep.reserve(make_room(flow.deep, context, keep))
        context, committed = flow.deep.commit(context, u[:, t : t + 1], features[:, t : t + 1])
        terms.append(committed.model)
    return context, terms


def difference(a: Affine, b: Affine) -> float:
    return max((a.mu - b.mu).abs().max().item(), (a.sigma - b.sigma).abs().max().item())


def test_context_lengths_by_policy() -> None:
    u, features = frames(12, rows=1)
    for keep, expected in (
        (KEEP, [1, 2, 3, 4, 3, 4, 3, 4, 3, 4, 3, 4]),
        (1, [1, 2, 3, 4, 2, 3, 4, 2, 3, 4, 2, 3]),
        (None, [1, 2, 3, 4, 4, 4, 4, 4, 4, 4, 4, 4]),
    ):
        lengths = [stream(FLOW, u[:, :t], features[:, :t], keep)[0].frames[0] for t in range(1, 13)]
        assert lengths == expected


@pytest.mark.parametrize("text", [None, TEXT], ids=["plain", "text"])
@pytest.mark.parametrize("keep", [1, 2, 3])
def test_within_and_past_the_window_reencoding_equals_one_pass(keep: int, text: Tensor | None) -> None:
    """Oracle without a cache: each frame's map from one pass over the frames in its context, positions from
    0.
    """
    flow = FLOW if text is None else TEXT_FLOW
    u, features = frames(9)
    _, terms = stream(flow, u, features, keep, text)
    oldest = length = 0
    for t in range(9):
        if length == WINDOW:
            oldest, length = t - keep, keep
        clip = slice(oldest, t + 1)
        whole = flow.deep.clip_parameters(u[:, clip], GRID, text, features[:, clip])
        expected = Affine(whole.mu[:, -1:], whole.sigma[:, -1:])
        assert difference(terms[t], expected) < 1e-12
        length += 1


@pytest.mark.parametrize("text", [None, TEXT], ids=["plain", "text"])
def test_reencode_equals_a_fresh_session_on_the_last_frames(text: Tensor | None) -> None:
    flow = FLOW if text is None else TEXT_FLOW
    u, features = frames(WINDOW + 1)
    old, _ = stream(flow, u[:, :WINDOW], features[:, :WINDOW], KEEP, text)
    again = make_room(flow.deep, old, KEEP)
    last = slice(WINDOW - KEEP, WINDOW)
    fresh, _ = stream(flow, u[:, last], features[:, last], KEEP, text)
    assert again.frames == fresh.frames == [KEEP] * ROWS
    caches = [(again.cache, fresh.cache)]
    if text is not None:
        caches.append((again.uncond, fresh.uncond))
    for mine, theirs in caches:
        mine, theirs = (torch.cat([s.kv for s in c.cohorts[0].segments], dim=-2) for c in (mine, theirs))
        assert (mine - theirs).abs().max() < 1e-12
    assert torch.equal(again.u, old.u)  # what is remembered for the next time is not forgotten
    assert again.cache.cohorts[0].first == 0


@pytest.mark.parametrize("window", [1, 2, WINDOW])
def test_rolling_equals_attention_under_a_sliding_mask(window: int) -> None:
    """One pass over all frames where frame t sees frames t - W + 1 .. t, at absolute positions."""
    count = 11
    u, features = frames(count)
    _, terms = stream(FLOW, u, features, None, window=window)
    t = FLOW.deep.transformer
    v = rearrange(FLOW.deep.to_own(u), "b t n d -> b (t n) d")
    x = t.embed(FLOW.deep.shifted(v), features.repeat_interleave(TOKENS, dim=1))
    index = torch.arange(count).repeat_interleave(TOKENS)
    mask = torch.ones(len(index), len(index)).tril().bool() & (index[None] > index[:, None] - window)
    rotary = frame_rotary(GRID, 0, count, FLOW.deep.scale, t.head_dim, CPU)
    affine = affine_from_head(t.head(t.run(x, rotary, mask)), FLOW.deep.soft_clip)
    whole = [FLOW.deep.to_raster(rearrange(a, "b (t n) d -> b t n d", n=TOKENS)) for a in affine]
    for i in range(count):
        assert difference(terms[i], Affine(*(a[:, i : i + 1] for a in whole))) < 1e-12


def test_rolling_and_reencoding_agree_until_the_window_is_full_and_not_after() -> None:
    u, features = frames(WINDOW + 1)
    _, rolled = stream(FLOW, u, features, None)
    _, encoded = stream(FLOW, u, features, KEEP)
    assert all(difference(a, b) < 1e-12 for a, b in zip(rolled[:WINDOW], encoded[:WINDOW], strict=True))
    assert difference(rolled[WINDOW], encoded[WINDOW]) > 1e-6


def test_rolling_re_anchors_the_prompt() -> None:
    """After k evictions the prompt's K/V are those of a prompt that begins at position k, in both caches."""
    u, features = frames(WINDOW + 3)
    context, _ = stream(TEXT_FLOW, u, features, None, TEXT)
    gone = 3
    for cache, text in ((context.cache, TEXT), (context.uncond, UNCOND)):
        (cohort,) = cache.cohorts
        assert (cohort.first, cohort.frames, cohort.prefix) == (gone, WINDOW, 3)
        stored = torch.cat([s.kv for s in cohort.segments], dim=-2)
        assert stored.shape[-2] == 3 + WINDOW * TOKENS
        t = TEXT_FLOW.deep.transformer
        begun = TEXT_FLOW.deep.begin(ROWS, text, gone, 0)
        assert torch.equal(stored[..., :3, :], begun.cohorts[0].segments[0].kv)
        at_zero = TEXT_FLOW.deep.begin(ROWS, text, 0, 0).cohorts[0].segments[0].kv
        assert (stored[:, 0, ..., :3, :] - at_zero[:, 0]).abs().max() > 1e-3
        assert len(t.layers) == 2


def test_rolling_with_a_prompt_equals_one_pass_where_layers_do_not_mix_time() -> None:
    """With one layer, stored K/V know nothing of the past: the window alone, positions as they are, is the
    oracle.
    """
    flow, count = SHALLOW_TEXT_FLOW, WINDOW + 4
    u, features = frames(count)
    _, terms = stream(flow, u, features, None, TEXT)
    t = flow.deep.transformer
    v = rearrange(flow.deep.to_own(u), "b t n d -> b (t n) d")
    embedded = t.embed(flow.deep.shifted(v), features.repeat_interleave(TOKENS, dim=1))
    for now in range(count):
        first = max(0, now - WINDOW + 1)
        x = embedded[:, first * TOKENS : (now + 1) * TOKENS]
        rotary = concat_rotary(
            text_rotary(3, first, flow.deep.scale, t.head_dim, CPU),
            frame_rotary(GRID, first, now + 1 - first, flow.deep.scale, t.head_dim, CPU),
        )
        out = t.head(t.run(torch.cat((t.proj_text(TEXT), x), dim=1), rotary)[:, -TOKENS:])
        affine = affine_from_head(out, flow.deep.soft_clip)
        expected = Affine(*(flow.deep.to_raster(a)[:, None] for a in affine))
        assert difference(terms[now], expected) < 1e-12


@pytest.mark.parametrize("keep", [None, KEEP], ids=["rolling", "reencode"])
@pytest.mark.parametrize("text", [None, TEXT], ids=["plain", "text"])
def test_ragged_batches_make_room_row_by_row(keep: int | None, text: Tensor | None) -> None:
    flow = FLOW if text is None else TEXT_FLOW
    u, features = frames(8)
    one = slice(0, 1)

    def session(count: int) -> Context:
        """Each with a prompt of its own."""
        prompt, other = (draw(1, 3, 5, seed=100 * i + count) for i in (1, 2))
        given = (None, None) if text is None else (prompt, other)
        context = flow.deep.start(1, GRID, WINDOW, *given, features=3)
        for t in range(count):
            context = flow.deep.reserve(make_room(flow.deep, context, keep))
            context, _ = flow.deep.commit(context, u[one, t : t + 1], features[one, t : t + 1])
        return context

    parts = [session(count) for count in (4, 1, 6, 0, 4)]
    ragged = flow.deep.reserve(make_room(flow.deep, Context.concat(parts), keep))
    new, action = u[one, 7:8].expand(5, -1, -1, -1), features[one, 7:8].expand(5, -1, -1)
    after, terms = flow.deep.commit(ragged, new, action, guidance=1.5 if text is not None else 0.0)
    for i, part in enumerate(parts):
        alone = flow.deep.reserve(make_room(flow.deep, part, keep))
        solo, expected = flow.deep.commit(
            alone, new[:1], action[:1], guidance=1.5 if text is not None else 0.0
        )
        assert after.frames[i] == solo.frames[0]
        assert difference(Affine(*(a[i : i + 1] for a in terms.model)), expected.model) < 1e-12
        if text is not None:
            assert difference(Affine(*(a[i : i + 1] for a in terms.guided)), expected.guided) < 1e-12


@pytest.mark.parametrize("keep", [1, 16, None])
def test_a_window_of_one_frame_remembers_no_keys(keep: int | None) -> None:
    """The smallest window: the context never exceeds it, whatever is asked to be kept."""
    flow = flow64(seed=6, window=1, context=1)
    u, features = frames(4, rows=1)
    context = flow.deep.start(1, GRID, 1, features=3)
    for t in range(4):
        context = flow.deep.reserve(make_room(flow.deep, context, keep))
        assert context.frames == [0]
        context, terms = flow.deep.commit(context, u[:, t : t + 1], features[:, t : t + 1])
        assert context.frames == [1]
        if keep is not None:
            alone = flow.deep.clip_parameters(u[:, t : t + 1], GRID, None, features[:, t : t + 1])
            assert difference(terms.model, alone) < 1e-12


def test_more_kept_than_the_window_holds_is_cut_to_leave_room() -> None:
    u, features = frames(7, rows=1)
    context, _ = stream(FLOW, u, features, keep=WINDOW + 3)
    assert context.frames == [WINDOW]
    noise = draw(1, 7, TOKENS, DIM)
    long = FLOW.sample(noise, GRID, features=features, window=WINDOW, context=WINDOW + 3)
    assert torch.equal(long, FLOW.sample(noise, GRID, features=features, window=WINDOW, context=WINDOW - 1))


@pytest.mark.parametrize("past", [0, 3])
def test_the_first_guess_is_the_previous_frame(past: int) -> None:
    """Video-aware initialisation: one sweep from the frame before, or from the noise where there is none."""
    u, features = frames(past + 1)
    context, _ = stream(FLOW, u[:, :past], features[:, :past], KEEP)
    noise = draw(ROWS, TOKENS, DIM)
    guess = u[:, past - 1] if past else noise
    solution = FLOW.deep.solve(FLOW.deep.reserve(context), noise, features[:, past:], 0.0, tolerance=1e9)
    clip = torch.cat((u[:, :past], guess[:, None]), dim=1)
    affine = FLOW.deep.clip_parameters(clip, GRID, None, features)
    assert (solution.v - Affine(*(a[:, -1] for a in affine)).inverse(noise)).abs().max() < 1e-12
    assert solution.sweeps.tolist() == [1] * ROWS


# ---- the next window, ahead of time ------------------------------------------------------------------------------
def spy(flow: Flow, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Frames of every commit from here on."""
    kept, seen = flow.deep.commit, []

    def commit(context: Context, u: Tensor, *args: object, **kwargs: object) -> object:
        seen.append(u.shape[1])
        return kept(context, u, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(flow.deep, "commit", commit)
    return seen


@pytest.mark.parametrize(("keep", "most"), [(2, 2), (4, 2), (6, 3), (7, 7)])
@pytest.mark.parametrize("text", [None, TEXT], ids=["plain", "text"])
def test_steps_share_the_next_window_evenly(
    keep: int, most: int, text: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of 8 restart every 8 - keep steps, each of which encodes its share of the kept frames, two or three at
    the least.

    Those with a condition, which may change, encode all at once.
    """
    flow = flow64(seed=6, window=8, context=6, **({} if text is None else {"text_tokens": 3, "text_dim": 5}))
    u, features = frames(40)
    seen = spy(flow, monkeypatch)
    _, terms = stream(flow, u, features, keep, text, window=8)
    assert max(seen) == (most if text is None else keep)
    restarts = 1 + (39 - 8) // (8 - keep)
    assert 40 + restarts * keep <= sum(seen) <= 40 + (restarts + 1) * keep
    # and the maps are those of sessions that encode all at once
    context = flow.deep.start(ROWS, GRID, 8, text, UNCOND if text is not None else None, features=3)
    for t in range(40):
        context = flow.deep.reserve(make_room(flow.deep, context, keep, look_ahead=False))
        context, committed = flow.deep.commit(context, u[:, t : t + 1], features[:, t : t + 1])
        assert difference(terms[t], committed.model) < 1e-12


@pytest.mark.parametrize("rows", [[0, 1], [1, 0, 1]], ids=str)
def test_the_next_window_is_forked_selected_and_joined_with_its_session(rows: list[int]) -> None:
    """However a batch was put together, its restart equals that of sessions that encode all at once."""
    u, features = frames(WINDOW + 2)
    parts = []
    for row, length in enumerate((WINDOW, WINDOW - 1)):  # the first is full; both have begun the next window
        one = slice(row, row + 1)
        parts.append(stream(FLOW, u[one, :length], features[one, :length], KEEP)[0])
        assert parts[-1].ahead is not None
    batch = Context.concat(parts).fork(2).select([0, 2]).select(rows)
    made = make_room(FLOW.deep, batch, KEEP)
    for slot, row in enumerate(rows):
        plain = make_room(FLOW.deep, replace(parts[row], ahead=None), KEEP, look_ahead=False)
        mine = made.select([slot])
        assert mine.frames == plain.frames
        caches = (
            torch.cat([s.kv for s in c.cache.cohorts[0].segments if s.tokens], dim=-2) for c in (mine, plain)
        )
        a, b = caches
        assert (a - b).abs().max() < 1e-12
        assert torch.equal(mine.u, parts[row].u)


def test_branches_encode_the_next_window_as_late_as_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most end before. Those that go on come to the same K/V, a group of frames at a time too."""
    flow, (u, features) = flow64(seed=6, window=8, context=4), frames(9)
    context, _ = stream(flow, u[:, :6], features[:, :6], 4, window=8)

    def on(context: Context, rows: int) -> list[Context]:
        contexts = []
        for t in range(6, 9):
            context = flow.deep.reserve(make_room(flow.deep, context, 4))
            context, _ = flow.deep.commit(
                context, *(x[:, t : t + 1].repeat_interleave(rows, dim=0) for x in (u, features))
            )
            contexts.append(context)
        return contexts

    seen = spy(flow, monkeypatch)
    alone = on(context, 1)
    assert seen == [2, 1, 1, 2, 1]  # what is known is encoded at once
    seen.clear()
    branches = on(context.fork(3), 3)
    assert seen == [1, 1, 2, 2, 1]
    assert [c.ahead.frames for c in branches if c.ahead] == [[0] * 6, [0] * 6, [0] * 6]
    assert branches[-1].frames == alone[-1].frames * 3 == [5] * 6
    a, b = (torch.cat([s.kv for s in c[-1].cache.cohorts[0].segments], dim=-2) for c in (branches, alone))
    torch.testing.assert_close(a[:, :, ::3], b, rtol=0, atol=1e-12)


def test_a_neighbour_that_has_just_restarted_takes_no_row_its_next_window() -> None:
    """Else the others would encode theirs again, more frames at a time than alone, with another rounding."""
    flow, (u, features) = flow64(seed=6, window=8, context=6), frames(8)
    restarted, other = (
        make_room(flow.deep, stream(flow, u[:, :n], features[:, :n], 6, window=8)[0], 6) for n in (8, 7)
    )
    joined = Context.concat([restarted, other])
    assert joined.ahead is not None and other.ahead is not None
    assert joined.ahead.frames == [0] * ROWS + other.ahead.frames
    assert min(other.ahead.frames) > 0


def test_another_rule_or_length_of_context_begins_the_next_window_again() -> None:
    u, features = frames(WINDOW)
    context, _ = stream(FLOW, u, features, KEEP)
    for keep in (1, 3):
        again = make_room(FLOW.deep, context, keep)
        fresh = make_room(FLOW.deep, replace(context, ahead=None), keep)
        assert again.frames == fresh.frames == [keep] * ROWS
        a, b = (torch.cat([s.kv for s in c.cache.cohorts[0].segments], dim=-2) for c in (again, fresh))
        assert (a - b).abs().max() < 1e-12
    rolled = make_room(FLOW.deep, context, None)
    assert rolled.ahead is None and rolled.frames == [WINDOW - 1] * ROWS
    back = make_room(FLOW.deep, replace(rolled, u=context.u), KEEP)  # positions have moved; nothing is shared
    assert back.frames == [WINDOW - 1] * ROWS
