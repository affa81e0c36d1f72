"""What the verbs of `WorldModel` return beside the state: `Chunk` of a step or an observation, `Score` of a score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Likelihood(NamedTuple):
    """The exact density of a committed frame; the fields of `Chunk` with these names. model_noise: as ``noise``, under the
    model's own map where that is not the sampler's.
    """

    log_prob: Tensor
    guided_log_prob: Tensor | None
    action_gain: Tensor
    log_prob_map: Tensor
    noise: Tensor
    context_frames: Tensor
    model_noise: Tensor

    def of_chunk(self) -> dict[str, Any]:
        """The fields of a `Chunk`."""
        return {name: value for name, value in self._asdict().items() if name != "model_noise"}


@dataclass(frozen=True)
class Chunk:
    """What one step adds to B sessions. Likelihoods are of the *noised latent* x~ at the model's noise level.

    frames: (B, F, height, width, 3) uint8 RGB, imagined or as observed. latent: (B, C, h, w) clean latent.
    log_prob: (B,) float64 nats of the chunk given past and action, exact for x~ as committed. guided_log_prob: the
    same under the guided sampler, or None. action_gain: (B,) nats, ``log p(chunk | action) - log p(chunk | no action)``;
    under prompts ``log p(chunk | prompt, action) - log p(chunk | empty prompt, no action)`` in sessions that keep a past
    under the empty prompt (those of a world with guidance, and those guided once), else what the action alone gains;
    NaN where it was not asked for. log_prob_map: (B, h, w) nats a latent cell, summing to log_prob. noise: (B, C, h, w)
    the z that x~ maps to under the sampler, with its guidance; given back to `WorldModel.step` it reproduces the chunk.
    reward, termination: (B,). sweeps: (B,) deep Jacobi sweeps, 0 for an observed chunk; residual: (B,) relative mean
    squared change of the last sweep. context_frames: (B,) latent frames it was conditioned on.

    Tensors are shared with the state that came with it; do not write to them.
    """

    frames: Tensor
    latent: Tensor
    log_prob: Tensor
    guided_log_prob: Tensor | None
    action_gain: Tensor
    log_prob_map: Tensor
    noise: Tensor
    reward: Tensor
    termination: Tensor
    sweeps: Tensor
    residual: Tensor
    context_frames: Tensor

    @property
    def bits_per_dim(self) -> Tensor:
        """(B,) float64: bits per latent dimension."""
        return -self.log_prob / (self.latent[0].numel() * math.log(2.0))


@dataclass(frozen=True)
class Score:
    """How likely real frames are, averaged over K noise draws; (B,) float64 each.

    log_prob: log-mean-exp over draws of the density of x~, nats. rate: mean over draws of -log_prob, nats a chunk.
    bits_per_dim: ``rate`` in bits per latent dimension. action_gain: mean over draws, nats. noise_square: mean over
    draws and dimensions of the model's z^2, without guidance (1 in expectation for what the model knows).
    noise: (B, C, h, w) mean over draws of the sampler's z, what of it the chunk and not the added noise has caused.
    log_prob_map: (B, h, w) nats a latent cell, mean over draws, summing to ``-rate``.
    """

    log_prob: Tensor
    rate: Tensor
    bits_per_dim: Tensor
    action_gain: Tensor
    noise_square: Tensor
    noise: Tensor
    log_prob_map: Tensor

    @staticmethod
    def over(draws: Sequence[Likelihood]) -> Score:
        """The same chunk committed under several draws of the added noise, averaged."""
        log_prob = torch.stack([c.log_prob for c in draws])
        rate = -log_prob.mean(0)
        return Score(
            torch.logsumexp(log_prob, 0) - math.log(len(draws)),
            rate,
            rate / (draws[0].noise[0].numel() * math.log(2.0)),
            torch.stack([c.action_gain for c in draws]).mean(0),
            torch.stack([c.model_noise.double().square().mean((1, 2, 3)).cpu() for c in draws]).mean(0),
            torch.stack([c.noise for c in draws]).mean(0),
            torch.stack([c.log_prob_map for c in draws]).mean(0),
        )


def actions_at(actions: Any, t: int | slice) -> Any:
    """Actions of chunk t, or of a slice of chunks, from (B, T, ...), an array, a tensor or lists, a dict of such or of such
    dicts, or None.
    """
    if isinstance(actions, Mapping):
        return {k: actions_at(v, t) for k, v in actions.items()}
    if isinstance(actions, list | tuple):
        actions = np.asarray(actions)
    return None if actions is None else actions[:, t]
