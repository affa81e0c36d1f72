"""The K/V cache: keys stored rotated, snapshots that stay valid, forks that share pages."""

from __future__ import annotations

import random

import pytest
import torch
from einops import rearrange
from torch import Tensor

from tests.flow.helpers import GRID, draw, flow64
from tests.toy import toy_flow
from worldmodel.flow.affine import Affine
from worldmodel.flow.cache import Cohort, KVCache, Page, Segment
from worldmodel.flow.context import Context
from worldmodel.flow.flow import Flow
from worldmodel.flow.rope import Rotary, frame_rotary, rotate

TOKENS, DIM, WINDOW = 4, 2, 6
FLOW = flow64(seed=5, window=WINDOW, context=3)


def start(rows: int = 1, flow: Flow = FLOW) -> Context:
    return flow.deep.start(rows, GRID, flow.config.window, features=3)


def advance(
    context: Context, seed: int, flow: Flow = FLOW, rows: int | None = None
) -> tuple[Context, Affine]:
    """Commit one frame that depends on ``seed`` alone; rows equal unless they differ already."""
    u = draw(1, 1, TOKENS, DIM, seed=seed).to(flow.deep.sos.dtype)
    features = draw(1, 1, 3, seed=seed + 1000).to(u.dtype)
    count = context.cache.rows
    context, terms = flow.deep.commit(
        flow.deep.reserve(context), u.expand(count, -1, -1, -1), features.expand(count, -1, -1)
    )
    return context, terms.model


def history(seeds: list[int], rows: int = 1, flow: Flow = FLOW) -> Context:
    context = start(rows, flow)
    for seed in seeds:
        context, _ = advance(context, seed, flow)
    return context


def keys_values(context: Context) -> Tensor:
    """(layers, 2, B, H, S, K) of a context whose cohorts are of one length, shared rows repeated."""
    cohorts = []
    for cohort in context.cache.cohorts:
        parts = [s.kv.repeat_interleave(s.fold, dim=2) for s in cohort.segments]
        cohorts.append(torch.cat(parts, dim=-2))
    return torch.cat(cohorts, dim=2)


def same(a: Context, b: Context) -> bool:
    return torch.equal(keys_values(a), keys_values(b)) and torch.equal(a.u, b.u)


# ---- what is stored ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_keys_stored_rotated_equal_rotating_again(dtype: torch.dtype) -> None:
    """Rotating all keys at once over the whole table equals rotating frame by frame as they are appended."""
    keys = draw(2, 3, 5 * TOKENS, 16).to(dtype)
    whole = rotate(keys, frame_rotary(GRID, 0, 5, 4.0, 16, torch.device("cpu")))
    parts = [
        rotate(part, frame_rotary(GRID, t, 1, 4.0, 16, torch.device("cpu")))
        for t, part in enumerate(keys.split(TOKENS, dim=2))
    ]
    assert torch.equal(torch.cat(parts, dim=2), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_stored_keys_are_the_rotated_projections_of_the_clip(dtype: torch.dtype) -> None:
    """First layer: K/V in the cache equal those of one pass over the clip; all layers to rounding."""
    flow = FLOW if dtype == torch.float64 else flow64(seed=5, window=WINDOW, context=3).float()
    u = torch.cat([draw(1, 1, TOKENS, DIM, seed=s) for s in range(4)], dim=1).to(dtype)
    features = torch.cat([draw(1, 1, 3, seed=s + 1000) for s in range(4)], dim=1).to(dtype)
    context = history([0, 1, 2, 3], flow=flow)
    t = flow.deep.transformer
    v = rearrange(flow.deep.to_own(u), "b t n d -> b (t n) d")
    x = t.embed(flow.deep.shifted(v), features.repeat_interleave(TOKENS, dim=1))
    attention = t.layers[0].attention
    _, k, value = rearrange(
        attention.qkv(attention.norm(x)), "b s (three h k) -> three b h s k", three=3, h=attention.heads
    )
    k = rotate(k, frame_rotary(GRID, 0, 4, flow.deep.scale, t.head_dim, u.device))
    stored = keys_values(context)[0]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert (stored[0] - k).abs().max() < tolerance
    assert (stored[1] - value).abs().max() < tolerance


def test_the_cache_is_of_the_commit_and_not_of_the_solver() -> None:
    """Solving leaves nothing behind: K/V after `solve` and `commit` equal K/V after `commit` alone."""
    noise = draw(1, TOKENS, DIM, seed=50)
    features = draw(1, 1, 3, seed=51)
    base = FLOW.deep.reserve(history([1, 2]))
    solved = FLOW.deep.solve(base, noise, features, 0.0, 1e-3).v[:, None]
    after, _ = FLOW.deep.commit(base, solved, features)
    clean, _ = FLOW.deep.commit(FLOW.deep.reserve(history([1, 2])), solved, features)
    assert same(after, clean)


# ---- snapshots ---------------------------------------------------------------------------------------------
def test_an_old_state_stays_valid_after_newer_ones_were_written() -> None:
    base = history([1, 2])
    kept = keys_values(base).clone()
    left, _ = advance(base, 10)
    right, _ = advance(base, 20)  # from the same snapshot: must not write over `left`
    left, _ = advance(left, 11)
    right, _ = advance(right, 21)
    assert torch.equal(keys_values(base), kept)
    assert same(left, history([1, 2, 10, 11]))
    assert same(right, history([1, 2, 20, 21]))


@pytest.mark.parametrize("seed", range(4))
def test_interleaved_branches_equal_their_own_histories(seed: int) -> None:
    """A random tree of commits, forks, selections and abandoned reservations: every node ever made stays
    right.
    """
    chance = random.Random(seed)
    nodes: list[tuple[Context, list[list[int]]]] = [(start(), [[]])]
    for number in range(30):
        context, rows = chance.choice(nodes)
        deed = chance.choice(["advance", "advance", "advance", "fork", "select", "abandon", "concat"])
        if deed == "advance" and max(map(len, rows)) < WINDOW:
            context, _ = advance(context, number)
            rows = [row + [number] for row in rows]
        elif deed == "fork" and len(rows) < 4:
            context, rows = context.fork(2), [row for row in rows for _ in range(2)]
        elif deed == "select":
            index = [chance.randrange(len(rows)) for _ in range(chance.randint(1, 3))]
            context, rows = context.select(index), [rows[i] for i in index]
        elif deed == "abandon" and max(map(len, rows)) < WINDOW:
            reserved = FLOW.deep.reserve(context)
            FLOW.deep.solve(reserved, draw(len(rows), TOKENS, DIM), None, 0.0, 1e-2)
            if chance.random() < 0.5:
                FLOW.deep.release(reserved)
        elif deed == "concat" and len(rows) < 4:
            other, more = chance.choice(nodes)
            if len(more) < 4:
                context, rows = Context.concat([context, other]), rows + more
        nodes.append((context, rows))
    for context, rows in nodes:
        assert context.frames == [len(row) for row in rows]
        for i, seeds in enumerate(rows):
            one, expected = context.select([i]), history(seeds)
            assert torch.equal(one.u, expected.u) and torch.equal(one.features, expected.features)
            if seeds:
                assert (keys_values(one) - keys_values(expected)).abs().max() < 1e-12


def test_the_holder_of_the_end_appends_in_place_and_others_copy() -> None:
    first = history([1])
    page = first.cache.cohorts[0].segments[-1].page
    second, _ = advance(first, 2)
    assert second.cache.cohorts[0].segments[-1].page is page
    branch, _ = advance(first, 3)  # no longer the holder
    assert branch.cache.cohorts[0].segments[-1].page is not page
    third, _ = advance(second, 4)
    assert third.cache.cohorts[0].segments[-1].page is page


def test_release_gives_the_slots_back() -> None:
    base = history([1])
    page = base.cache.cohorts[0].segments[-1].page
    before = page.claimed
    reserved = FLOW.deep.reserve(base)
    assert page.claimed == before + TOKENS
    FLOW.deep.release(reserved)
    assert page.claimed == before
    # releasing what somebody has since committed is refused
    reserved = FLOW.deep.reserve(base)
    after, _ = FLOW.deep.commit(reserved, draw(1, 1, TOKENS, DIM), None)
    twice = FLOW.deep.reserve(after)
    FLOW.deep.release(reserved)
    assert page.claimed == before + 2 * TOKENS
    FLOW.deep.release(twice)


# ---- forks -------------------------------------------------------------------------------------------------
def test_fork_shares_pages_and_costs_nothing() -> None:
    base = history([1, 2, 3])
    many = base.fork(64)
    assert many.cache.nbytes == base.cache.nbytes
    assert many.cache.rows == 64 and many.frames == [3] * 64
    mine, theirs = base.cache.cohorts[0].segments, many.cache.cohorts[0].segments
    assert [s.page.kv.data_ptr() for s in mine] == [s.page.kv.data_ptr() for s in theirs]
    assert many.u.untyped_storage().data_ptr() == base.u.untyped_storage().data_ptr()
    grown, _ = advance(many, 4)
    frame = base.cache.nbytes // 3
    assert grown.cache.nbytes == base.cache.nbytes + 64 * frame  # the past once, the new frame 64 times
    assert [s.fold for s in grown.cache.cohorts[0].segments] == [64, 1]
    again = grown.fork(2)
    assert again.cache.nbytes == grown.cache.nbytes
    assert [s.fold for s in again.cache.cohorts[0].segments] == [128, 2]


@pytest.mark.parametrize("forks", [(3,), (2, 2), (3, 1, 2)])
def test_forked_attention_equals_copied_rows(forks: tuple[int, ...]) -> None:
    """Children with different futures, forked again and again, equal sessions that never shared anything."""
    context, seeds = history([1, 2]), [[1, 2]]
    terms = None
    for depth, n in enumerate(forks):
        context, seeds = context.fork(n), [row for row in seeds for _ in range(n)]
        new = [100 * depth + i for i in range(len(seeds))]
        u = torch.cat([draw(1, 1, TOKENS, DIM, seed=s) for s in new])
        features = torch.cat([draw(1, 1, 3, seed=s + 1000) for s in new])
        context, committed = FLOW.deep.commit(FLOW.deep.reserve(context), u, features)
        terms = committed.model
        seeds = [row + [s] for row, s in zip(seeds, new, strict=True)]
    assert terms is not None
    for i, row in enumerate(seeds):
        alone, expected = advance(history(row[:-1]), row[-1])
        assert (keys_values(context)[:, :, i] - keys_values(alone)[:, :, 0]).abs().max() < 1e-12
        assert (terms.mu[i] - expected.mu[0]).abs().max() < 1e-12
        assert (terms.sigma[i] - expected.sigma[0]).abs().max() < 1e-12


def test_select_views_neighbours_and_keeps_sharing() -> None:
    rows = Context.concat([history([1, 2]), history([3, 4])])
    assert len(rows.cache.cohorts) == 2
    batch = history([1, 2], rows=4)
    middle = batch.select([1, 2])
    base = batch.cache.cohorts[0].segments[0].page.kv
    assert middle.cache.cohorts[0].segments[0].page.kv.data_ptr() == base[:, :, 1:].data_ptr()
    forked = history([1, 2]).fork(5)
    some = forked.select([4, 0, 2])
    assert some.cache.nbytes == forked.cache.nbytes and some.cache.cohorts[0].segments[0].fold == 3
    everything = batch.select(range(4))
    assert everything.cache.cohorts[0] is batch.cache.cohorts[0]
    # a view is never written to: appending to it copies, and the batch it came from stays right
    kept = keys_values(batch).clone()
    advance(middle, 9)
    assert torch.equal(keys_values(batch), kept)
    later, _ = advance(batch, 8)
    kept = keys_values(later).clone()
    advance(batch.select([1, 2]), 9)
    assert torch.equal(keys_values(later), kept)


def test_concat_of_unequal_lengths_runs_as_if_apart() -> None:
    parts = [history([1]), history([2, 3, 4]), start(), history([5, 6, 7, 8])]
    ragged = Context.concat(parts)
    assert ragged.frames == [1, 3, 0, 4]
    after, terms = advance(ragged, 30)
    for i, part in enumerate(parts):
        alone, expected = advance(part, 30)
        assert (terms.mu[i] - expected.mu[0]).abs().max() < 1e-12
        one = after.select([i])
        assert (keys_values(one) - keys_values(alone)).abs().max() < 1e-12
    assert after.frames == [2, 4, 1, 5]


def test_nbytes_counts_what_is_in_view() -> None:
    attention = FLOW.deep.transformer.layers[0].attention
    per_token = 2 * 2 * attention.heads * 16 * 8  # layers, K and V, float64
    assert history([1, 2]).cache.nbytes == 2 * TOKENS * per_token
    assert start().cache.nbytes == 0


# ---- eviction ----------------------------------------------------------------------------------------------
def cohort_of(lengths: list[int], prefix: int = 0) -> Cohort:
    """A cohort of 1 row whose K/V count up along the tokens, in segments of the given lengths."""
    segments, first = [], 0
    for length in lengths:
        kv = (
            torch.arange(first, first + length, dtype=torch.float32)
            .expand(1, 2, 1, 1, length)[..., None]
            .clone()
        )
        segments.append(Segment(Page(kv, length), 0, length))
        first += length
    return Cohort(1, (first - prefix) // 2, 0, tuple(segments), prefix)


def content(cohort: Cohort) -> list[float]:
    return torch.cat([s.kv[0, 0, 0, 0, :, 0] for s in cohort.segments]).tolist()


@pytest.mark.parametrize("lengths", [[8], [2, 6], [4, 4], [2, 2, 2, 2], [6, 2]])
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_evict_drops_the_oldest_tokens(lengths: list[int], frames: int) -> None:
    """Frames of 2 tokens, whatever the segments."""
    cohort = cohort_of(lengths)
    after = cohort.evict(frames, 2 * frames)
    assert content(after) == list(range(2 * frames, 8))
    assert (after.frames, after.first, after.next_position) == (4 - frames, frames, 4)
    assert content(cohort) == list(range(8))


@pytest.mark.parametrize("lengths", [[11], [3, 8], [5, 6], [3, 2, 6], [7, 4]])
def test_evict_replaces_the_prefix(lengths: list[int]) -> None:
    cohort = cohort_of(lengths, prefix=3)
    new = torch.tensor([-1.0, -2.0, -3.0]).expand(1, 2, 1, 1, 3)[..., None].clone()
    for gone in (1, 2, 3):
        cohort = cohort.evict(1, 2, new)
        assert content(cohort) == [-1.0, -2.0, -3.0, *range(3 + 2 * gone, 11)]
        assert cohort.prefix == 3 and cohort.frames == 4 - gone and cohort.first == gone


def test_evict_of_forks_replaces_the_prefix_once() -> None:
    kv = torch.zeros(1, 2, 2, 1, 7, 1)
    cohort = Cohort(2, 2, 0, (Segment(Page(kv, 7), 0, 7),), 3).fork(3)
    new = torch.arange(6.0).repeat_interleave(1)[None, None, :, None, None, None].expand(1, 2, 6, 1, 3, 1)
    after = cohort.evict(1, 2, new)
    assert after.segments[0].fold == 3
    assert after.segments[0].kv.shape == (1, 2, 2, 1, 5, 1)
    assert after.segments[0].kv[0, 0, :, 0, 0, 0].tolist() == [0.0, 3.0]


def test_empty_cache() -> None:
    cache = KVCache((Cohort(3, 0, 0, ()),))
    assert cache.rows == 3 and cache.frames == [0, 0, 0] and cache.nbytes == 0


def test_rotary_phases_depend_on_distance_only() -> None:
    """What lets a rolling window keep its keys: shifting every frame index changes no attention logit."""
    q, k = draw(1, 1, 3 * TOKENS, 32), draw(1, 1, 3 * TOKENS, 32, seed=2)

    def logits(first: int) -> Tensor:
        table = frame_rotary(GRID, first, 3, 4.0, 32, torch.device("cpu"))
        return rotate(q, table) @ rotate(k, table).mT

    assert isinstance(frame_rotary(GRID, 0, 3, 4.0, 32, torch.device("cpu")), Rotary)
    assert (logits(0) - logits(1000)).abs().max() < 1e-4
    assert (logits(0) - q @ k.mT).abs().max() > 0.1


def test_a_float32_flow_keeps_a_float32_cache() -> None:
    flow = toy_flow(window=4, context=2)
    cache = flow.deep.reserve(flow.deep.start(2, (2, 2), 4, features=8)).cache
    assert cache.cohorts[0].segments[-1].page.kv.dtype == torch.float32
