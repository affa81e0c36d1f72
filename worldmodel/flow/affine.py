"""The pure affine map of the flow, and the guidance algebra on it.

Every block is one affine autoregressive map (TarFlow, arXiv 2412.06329, eq. 2-4): the network yields the parameters,
this file inverts. Nothing here knows a network, a position or a cache.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SOFTPLUS_SHIFT = math.log(math.e - 1.0)
"""softplus(SOFTPLUS_SHIFT) = 1: a zero-initialised head is the identity map."""

LOG_2PI = math.log(2.0 * math.pi)


class Affine(NamedTuple):
    """Elementwise affine map ``v = mu + sigma * w``; both tensors share one shape (..., D), ``sigma > 0``."""

    mu: Tensor
    sigma: Tensor

    def forward(self, v: Tensor) -> Tensor:
        """Data to noise: ``w = (v - mu) / sigma``."""
        return (v - self.mu) / self.sigma

    def inverse(self, w: Tensor) -> Tensor:
        """Noise to data: ``v = mu + sigma * w``."""
        return self.mu + self.sigma * w

    def log_det(self) -> Tensor:
        """Elementwise ``log |dw/dv| = -log sigma`` in nats."""
        return -torch.log(self.sigma)


def affine_from_head(o: Tensor, soft_clip: float) -> Affine:
    """Split a head's output (..., 2 D) into ``a`` then ``mu``; ``sigma = softplus(a + shift)`` is 1 at ``a = 0``.

    ``soft_clip`` c > 0 replaces ``o`` by ``c tanh(o / c)``; 0 switches it off. Computed in at least float32.
    """
    o = o.float() if o.dtype in (torch.bfloat16, torch.float16) else o
    if soft_clip > 0:
        o = soft_clip * torch.tanh(o / soft_clip)
    a, mu = o.chunk(2, dim=-1)
    return Affine(mu, F.softplus(a + SOFTPLUS_SHIFT))


def guide(cond: Affine, uncond: Affine, guidance: float) -> Affine:
    """Classifier-free guidance of two affine maps (STARFlow, arXiv 2506.06276, sec. 3.4), elementwise.

    The result is again affine, so the guided sampler has an exact density of its own. ``guidance = 0`` returns ``cond``.
    """
    s = torch.clamp(cond.sigma / uncond.sigma, max=1.0).square()
    d = 1.0 + guidance - guidance * s
    return Affine(((1.0 + guidance) * cond.mu - guidance * s * uncond.mu) / d, cond.sigma / torch.sqrt(d))


def standard_normal_log_prob(z: Tensor) -> Tensor:
    """Elementwise log N(z; 0, 1) in nats."""
    return -0.5 * (z.square() + LOG_2PI)
