"""Frames inverted one by one: the exact inverse, the exact K/V and maps, in one go. Float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.flow.helpers import GRID, draw, flow64
from tests.toy import toy_flow
from worldmodel.flow import flow as flow_module
from worldmodel.flow.attention import stream_mask
from worldmodel.flow.context import Context
from worldmodel.flow.flow import Flow, Imagined

TOKENS, DIM = 4, 2
FLOW = flow64(seed=3)
FLIPPED = flow64(seed=3, layers_per_block=(1, 2, 1, 2))
TEXT_FLOW = flow64(seed=3, text_tokens=3, text_dim=5)
TEXT, UNCOND = draw(3, 3, 5, seed=1), draw(3, 3, 5, seed=2)


def past(flow: Flow, lengths: list[int], text: bool = False) -> Context:
    """Sessions of several lengths in one batch."""
    parts = []
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        context = flow.deep.start(
            1, GRID, 4, TEXT[one] if text else None, UNCOND[one] if text else None, features=3
        )
        for t in range(length):
            u = draw(1, 1, TOKENS, DIM, seed=100 * row + t)
            context, _ = flow.deep.commit(flow.deep.reserve(context), u, draw(1, 1, 3, seed=7 * row + t))
        parts.append(context)
    return Context.concat(parts)


def keys(context: Context) -> list[Tensor]:
    caches = [context.cache] + ([context.uncond] if context.uncond is not None else [])
    return [s.kv.clone() for cache in caches for c in cache.cohorts for s in c.segments if s.tokens]


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize(
    ("flow", "text"), [(FLOW, False), (FLIPPED, False), (TEXT_FLOW, True)], ids=["plain", "flipped", "text"]
)
@pytest.mark.parametrize("lengths", [[0], [2], [3, 3], [0, 2, 1]], ids=str)
def test_equals_the_exact_solution_and_its_commit(
    flow: Flow, text: bool, guidance: float, lengths: list[int]
) -> None:
    rows = len(lengths)
    w, action = draw(rows, TOKENS, DIM, seed=50), draw(rows, 1, 3, seed=51)
    reserved = flow.deep.reserve(past(flow, lengths, text))
    solved = flow.deep.solve(reserved, w, action, guidance, 0.0, exact=True).v
    expected, terms = flow.deep.commit(reserved, solved[:, None], action, guidance, want_unconditional=True)
    after, u, own = flow.deep.invert(
        flow.deep.reserve(past(flow, lengths, text), 2), w, action, guidance, want_unconditional=True
    )
    assert (u - solved).abs().max() < 1e-10
    pairs = ((own.model, terms.model), (own.unconditional, terms.unconditional), (own.guided, terms.guided))
    for mine, theirs in pairs:
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert all((a - b).abs().max() < 1e-10 for a, b in zip(mine, theirs, strict=True))
    assert after.frames == expected.frames
    assert torch.allclose(after.u, expected.u, atol=1e-10)
    assert after.features is not None and torch.equal(after.features, expected.features)
    for a, b in zip(keys(after), keys(expected), strict=True):
        assert (a - b).abs().max() < 1e-10


def test_a_second_stream_leaves_no_trace() -> None:
    w, action = draw(1, TOKENS, DIM, seed=50), draw(1, 1, 3, seed=51)
    for streams in (False, True):
        context = FLOW.deep.reserve(past(FLOW, [2]), 2)
        after, u, _ = FLOW.deep.invert(context, w, action, want_unconditional=streams)
        again = FLOW.deep.reserve(after, 2)
        # nothing is left claimed behind the frame: the next one is appended in place
        assert again.cache.cohorts[0].segments[-1].page is after.cache.cohorts[0].segments[-1].page
        if not streams:
            alone = keys(after)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(alone, keys(after), strict=True))


@pytest.mark.parametrize("copies", [1, 3])
def test_branches_equal_sessions_of_their_own(copies: int) -> None:
    context = past(FLOW, [2, 3]).fork(copies)
    rows = 2 * copies
    w, action = draw(rows, TOKENS, DIM, seed=8), draw(rows, 1, 3, seed=9)
    after, u, terms = FLOW.deep.invert(FLOW.deep.reserve(context, 2), w, action, want_unconditional=True)
    for row in range(rows):
        one = slice(row, row + 1)
        alone = past(FLOW, [2, 3]).select([row // copies])
        _, v, own = FLOW.deep.invert(
            FLOW.deep.reserve(alone, 2), w[one], action[one], want_unconditional=True
        )
        assert (u[one] - v).abs().max() < 1e-10
        assert own.unconditional is not None and terms.unconditional is not None
        assert (terms.unconditional.mu[one] - own.unconditional.mu).abs().max() < 1e-10
    assert after.frames == [3] * copies + [4] * copies


def test_shallow_frames_are_inverted_exactly() -> None:
    for block in FLIPPED.shallow_blocks:
        w = draw(3, TOKENS, DIM, seed=5)
        v, log_det = block.invert_frame(w, GRID)
        affine = block.frame_parameters(block.to_own(v), GRID)
        assert (block.to_raster(affine.forward(block.to_own(v))) - w).abs().max() < 1e-10
        assert (block.to_raster(affine.log_det()) - log_det).abs().max() < 1e-10


@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_frames_of_many_tokens_go_the_other_way_to_the_same_place(
    guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, action = draw(2, TOKENS, DIM, seed=50), draw(2, 1, 3, seed=51)

    def imagine() -> Imagined:
        return FLIPPED.imagine(past(FLIPPED, [1, 3]), w, action, guidance, 0.0, want_unconditional=True)

    few = imagine()
    monkeypatch.setattr(flow_module, "ONE_BY_ONE", 0)
    many = imagine()
    for name in ("x", "u", "log_det"):
        assert (getattr(few, name) - getattr(many, name)).abs().max() < 1e-9
    assert (few.terms.model.mu - many.terms.model.mu).abs().max() < 1e-9
    assert few.sweeps.tolist() == [TOKENS] * 2


def test_the_mask_of_streams() -> None:
    mask = stream_mask(1, 2, 2, 1, 2, torch.float32, torch.device("cpu"))
    # the second token of each stream: past, own first, own second; not the other stream
    assert (mask == 0).tolist() == [[True, True, True, False, False], [True, False, False, True, True]]
    first = stream_mask(0, 3, 1, 0, 2, torch.float32, torch.device("cpu"))
    assert (first == 0).tolist() == [[True, False, False], [True, True, False]]


@pytest.mark.parametrize("tokens", [16, 100])
def test_long_runs_without_a_mask_equal_one_pass(tokens: int) -> None:
    """Past and run are attended apart and merged by their log-sum-exp; the oracle has no cache."""
    grid = (tokens // 4, 4)
    flow = toy_flow(seed=4).double()
    u = draw(2, 3, tokens, 3, seed=6)
    context, maps = flow.deep.start(2, grid, 6, features=8), []
    for t in range(3):
        context, terms = flow.deep.commit(flow.deep.reserve(context), u[:, t : t + 1], None)
        maps.append(terms.model.mu)
    whole = flow.deep.clip_parameters(u, grid, None, None)
    assert (torch.cat(maps, dim=1) - whole.mu).abs().max() < 1e-10


def test_bfloat16_weights_solve_in_float32() -> None:
    flow = toy_flow(seed=4)
    half = toy_flow(seed=4).bfloat16()
    w = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    action = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(1))
    results = []
    for model in (flow, half):
        context = model.deep.start(2, GRID, 6, features=8)
        with torch.no_grad():
            made = model.imagine(context, w, action, 0.5, 1e-8, want_unconditional=True)
        results.append(made.x)
        assert made.x.dtype == torch.float32
    assert (results[0] - results[1]).abs().max() < 0.1
    assert half.deep.kv_shape().dtype == torch.bfloat16
