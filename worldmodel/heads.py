"""What is read off latent frames: reward and termination of two successive ones, and, in worlds that learned from
episodes worth imitating, the value of one and the action that good behaviour would take next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from worldmodel.errors import ConfigError, InputError
from worldmodel.files import require_at_least
from worldmodel.invariance import MATRIX_ROWS, with_rows


@dataclass(frozen=True)
class HeadsConfig:
    """latent_size: C * h * w of a latent frame. packed: P of a packed action. width: hidden units. discount: of the
    returns that the value foresees, a chunk; None for heads of reward and termination alone.
    """

    latent_size: int
    packed: int
    width: int = 192
    discount: float | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError for sizes that no model has."""
        require_at_least(1, self, "latent_size", "width")
        require_at_least(0, self, "packed")
        if self.discount is not None and not 0 < self.discount <= 1:
            raise ConfigError(f"HeadsConfig: discount is {self.discount}, expected (0, 1], or null")


class Outcome(NamedTuple):
    """reward (B,), summed over the chunk; termination (B,), a probability."""

    reward: Tensor
    termination: Tensor


class Ahead(NamedTuple):
    """value (B,): what the training episodes returned after such a latent, discounted, in units of reward. prior (B, P):
    the expected packed action of their better half: probabilities where it is one-hot, a mean in [-1, 1] for Box.
    """

    value: Tensor
    prior: Tensor


class Heads(nn.Module):
    """(previous latent, latent, action) to reward and termination; one latent, which holds the motion within its chunk,
    to value and prior where the configuration has a ``discount``.

    Reward and value are predicted standardised; their means and deviations are buffers fitted on the training data.
    """

    reward_mean: Tensor
    reward_std: Tensor
    value_mean: Tensor
    value_std: Tensor

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = _layers(2 * config.latent_size + config.packed, config.width, 2)
        self.register_buffer("reward_mean", torch.zeros(()))
        self.register_buffer("reward_std", torch.ones(()))
        self.ahead_layers: nn.Sequential | None = None
        if config.discount is not None:
            self.ahead_layers = _layers(config.latent_size, config.width, 1 + config.packed)
            self.register_buffer("value_mean", torch.zeros(()))
            self.register_buffer("value_std", torch.ones(()))

    def raw(self, previous: Tensor, latent: Tensor, packed: Tensor) -> Tensor:
        """Standardised reward and termination logit (B, 2), from latents (B, C, h, w) and packed actions (B, P)."""
        return self.layers(torch.cat((previous.flatten(1), latent.flatten(1), packed), dim=1))

    def forward(self, previous: Tensor, latent: Tensor, packed: Tensor) -> Outcome:
        """See `raw`; in the units of the environment's reward, and as a probability."""
        reward, logit = with_rows(MATRIX_ROWS, self.raw, previous, latent, packed).float().unbind(1)
        return Outcome(reward * self.reward_std + self.reward_mean, logit.sigmoid())

    def raw_ahead(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised value (B,) and the expected packed action (B, P), from latents (B, C, h, w).

        Raises:
            InputError: heads of reward and termination alone.
        """
        if self.ahead_layers is None:
            raise InputError("this world's heads foresee no value and no action; train them with a discount")
        both = self.ahead_layers(latent.flatten(1))
        return both[:, 0], both[:, 1:]

    @torch.no_grad()
    def ahead(self, latent: Tensor) -> Ahead:
        """See `Ahead`. Raises InputError as `raw_ahead`."""
        value, prior = (
            with_rows(
                MATRIX_ROWS,
                lambda x: torch.cat([y.reshape(len(x), -1) for y in self.raw_ahead(x)], dim=1),
                latent,
            )
            .float()
            .split((1, self.config.packed), dim=1)
        )
        return Ahead(value[:, 0] * self.value_std + self.value_mean, prior)


def _layers(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, outputs)
    )
