"""The affine map and the guidance algebra on their own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.flow.helpers import draw
from worldmodel.flow.affine import Affine, affine_from_head, guide, standard_normal_log_prob


def test_zero_head_is_the_identity_and_a_comes_first() -> None:
    affine = affine_from_head(torch.zeros(2, 3, 8, dtype=torch.float64), soft_clip=4.0)
    assert torch.equal(affine.mu, torch.zeros(2, 3, 4, dtype=torch.float64))
    assert torch.allclose(affine.sigma, torch.ones(2, 3, 4, dtype=torch.float64), atol=1e-15)
    head = torch.cat((torch.full((1, 4), 2.0), torch.full((1, 4), -1.0)), dim=-1).double()
    affine = affine_from_head(head, soft_clip=0.0)
    assert torch.equal(affine.mu, torch.full((1, 4), -1.0, dtype=torch.float64))
    assert affine.sigma[0, 0].item() == pytest.approx(math.log1p(math.exp(2.0 + 0.541324854612918)))


def test_soft_clip_bounds_both_halves() -> None:
    affine = affine_from_head(torch.full((1, 2), 1e6, dtype=torch.float64), soft_clip=4.0)
    assert affine.mu.item() == pytest.approx(4.0)
    assert affine.sigma.item() == pytest.approx(math.log1p(math.exp(4.541324854612918)))
    small = affine_from_head(torch.tensor([[0.5, 0.25]], dtype=torch.float64), soft_clip=4.0)
    assert small.mu.item() == pytest.approx(4.0 * math.tanh(0.25 / 4.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_heads_are_computed_in_float32(dtype: torch.dtype) -> None:
    affine = affine_from_head(torch.ones(1, 2, dtype=dtype), soft_clip=4.0)
    assert affine.mu.dtype == affine.sigma.dtype == torch.float32


def test_inverse_and_log_det_against_autograd() -> None:
    affine = Affine(draw(5), draw(5, seed=2).exp())
    v = draw(5, seed=3).requires_grad_()
    w = affine.forward(v)
    assert torch.allclose(affine.inverse(w), v, atol=1e-12)
    (gradient,) = torch.autograd.grad(w.sum(), v)
    assert torch.allclose(affine.log_det(), gradient.log(), atol=1e-12)


def test_standard_normal() -> None:
    z = draw(100)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z)
    assert torch.allclose(standard_normal_log_prob(z), expected, atol=1e-12)


def test_no_guidance_is_the_condition() -> None:
    cond, uncond = Affine(draw(9), draw(9, seed=2).exp()), Affine(draw(9, seed=3), draw(9, seed=4).exp())
    guided = guide(cond, uncond, 0.0)
    assert torch.equal(guided.mu, cond.mu) and torch.equal(guided.sigma, cond.sigma)


@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(0.05, 10), st.floats(0.05, 10), st.floats(0, 20))
@settings(max_examples=100, deadline=None)
def test_guidance_is_a_normalised_product_of_gaussians(
    mu_c: float, mu_u: float, sigma_c: float, sigma_u: float, w: float
) -> None:
    """guide = N_c^(1+w) / N_u'^w, normalised, with N_u' widened so that its precision never exceeds N_c's."""
    cond = Affine(*(torch.tensor(x, dtype=torch.float64) for x in (mu_c, sigma_c)))
    uncond = Affine(*(torch.tensor(x, dtype=torch.float64) for x in (mu_u, sigma_u)))
    guided = guide(cond, uncond, w)
    precision_c = sigma_c**-2
    precision_u = min(sigma_u**-2, precision_c)
    precision = (1 + w) * precision_c - w * precision_u
    mean = ((1 + w) * precision_c * mu_c - w * precision_u * mu_u) / precision
    assert guided.sigma.item() == pytest.approx(precision**-0.5, rel=1e-9)
    assert guided.mu.item() == pytest.approx(mean, rel=1e-9, abs=1e-9)
    assert guided.sigma.item() <= sigma_c * (1 + 1e-12)  # guidance never widens


def test_guiding_away_from_itself_changes_nothing() -> None:
    cond = Affine(draw(9), draw(9, seed=2).exp())
    guided = guide(cond, cond, 3.5)
    assert torch.allclose(guided.mu, cond.mu, atol=1e-12) and torch.allclose(guided.sigma, cond.sigma)
