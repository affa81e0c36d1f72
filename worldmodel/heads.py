"""Reward and termination read off two successive latent frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from worldmodel.files import require_at_least
from worldmodel.invariance import MATRIX_ROWS, with_rows


@dataclass(frozen=True)
class HeadsConfig:
    """latent_size: C * h * w of a latent frame. packed: P of a packed action. width: hidden units."""

    latent_size: int
    packed: int
    width: int = 192

    def __post_init__(self) -> None:
        """Raises ConfigError for sizes that no model has."""
        require_at_least(1, self, "latent_size", "width")
        require_at_least(0, self, "packed")


class Outcome(NamedTuple):
    """reward (B,), summed over the chunk; termination (B,), a probability."""

    reward: Tensor
    termination: Tensor


class Heads(nn.Module):
    """(previous latent, latent, action) to reward and termination.

    Reward is predicted standardised; ``reward_mean`` and ``reward_std`` are buffers fitted on the training data.
    """

    reward_mean: Tensor
    reward_std: Tensor

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        self.config = config
        inputs = 2 * config.latent_size + config.packed
        self.layers = nn.Sequential(
            nn.Linear(inputs, config.width),
            nn.SiLU(),
            nn.Linear(config.width, config.width),
            nn.SiLU(),
            nn.Linear(config.width, 2),
        )
        self.register_buffer("reward_mean", torch.zeros(()))
        self.register_buffer("reward_std", torch.ones(()))

    def raw(self, previous: Tensor, latent: Tensor, packed: Tensor) -> Tensor:
        """Standardised reward and termination logit (B, 2), from latents (B, C, h, w) and packed actions (B, P)."""
        return self.layers(torch.cat((previous.flatten(1), latent.flatten(1), packed), dim=1))

    def forward(self, previous: Tensor, latent: Tensor, packed: Tensor) -> Outcome:
        """See `raw`; in the units of the environment's reward, and as a probability."""
        reward, logit = with_rows(MATRIX_ROWS, self.raw, previous, latent, packed).float().unbind(1)
        return Outcome(reward * self.reward_std + self.reward_mean, logit.sigmoid())
