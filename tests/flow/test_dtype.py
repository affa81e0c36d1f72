"""bfloat16 weights: hidden states and K/V are bfloat16; tokens, affine maps, solves and densities float32."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from tests.toy import toy_flow
from worldmodel.flow.flow import Flow

GRID = (2, 2)


@pytest.fixture(scope="module")
def pair() -> tuple[Flow, Flow]:
    """The same weights, rounded to bfloat16, in both dtypes."""
    half = toy_flow(text_tokens=3, text_dim=8).to(torch.bfloat16)
    return half, deepcopy(half).float()


def inputs(rows: int = 2, frames: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "noise": torch.randn(rows, frames, 4, 3, generator=generator),
        "text": torch.randn(rows, 3, 8, generator=generator),
        "features": torch.randn(rows, frames, 8, generator=generator),
    }


def test_densities_are_float32_and_close_to_those_of_float32(pair: tuple[Flow, Flow]) -> None:
    half, full = pair
    x = inputs()
    mine, exact = (f(x["noise"], GRID, x["text"], x["features"]) for f in (half, full))
    assert {t.dtype for t in mine} == {torch.float32}
    difference = (mine.log_prob - exact.log_prob).abs().max() / exact.log_prob.abs().max()
    assert 0 < difference < 0.02


def test_solves_are_float32_and_invert_the_pass_that_gives_the_density(pair: tuple[Flow, Flow]) -> None:
    half, _ = pair
    x = inputs()
    sample = half.sample(
        x["noise"], GRID, text=x["text"], features=x["features"], tolerance=0.0, window=6, context=3
    )
    assert sample.dtype == torch.float32
    back = half(sample, GRID, x["text"], x["features"]).z
    assert (back - x["noise"]).abs().max() < 0.05


def test_the_context_keeps_bfloat16_keys_and_float32_inputs(pair: tuple[Flow, Flow]) -> None:
    half, _ = pair
    x = inputs(1, 1)
    context = half.deep.reserve(half.deep.start(1, GRID, 6, x["text"], x["text"], 8))
    solved = half.deep.solve(context, x["noise"][:, 0], x["features"], 2.0, 1e-3)
    after, terms = half.deep.commit(context, solved.v[:, None], x["features"], 2.0)
    assert solved.v.dtype == after.u.dtype == torch.float32
    assert after.features is not None and after.features.dtype == torch.float32
    assert {s.kv.dtype for c in after.cache.cohorts for s in c.segments} == {torch.bfloat16}
    assert terms.guided is not None and terms.guided.sigma.dtype == terms.model.mu.dtype == torch.float32
    z = terms.guided.forward(solved.v[:, None])
    assert (z - x["noise"]).square().mean() / x["noise"].square().mean() < 1e-2


def test_the_denoiser_gives_float32(pair: tuple[Flow, Flow]) -> None:
    half, full = pair
    x = inputs()
    mine, exact = (f.denoise(x["noise"], GRID, x["text"], x["features"]) for f in (half, full))
    assert mine.dtype == torch.float32
    assert 0 < (mine - exact).abs().max() < 0.1 * exact.abs().max()


def test_the_head_does_not_round_what_it_moves_tokens_by(pair: tuple[Flow, Flow]) -> None:
    """Outputs in bfloat16 would be 2^-8 apart; here near ones are told apart."""
    half, _ = pair
    out = half.deep.transformer.head(torch.randn(1, 50, 64, dtype=torch.bfloat16))
    assert out.dtype == torch.float32 and not torch.equal(out, out.to(torch.bfloat16).float())


def test_float64_stays_float64() -> None:
    flow = toy_flow().double()
    context = flow.deep.start(1, GRID, 6, features=8)
    assert context.u.dtype == torch.float64
    assert flow(torch.zeros(1, 1, 4, 3, dtype=torch.float64), GRID).z.dtype == torch.float64
