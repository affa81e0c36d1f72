"""The density is a density: it integrates to 1, and samples follow it. Two-dimensional toy flows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.flow.helpers import draw, flow64
from worldmodel.flow.flow import Flow

PAST, BINS, REACH = 1, 120, 9.0
CASES = {
    # name: (channels of a token, tokens of the frame, blocks)
    "one token of two dimensions": (2, (1, 1), (1, 1)),
    "two tokens of one dimension": (1, (1, 2), (1, 1, 1)),
}


def toy(name: str, guided: bool = False) -> tuple[Flow, tuple[int, int], Tensor, Tensor]:
    """A flow over a frame of two numbers, conditional on one past frame and an action."""
    channels, grid, layers = CASES[name]
    flow = flow64(seed=4, in_channels=channels, layers_per_block=layers)
    tokens = grid[0] * grid[1]
    return flow, grid, draw(1, PAST, tokens, channels, seed=8), draw(1, PAST + 1, 3, seed=9)


def density_on_a_grid(
    flow: Flow, grid: tuple[int, int], past: Tensor, features: Tensor
) -> tuple[Tensor, Tensor]:
    """Density of the second frame given the first: (BINS, BINS) at cell centres, and the centres (BINS,)."""
    step = 2 * REACH / BINS
    centres = -REACH + step * (torch.arange(BINS, dtype=torch.float64) + 0.5)
    points = torch.cartesian_prod(centres, centres)
    frame = points.reshape(-1, 1, *past.shape[2:])
    x = torch.cat((past.expand(len(frame), -1, -1, -1), frame), dim=1)
    with torch.no_grad():
        log_prob = torch.cat(
            [
                flow(part, grid, None, features.expand(len(part), -1, -1)).log_prob[:, -1]
                for part in x.split(8000)
            ]
        )
    return log_prob.exp().reshape(BINS, BINS), centres


@pytest.mark.parametrize("name", CASES)
def test_integrates_to_one(name: str) -> None:
    density, centres = density_on_a_grid(*toy(name))
    cell = (centres[1] - centres[0]).item() ** 2
    assert density.sum().item() * cell == pytest.approx(1.0, abs=0.01)
    # the grid holds it (nothing at the border), and it is not the prior
    assert density[0].max() < 1e-6 and density[:, -1].max() < 1e-6
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(centres).exp()
    assert (density - prior[:, None] * prior[None]).abs().sum().item() * cell > 0.05


@pytest.mark.parametrize("name", CASES)
def test_the_condition_moves_the_density(name: str) -> None:
    flow, grid, past, features = toy(name)
    first, _ = density_on_a_grid(flow, grid, past, features)
    other_action = torch.cat((features[:, :1], -features[:, 1:]), dim=1)
    second, centres = density_on_a_grid(flow, grid, past, other_action)
    third, _ = density_on_a_grid(flow, grid, -past, features)
    cell = (centres[1] - centres[0]).item() ** 2
    for other in (second, third):
        assert other.sum().item() * cell == pytest.approx(1.0, abs=0.01)
        assert (first - other).abs().sum().item() * cell > 0.01


@pytest.mark.parametrize("name", CASES)
def test_samples_agree_with_the_density(name: str) -> None:
    """Chi-square of a 2-D histogram of samples against the density integrated over its cells."""
    flow, grid, past, features = toy(name)
    count = 20000
    noise = draw(count, PAST + 1, *past.shape[2:], seed=11)
    rows = (features.expand(count, -1, -1), past.expand(count, -1, -1, -1))
    samples = flow.sample(noise, grid, features=rows[0], given=rows[1])[:, -1].reshape(count, 2)
    density, centres = density_on_a_grid(flow, grid, past, features)
    edge = BINS // 10  # coarse cells of 12 x 12 fine ones: 10 x 10 in all
    cell = (centres[1] - centres[0]).item() ** 2
    expected = density.reshape(BINS // edge, edge, BINS // edge, edge).sum((1, 3)) * cell * count
    index = ((samples + REACH) / (2 * REACH) * (BINS // edge)).long().clamp(0, BINS // edge - 1)
    observed = torch.zeros_like(expected)
    observed.index_put_((index[:, 0], index[:, 1]), torch.ones(count, dtype=torch.float64), accumulate=True)
    filled = expected > 5
    assert filled.sum() >= 8
    chi_square = ((observed - expected)[filled].square() / expected[filled]).sum().item()
    degrees = int(filled.sum()) - 1
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5  # five standard deviations
    # and the mean log-density of samples is minus the entropy on the grid
    x = torch.cat((rows[1], samples.reshape(count, 1, *past.shape[2:])), dim=1)
    with torch.no_grad():
        mean = flow(x, grid, None, rows[0]).log_prob[:, -1].mean().item()
    entropy = -(density * density.clamp_min(1e-300).log()).sum().item() * cell
    assert mean == pytest.approx(-entropy, abs=0.05)
