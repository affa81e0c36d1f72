"""Noise is a function of (seed, branch, step, stream, draw) and of nothing else."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worldmodel.errors import InputError
from worldmodel.noise import OBSERVE, SAMPLE, SCORE, child_branch, normal, seed_tensor

SHAPE = (3, 4, 4)
FROZEN = [
    [0.059911035001277924, 0.015559634193778038, -1.1644384860992432],
    [-0.30480343103408813, 0.9908866882324219, 0.08261093497276306],
    [0, 2794019225575547101, 513494699112078748],
]


def column(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def one(seed: int, branch: int, step: int, stream: int = SAMPLE, draw: int = 0) -> torch.Tensor:
    return normal(column(seed), column(branch), column(step), stream, SHAPE, draw)[0]


def test_frozen_values() -> None:
    """Pinned: a change of these numbers changes every saved session's future."""
    assert SAMPLE == 0 and OBSERVE == 1 and SCORE == 2
    assert one(0, 0, 0).flatten()[:3].tolist() == FROZEN[0]
    assert one(123, 7, 41, SCORE, 3).flatten()[:3].tolist() == FROZEN[1]
    assert [child_branch(0, 5, 0), child_branch(0, 0, 1), child_branch(9, 4, 2)] == FROZEN[2]


def test_each_coordinate_matters() -> None:
    keys = list(itertools.product((0, 1, 2**40), (0, 3), (0, 1), (SAMPLE, OBSERVE, SCORE), (0, 1)))
    draws = [one(*key) for key in keys]
    assert len({tuple(d.flatten().tolist()) for d in draws}) == len(keys)
    # and they are not shifted copies of each other either
    stacked = torch.stack(draws).flatten(1)
    correlation = torch.corrcoef(stacked) - torch.eye(len(keys))
    assert correlation.abs().max() < 0.65  # 48 numbers each: 4.5 standard deviations


@given(
    st.lists(
        st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**62), st.integers(0, 10**6)), max_size=5
    )
)
@settings(max_examples=30, deadline=None)
def test_a_row_does_not_depend_on_its_batch(rows: list[tuple[int, int, int]]) -> None:
    batch = normal(*(column(*(row[i] for row in rows)) for i in range(3)), OBSERVE, SHAPE)
    assert batch.shape == (len(rows), *SHAPE) and batch.dtype == torch.float32
    for got, row in zip(batch, rows, strict=True):
        assert torch.equal(got, one(*row, stream=OBSERVE))


def test_it_is_standard_normal() -> None:
    x = normal(column(*range(500)), column(*[0] * 500), column(*[0] * 500), SAMPLE, (8, 4, 4)).flatten()
    assert abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02
    assert abs((x**3).mean()) < 0.06 and abs((x**4).mean() - 3) < 0.15


def test_global_generators_are_not_touched() -> None:
    torch_state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    first = one(5, 0, 0)
    torch.manual_seed(99)
    np.random.seed(99)
    assert torch.equal(first, one(5, 0, 0))
    torch.random.set_rng_state(torch_state)
    one(5, 0, 1)
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert numpy_state.shape == np.random.get_state()[1].shape


def test_children_of_forks() -> None:
    """Child 0 is its parent; every other child of every fork has a branch of its own."""
    assert child_branch(17, 3, 0) == 17
    made = [
        child_branch(branch, forks, child)
        for branch, forks, child in itertools.product(range(20), range(20), range(1, 20))
    ]
    assert len(set(made)) == len(made) == 20 * 19 * 20
    assert all(0 <= b < 2**63 for b in made)


@pytest.mark.parametrize("seed", [-1, 1 << 63])
def test_seeds_out_of_range_are_one_line(seed: int) -> None:
    with pytest.raises(InputError, match="out of range"):
        seed_tensor([0, seed])
    assert seed_tensor([0, (1 << 63) - 1]).tolist() == [0, (1 << 63) - 1]
