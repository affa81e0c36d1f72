from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces

from tests.toy import toy_world
from worldmodel import InputError, WorldModel
from worldmodel.errors import ConfigError
from worldmodel.heads import Heads, HeadsConfig


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> WorldModel:
    return toy_world(tmp_path_factory.mktemp("ahead") / "toy", spaces.Discrete(3, start=1), discount=0.9)


def test_a_world_brings_its_value_and_prior(world: WorldModel) -> None:
    assert world.heads is not None
    state, _ = world.reset([0, 1])
    value, prior = world.heads.ahead(state.latent)
    assert value.shape == (2,) and prior.shape == (2, 3)
    assert not value.requires_grad
    alone = world.heads.ahead(state.latent[1:])
    torch.testing.assert_close(alone.value, value[1:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alone.prior, prior[1:], rtol=1e-5, atol=1e-6)


def test_value_is_in_units_of_reward() -> None:
    torch.manual_seed(0)
    heads = Heads(HeadsConfig(8, 2, 4, discount=1.0))
    latent = torch.randn(3, 2, 2, 2)
    raw, _ = heads.raw_ahead(latent)
    heads.value_mean.fill_(-5.0)
    heads.value_std.fill_(10.0)
    torch.testing.assert_close(heads.ahead(latent).value, raw.detach() * 10.0 - 5.0)


def test_heads_without_a_discount_are_what_they_were(tmp_path: Path) -> None:
    """Same weights by name, so that worlds made before load strictly; what they lack is refused."""
    world = toy_world(tmp_path / "plain")
    assert world.heads is not None
    names = {f"layers.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    assert set(world.heads.state_dict()) == names | {"reward_mean", "reward_std"}
    state, _ = world.reset([0])
    with pytest.raises(InputError, match="train them with a discount"):
        world.heads.ahead(state.latent)


def test_a_discount_is_a_share() -> None:
    for bad in (0.0, 1.5, float(np.nan)):
        with pytest.raises(ConfigError, match="discount"):
            HeadsConfig(8, 2, discount=bad)
