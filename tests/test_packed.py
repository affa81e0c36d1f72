"""Packed weights: the same maps, rows that do not depend on their batch, and torch's own functions where they must."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from worldmodel.packed import Conv2d, Linear, PointConv2d, is_packed, multiplies_halves, pack

COUNTS = (1, 2, 3, 4, 7, 33, 128)
packs = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch cannot pack")


def network(halves: bool = False) -> nn.ModuleDict:
    """``halves``: its weights are float16 numbers, as those of the worlds that ship."""
    torch.manual_seed(0)
    parts = {
        "linear": nn.Linear(24, 48),
        "bare": nn.Linear(24, 24, bias=False),
        "conv": nn.Conv2d(8, 16, 3, padding=1),
        "point": PointConv2d(8, 24),
    }
    net = nn.ModuleDict(parts).requires_grad_(False)
    for weight in net.parameters() if halves else ():
        weight.copy_(weight.half())
    return net


@packs
@pytest.mark.parametrize("halves", [False, True])
def test_packing_keeps_the_maps_and_the_names(halves: bool) -> None:
    plain, packed = network(halves), network(halves)
    pack(packed)
    assert not is_packed(plain) and is_packed(packed)
    assert list(packed.state_dict()) == list(plain.state_dict())
    x, pictures = torch.randn(5, 3, 24), torch.randn(3, 8, 6, 6)
    for name in ("linear", "bare"):
        assert torch.allclose(packed[name](x), plain[name](x), atol=1e-5)
        residual = torch.randn(5, 3, plain[name].out_features)
        assert torch.allclose(packed[name].plus(x, residual), residual + plain[name](x), atol=1e-5)
        assert torch.allclose(packed[name].gelu(x), F.gelu(plain[name](x)), atol=1e-5)
    for name in ("conv", "point"):
        assert torch.allclose(packed[name](pictures), plain[name](pictures), atol=1e-5)


def test_only_numbers_of_float16_are_multiplied_in_it() -> None:
    for halves in (False, True):
        linear = network(halves)["linear"]
        pack(linear)
        x = torch.randn(3, 24)
        y = linear(x)
        assert linear._half == (halves and multiplies_halves())
        assert torch.allclose(
            y, F.linear(x.double(), linear.weight.double(), linear.bias.double()).float(), atol=1e-6
        )


@packs
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("count", COUNTS)
def test_a_row_is_the_same_in_any_batch(count: int, halves: bool) -> None:
    parts = network(halves)
    pack(parts)
    torch.manual_seed(1)
    x, pictures = torch.randn(200, 24), torch.randn(128, 8, 6, 6)
    residual = torch.randn(200, 48)
    assert torch.equal(parts["linear"](x[:count]), parts["linear"](x)[:count])
    assert torch.equal(parts["linear"].gelu(x[:count]), parts["linear"].gelu(x)[:count])
    every = parts["linear"].plus(x, residual)[:count]
    assert torch.equal(parts["linear"].plus(x[:count], residual[:count]), every)
    for name in ("conv", "point"):
        assert torch.equal(parts[name](pictures[:count]), parts[name](pictures)[:count])


@packs
def test_copies_pack_again_and_casts_unpack() -> None:
    parts = network()
    pack(parts)
    x = torch.randn(3, 24)
    y = parts["linear"](x)
    twin = copy.deepcopy(parts)
    assert is_packed(twin) and torch.equal(twin["linear"](x), y)
    twin.double()
    assert not is_packed(twin)
    assert torch.allclose(twin["linear"](x.double()), y.double(), atol=1e-5)


def test_gradients_flow_through_what_is_packed() -> None:
    linear, point, conv = Linear(4, 4).requires_grad_(False), PointConv2d(4, 2), Conv2d(4, 2, 3)
    for part, shape in ((linear, (2, 4)), (point, (1, 4, 5, 5)), (conv, (1, 4, 5, 5))):
        part.requires_grad_(False)
        pack(part)
        x = torch.randn(shape, requires_grad=True)
        part(x).sum().backward()
        assert x.grad is not None and x.grad.abs().sum() > 0


def test_trained_weights_are_not_packed() -> None:
    linear = Linear(4, 4)
    pack(linear)
    assert not is_packed(linear)
    x = torch.randn(3, 4)
    before = linear(x)
    with torch.no_grad():
        linear.weight.add_(1.0)
    assert not torch.equal(linear(x), before)
