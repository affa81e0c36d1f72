"""The denoiser: who sees whom, the sign and scale of its step, and batches of unequal length. Float64."""

from __future__ import annotations

import pytest
import torch

from tests.flow.helpers import GRID, draw, flow64, jacobian
from worldmodel.flow.denoiser import frame_mask

TOKENS, DIM, FRAMES = 4, 2, 6


@pytest.mark.parametrize(("ahead", "window"), [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_frames_that_influence_a_frame(ahead: int, window: int) -> None:
    """One layer: frame n sees n + A - 1 - window .. n + A - 1, and itself through the residual."""
    flow = flow64(seed=3, denoiser_look_ahead=ahead, denoiser_window=window, denoiser_layers=1)
    size = TOKENS * DIM
    x = draw(1, FRAMES, TOKENS, DIM)
    matrix = jacobian(lambda v: flow.denoise(v, GRID), x).reshape(FRAMES, size, FRAMES, size)
    seen = (matrix != 0).any(3).any(1)
    for n in range(FRAMES):
        newest = n + ahead - 1
        expected = {m for m in range(FRAMES) if newest - window <= m <= newest} | {n}
        assert set(torch.nonzero(seen[n]).flatten().tolist()) == expected


def test_prompt_rows_see_the_prompt_and_the_first_frames() -> None:
    mask = frame_mask(3, 2, 2, 2, 1, torch.device("cpu"))
    assert mask[:2].tolist() == [[True, True, True, True, True, True, False, False]] * 2
    assert mask[2:, :2].all()


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_reach_is_the_frames_that_matter_to_the_newest(layers: int) -> None:
    """A session needs to keep only ``reach`` noisy frames."""
    flow = flow64(seed=3, denoiser_look_ahead=1, denoiser_window=1, denoiser_layers=layers)
    x, reach = draw(1, FRAMES, TOKENS, DIM), flow.denoiser.reach
    newest = flow.denoise(x, GRID)[:, -1]
    assert reach == 1 + layers
    kept = flow.denoise(x[:, -reach:], GRID)[:, -1]
    assert (newest - kept).abs().max() < 1e-5  # positions move by a constant; the tables are float32
    short = flow.denoise(x[:, -reach + 1 :], GRID)[:, -1]
    assert (newest - short).abs().max() > 10 * (newest - kept).abs().max()


def test_the_step_is_minus_0_3_times_the_score() -> None:
    flow = flow64(seed=3)
    x = draw(1, FRAMES, TOKENS, DIM)
    score = flow.denoiser.score(x, GRID, None, None)
    assert score.abs().max() > 0.01
    assert torch.equal(flow.denoise(x, GRID), x - 0.3 * score)


def test_right_aligned_batches_ignore_what_is_not_there() -> None:
    flow = flow64(seed=3, denoiser_look_ahead=1, denoiser_window=2, denoiser_layers=2)
    x, features = draw(3, 4, TOKENS, DIM), draw(3, 4, 3, seed=2)
    lengths = [4, 2, 1]
    valid = torch.tensor([[t >= 4 - n for t in range(4)] for n in lengths])
    garbage = torch.where(valid[..., None, None], x, torch.full_like(x, 1e3))
    together = flow.denoise(garbage, GRID, None, features, valid)[:, -1]
    for row, n in enumerate(lengths):
        one = slice(row, row + 1)
        alone = flow.denoise(x[one, -n:], GRID, None, features[one, -n:])[:, -1]
        assert (alone[0] - together[row]).abs().max() < 1e-5


def test_actions_reach_the_denoiser_at_their_own_frame() -> None:
    flow = flow64(seed=3, denoiser_look_ahead=1, denoiser_window=1, denoiser_layers=1)
    x, features = draw(1, FRAMES, TOKENS, DIM), draw(1, FRAMES, 3, seed=2)
    changed = features.clone()
    changed[:, 3] += 1.0
    moved = (flow.denoise(x, GRID, None, features) != flow.denoise(x, GRID, None, changed)).any(-1).any(-1)
    assert moved[0].tolist() == [False, False, False, True, True, False]


@pytest.mark.parametrize(("ahead", "window"), [(1, 0), (1, 1), (1, 2), (2, 1), (2, 3), (3, 1)])
@pytest.mark.parametrize("layers", [1, 3])
def test_the_newest_frame_alone_is_the_last_of_all(ahead: int, window: int, layers: int) -> None:
    flow = flow64(seed=3, denoiser_look_ahead=ahead, denoiser_window=window, denoiser_layers=layers)
    x, features = draw(2, FRAMES, TOKENS, DIM), draw(2, FRAMES, 3, seed=2)
    valid = torch.tensor([[True] * FRAMES, [False] * 4 + [True] * (FRAMES - 4)])
    for mask in (None, valid):
        every = flow.denoise(x, GRID, None, features, mask)[:, -1:]
        assert (flow.denoise_newest(x, GRID, None, features, mask) - every).abs().max() < 1e-6


def test_the_newest_frame_alone_sees_the_prompt_as_in_the_clip() -> None:
    flow = flow64(
        seed=3, text_tokens=3, text_dim=5, denoiser_look_ahead=2, denoiser_window=2, denoiser_layers=3
    )
    x, text = draw(2, FRAMES, TOKENS, DIM), draw(2, 3, 5, seed=4)
    every = flow.denoise(x, GRID, text)[:, -1:]
    assert (flow.denoise_newest(x, GRID, text) - every).abs().max() < 1e-6
    assert (flow.denoise(x, GRID, -text)[:, -1:] - every).abs().max() > 1e-4
