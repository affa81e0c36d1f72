"""Packed actions to the features that the deep block and the denoiser add to their inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from worldmodel.files import require_at_least
from worldmodel.packed import Perceptron


@dataclass(frozen=True)
class ActionEncoderConfig:
    """packed: P, floats of a packed action (0: the world takes no actions). features: E. harmonics: Fourier features."""

    packed: int
    features: int = 64
    harmonics: int = 3

    def __post_init__(self) -> None:
        """Raises ConfigError for sizes that no model has."""
        require_at_least(1, self, "features")
        require_at_least(0, self, "packed", "harmonics")


@lru_cache(maxsize=16)
def _frequencies(harmonics: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return math.pi / 2 * torch.arange(1, harmonics + 1, device=device, dtype=dtype)


def _waves(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Sine and cosine; on a CPU by numpy, since torch wakes all its threads for a hundred numbers."""
    if angles.device.type != "cpu" or angles.dtype != torch.float32 or angles.requires_grad:
        return angles.sin(), angles.cos()
    values = angles.numpy()
    return torch.from_numpy(np.sin(values)), torch.from_numpy(np.cos(values))


class ActionEncoder(nn.Module):
    """(..., P) packed actions in [-1, 1] to (..., E) features; no action is the zero vector.

    Absent actions and an untrained (zero-initialised) projection add nothing, so a checkpoint without actions is
    unchanged until it is fine-tuned.
    """

    def __init__(self, config: ActionEncoderConfig) -> None:
        super().__init__()
        self.config = config
        inputs = config.packed * (1 + 2 * config.harmonics)
        self.layers = Perceptron(inputs, config.features, config.features)

    def forward(self, packed: Tensor, present: Tensor | None = None) -> Tensor:
        """packed (..., P) float, present (...,) bool (None: all are) to features (..., E)."""
        angles = (
            packed[..., None] * _frequencies(self.config.harmonics, packed.device, packed.dtype)
        ).flatten(-2)
        inputs = torch.cat((packed, *_waves(angles)), dim=-1)
        features: Tensor = self.layers(inputs)
        return features if present is None else features * present[..., None].to(packed.dtype)
