"""The solver: exact from the front, each sequence for itself, and a tolerance that means what it says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.flow.helpers import GRID, draw, flow64
from worldmodel.flow.affine import Affine
from worldmodel.flow.jacobi import jacobi, sequential

TOKENS, DIM = 4, 2
FLOW = flow64(seed=7)


def parameters(v: Tensor) -> Affine:
    """A block's own parameters of one frame."""
    return FLOW.shallow[0].frame_parameters(v, GRID)


def chain(v: Tensor) -> Affine:
    """``mu_i`` is the running sum of what came before, sigma 1: converges in exactly N sweeps, at any N."""
    return Affine(torch.cumsum(v, dim=1) - v, torch.ones_like(v))


@pytest.mark.parametrize("source", ["block", "chain"])
def test_after_k_sweeps_the_first_k_tokens_are_exact(source: str) -> None:
    given = parameters if source == "block" else chain
    w = draw(3, TOKENS, DIM)
    exact = sequential(given, w)
    v = draw(3, TOKENS, DIM, seed=2)  # any start
    for k in range(1, TOKENS + 1):
        v = given(v).inverse(w)
        assert torch.allclose(v[:, :k], exact[:, :k], atol=1e-12)
        if source == "chain" and k < TOKENS:
            assert (v[:, k:] - exact[:, k:]).abs().max() > 1e-3
    assert torch.allclose(given(exact).inverse(w), exact, atol=1e-12)


def test_tolerance_zero_runs_every_sweep_and_is_exact() -> None:
    w = draw(3, TOKENS, DIM)
    solution = jacobi(chain, w, torch.zeros_like(w), tolerance=0.0)
    assert solution.sweeps.tolist() == [TOKENS] * 3
    assert torch.allclose(solution.v, sequential(chain, w), atol=1e-12)


def test_the_residual_is_the_relative_mean_square_of_the_last_update() -> None:
    w, start = draw(2, TOKENS, DIM), draw(2, TOKENS, DIM, seed=2)
    tolerance = 1e-2
    solution = jacobi(parameters, w, start, tolerance)
    for row in range(2):
        v, own = start[row : row + 1], w[row : row + 1]
        sweeps = 0
        while True:
            update = parameters(v).inverse(own)
            change = ((update - v).square().mean() / update.square().mean()).item()
            v, sweeps = update, sweeps + 1
            if change < tolerance or sweeps == TOKENS:
                break
        assert sweeps == solution.sweeps[row]
        assert change == pytest.approx(solution.residual[row].item(), rel=1e-6)
        assert torch.allclose(v[0], solution.v[row], atol=1e-12)


def test_a_start_at_the_solution_takes_one_sweep() -> None:
    w = draw(2, TOKENS, DIM)
    exact = sequential(parameters, w)
    solution = jacobi(parameters, w, exact, tolerance=1e-12)
    assert solution.sweeps.tolist() == [1, 1]
    assert (solution.residual < 1e-12).all()


def test_looser_tolerances_never_take_more_sweeps_and_bound_the_error() -> None:
    w = draw(4, TOKENS, DIM)
    exact = sequential(parameters, w)
    before = None
    for tolerance in (0.0, 1e-8, 1e-4, 1e-2, 1e9):
        solution = jacobi(parameters, w, w, tolerance)
        error = ((solution.v - exact).square().mean((1, 2)) / exact.square().mean((1, 2))).max()
        assert error <= max(10 * tolerance, 1e-24)
        if before is not None:
            assert (solution.sweeps <= before).all()
        before = solution.sweeps
    assert before.tolist() == [1] * 4


def test_a_neighbour_changes_nothing() -> None:
    """An easy row stops early; a hard one beside it neither delays nor alters it."""
    w = draw(3, TOKENS, DIM)
    start = draw(3, TOKENS, DIM, seed=2)
    start[0] = sequential(parameters, w)[0]  # row 0 is already solved
    together = jacobi(parameters, w, start, 1e-6)
    assert together.sweeps[0] == 1 < together.sweeps[1]
    for row in range(3):
        one = slice(row, row + 1)
        alone = jacobi(parameters, w[one], start[one], 1e-6)
        assert alone.sweeps[0] == together.sweeps[row]
        assert torch.allclose(alone.v[0], together.v[row], rtol=0, atol=1e-14)
        assert alone.residual[0].item() == pytest.approx(together.residual[row].item(), rel=1e-6)
    # a row that has stopped is frozen, not refined by the sweeps its neighbours still need
    crude = jacobi(parameters, w, start, 0.5)
    hard = torch.cat((w, 1e3 * w[:1]))
    beside = jacobi(parameters, hard, torch.cat((start, -1e3 * start[:1])), 0.5)
    assert torch.equal(crude.sweeps, beside.sweeps[:3])
    assert torch.allclose(crude.v, beside.v[:3], rtol=0, atol=1e-14)


def test_the_start_is_not_written_to() -> None:
    w, start = draw(2, TOKENS, DIM), draw(2, TOKENS, DIM, seed=2)
    kept_w, kept_start = w.clone(), start.clone()
    jacobi(parameters, w, start, 1e-6)
    sequential(parameters, w)
    assert torch.equal(w, kept_w) and torch.equal(start, kept_start)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("frames", [1, 6])
def test_a_batch_of_clips_equals_each_alone(frames: int, exact: bool) -> None:
    """The whole sampler, past the window too."""
    noise, features = draw(3, frames, TOKENS, DIM), draw(3, frames, 3, seed=3)
    together = FLOW.sample(noise, GRID, features=features, tolerance=1e-3, exact=exact)
    for row in range(3):
        one = slice(row, row + 1)
        alone = FLOW.sample(noise[one], GRID, features=features[one], tolerance=1e-3, exact=exact)
        assert torch.allclose(alone[0], together[row], rtol=0, atol=1e-12)
