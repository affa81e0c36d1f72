"""Rows that do not depend on their batch."""

from __future__ import annotations

import pytest
import torch

from tests.invariance import products_round_alike
from worldmodel.codec.conv import ConvCodec, ConvCodecConfig, channels_last
from worldmodel.condition.actions import ActionEncoder, ActionEncoderConfig
from worldmodel.invariance import MATRIX_ROWS, with_rows
from worldmodel.packed import pack

COUNTS = (1, 2, 3, 5, 9)


@pytest.mark.parametrize("count", COUNTS)
def test_keeps_rows_and_order(count: int) -> None:
    x = torch.arange(count * 2.0).reshape(count, 2)
    assert torch.equal(with_rows(MATRIX_ROWS, lambda a, b: a + b, x, x), 2 * x)


def test_never_computes_on_fewer_rows() -> None:
    seen: list[int] = []
    with_rows(4, lambda x: seen.append(len(x)) or x, torch.zeros(1, 3))
    with_rows(4, lambda x: seen.append(len(x)) or x, torch.zeros(6, 3))
    assert seen == [4, 6]


@pytest.mark.skipif(
    not products_round_alike(), reason="this processor's kernels round differently by batch size"
)
@pytest.mark.parametrize("count", COUNTS)
def test_codec_and_action_encoder_give_a_row_what_they_give_it_in_any_batch(count: int) -> None:
    torch.manual_seed(0)
    codec = channels_last(ConvCodec(ConvCodecConfig(widths=(16, 24, 32)))).requires_grad_(False)
    encoder = ActionEncoder(ActionEncoderConfig(3)).requires_grad_(False)
    for module in (codec, encoder):
        pack(module)  # as `WorldModel.load` does
    frames = torch.randint(0, 256, (16, 4, 64, 64, 3), dtype=torch.uint8)
    latents, _ = codec.encode(frames, {})
    assert torch.equal(codec.encode(frames[:count], {})[0], latents[:count])
    assert torch.equal(codec.decode(latents[:count], {})[0], codec.decode(latents, {})[0][:count])
    packed, present = torch.randn(16, 3), torch.ones(16, dtype=torch.bool)
    rows = with_rows(MATRIX_ROWS, encoder, packed[:count], present[:count])
    assert torch.equal(rows, encoder(packed, present)[:count])
