"""The action encoder: no action is the zero vector, and different actions are told apart."""

from __future__ import annotations

import torch

from worldmodel.condition.actions import ActionEncoder, ActionEncoderConfig


def encoder(packed: int = 2) -> ActionEncoder:
    torch.manual_seed(0)
    return ActionEncoder(ActionEncoderConfig(packed, features=16, harmonics=3)).requires_grad_(False)


def test_no_action_is_zero_and_rows_are_their_own() -> None:
    actions = torch.rand(4, 3, 2) * 2 - 1
    present = torch.tensor([[True, False, True]] * 4)
    features = encoder()(actions, present)
    assert features.shape == (4, 3, 16)
    assert not features[:, 1].any() and features[:, 0].abs().sum() > 0
    alone = encoder()(actions[2:3, 2:3], present[:1, 2:3])
    assert torch.allclose(alone[0, 0], features[2, 2], atol=1e-6)


def test_the_ends_of_the_range_are_told_apart() -> None:
    values = torch.linspace(-1, 1, 21)[:, None]
    features = encoder(1)(values, torch.ones(21, dtype=torch.bool))
    distance = torch.cdist(features, features) + 10 * torch.eye(21)
    assert distance.min() > 1e-3
