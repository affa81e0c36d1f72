"""Tokens, orders and positions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.flow.helpers import draw, flow64
from worldmodel.errors import ConfigError, InputError
from worldmodel.flow.flow import FlowConfig
from worldmodel.flow.order import flips, patchify, reorder, unpatchify
from worldmodel.flow.rope import frame_rotary, text_rotary

CPU = torch.device("cpu")


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_patchify_and_back(frames: int, channels: int, height: int, width: int, patch: int) -> None:
    x = draw(2, frames, channels, height * patch, width * patch)
    tokens = patchify(x, patch)
    assert tokens.shape == (2, frames, height * width, patch * patch * channels)
    assert torch.equal(unpatchify(tokens, patch, (height, width)), x)


def test_channel_order_of_a_token() -> None:
    """(p1 p2 c): channels run fastest, then columns, then rows of the patch; tokens in raster order."""
    x = torch.arange(2 * 4 * 4, dtype=torch.float32).reshape(1, 1, 2, 4, 4)
    tokens = patchify(x, 2)[0, 0]
    assert tokens[0].tolist() == [0, 16, 1, 17, 4, 20, 5, 21]
    assert tokens[1][0] == 2 and tokens[2][0] == 8


@pytest.mark.parametrize(
    ("blocks", "expected"), [(6, "101010"), (4, "1010"), (3, "101"), (2, "10"), (1, "1")]
)
def test_which_blocks_are_flipped(blocks: int, expected: str) -> None:
    assert "".join(str(int(flip)) for flip in flips(blocks)) == expected


def test_reorder_is_its_own_inverse_and_keeps_frames() -> None:
    x = draw(2, 3, 4, 5)
    assert torch.equal(reorder(reorder(x, True), True), x)
    assert torch.equal(reorder(x, True)[:, 1, 0], x[:, 1, 3])
    assert reorder(x, False) is x


def test_angles_of_the_facts_page() -> None:
    head, scale, grid = 32, 5.0, (3, 4)
    table = frame_rotary(grid, 2, 2, scale, head, CPU)
    assert table.cos.shape == (2 * 12, head) and table.cos.dtype == torch.float32
    row, column, third = 1, 3, 3  # in the second of the two frames, whose first is frame 2
    spatial = head // 2 - 8
    unit = scale / math.sqrt(12)
    space = [10000.0 ** (-2 * k / spatial) for k in range(spatial // 2)]
    time = [10000.0 ** (-k / 8) for k in range(8)]
    angles = [row * unit * f for f in space] + [column * unit * f for f in space] + [third * f for f in time]
    expected = torch.tensor([a for a in angles for _ in range(2)], dtype=torch.float64)
    index = 12 + row * 4 + column
    assert (table.cos[index] - expected.cos()).abs().max() < 1e-6
    assert (table.sin[index] - expected.sin()).abs().max() < 1e-6


def test_text_positions() -> None:
    head, scale = 32, 6.0
    table = text_rotary(4, 5, scale, head, CPU)
    assert (table.cos[:, : head - 16] == 1).all() and (table.sin[:, : head - 16] == 0).all()
    expected = torch.tensor(5 + 3 / 4 * scale, dtype=torch.float64)
    assert table.cos[3, head - 16].item() == pytest.approx(math.cos(expected), abs=1e-6)


def test_a_grid_that_does_not_divide() -> None:
    with pytest.raises(InputError, match=r"\(3, 4\) does not divide by patch_size 2"):
        flow64(patch_size=2).grid((3, 4))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layers_per_block", ()),
        ("head_dim", 12),
        ("head_dim", 18),
        ("channels", 24),
        ("top_channels", 24),
        ("noise_std", 0.0),
        ("context", 0),
        ("context", 21),
        ("text_tokens", 3),
    ],
)
def test_what_cannot_be_built(field: str, value: object) -> None:
    values = {
        "in_channels": 2,
        "channels": 32,
        "top_channels": 32,
        "layers_per_block": (1, 1),
        "head_dim": 16,
    }
    FlowConfig(**values)
    name = "text_dim" if field == "text_tokens" else field
    with pytest.raises(ConfigError, match=name) as error:
        FlowConfig(**{**values, field: value})
    assert "\n" not in str(error.value)
