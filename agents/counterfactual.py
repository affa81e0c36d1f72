"""What if? Abduct the noise that explains what happened, then play other actions against the same noise.

Abduction, action, prediction (Pearl): with an invertible world the noise is not a posterior but a value. It is that of
the clip's latents themselves, without the noise that the world adds to what it observes: the added noise is no part of
what happened, and replaying it under another action would add its error to the answer.

Axis letters: B sessions, T chunks, F pixel frames of a chunk, C latent channels; h, w latent grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from agents.actions import take
from worldmodel import InputError, WorldModel, WorldState


@dataclass(frozen=True)
class Counterfactual:
    """A clip as it was, as the world renders it from its noise, and as it would have been.

    observed, factual, otherwise: (B, T, F, height, width, 3) uint8; ``factual`` has the actions that happened, so that
    it differs from ``otherwise`` by the actions alone, and from ``observed`` by what codec and denoiser lose.
    log_prob_observed, log_prob_factual, log_prob_otherwise: (B, T) float64 nats of every chunk under its own past and
    actions, at the latent without added noise; the first two agree up to the solver's tolerance. reward_factual,
    reward_otherwise: (B, T). noise: (B, T, C, h, w) float32, the abducted one.
    """

    observed: np.ndarray
    factual: np.ndarray
    otherwise: np.ndarray
    log_prob_observed: np.ndarray
    log_prob_factual: np.ndarray
    log_prob_otherwise: np.ndarray
    reward_factual: np.ndarray
    reward_otherwise: np.ndarray
    noise: np.ndarray

    @property
    def difference(self) -> np.ndarray:
        """(B, T * F, height, width, 3) uint8 video: what the other actions change, half scale around grey 128."""
        change = self.otherwise.astype(np.int16) - self.factual.astype(np.int16)
        video = (128 + change // 2).clip(0, 255).astype(np.uint8)
        return video.reshape(len(video), -1, *video.shape[3:])

    def video(self, row: int = 0) -> np.ndarray:
        """(T * F, height, 3 * width, 3) uint8 of one session: what happened, what would have, the difference."""
        clips = [x[row].reshape(-1, *x.shape[3:]) for x in (self.observed, self.otherwise)]
        return np.concatenate((*clips, self.difference[row]), axis=2)


def counterfactual(
    world: WorldModel, state: WorldState, frames: np.ndarray, actions: Any, otherwise: Any
) -> Counterfactual:
    """Replay a real clip (B, T, F, height, width, 3) uint8 that followed ``state``'s past, with other actions.

    ``actions`` (what happened) and ``otherwise``: (B, T, ...) in the action space, or dicts of such arrays.

    Raises:
        InputError: wrong shape, dtype or range.
    """
    pixels = np.asarray(frames)
    if pixels.ndim != 6 or pixels.shape[0] != state.rows or not pixels.shape[1]:
        raise InputError(
            f"frames have shape {pixels.shape}, expected ({state.rows}, T, {', '.join(map(str, world.frames_shape))})"
        )
    _check_length(actions, pixels.shape[:2], "actions")
    _check_length(otherwise, pixels.shape[:2], "otherwise")
    rows = state.rows
    factual = list(range(rows))
    both = WorldState.concat([state, state])
    noises, nats, replayed = [], [], []
    for t in tqdm(range(pixels.shape[1]), desc="counterfactual", unit="chunk", leave=False):
        happened = take(actions, t, axis=1)
        state, real = world.observe(state, pixels[:, t], happened)
        silent = torch.zeros_like(real.noise)
        score = world.score(both.select(factual), real.latent, happened, noise=silent)
        both, chunk = world.step(
            both, _pair(happened, take(otherwise, t, axis=1)), noise=torch.cat((score.noise, score.noise))
        )
        noises.append(score.noise.cpu().numpy())
        nats.append(score.log_prob.numpy())
        replayed.append(chunk)
    shown = np.stack([c.frames.cpu().numpy() for c in replayed], axis=1)
    log_prob = np.stack([c.log_prob.numpy() for c in replayed], axis=1)
    reward = np.stack([c.reward.cpu().numpy() for c in replayed], axis=1)
    return Counterfactual(
        pixels,
        shown[:rows],
        shown[rows:],
        np.stack(nats, axis=1),
        log_prob[:rows],
        log_prob[rows:],
        reward[:rows],
        reward[rows:],
        np.stack(noises, axis=1),
    )


def _check_length(actions: Any, expected: tuple[int, ...], name: str) -> None:
    for part in actions.values() if isinstance(actions, Mapping) else [actions]:
        if np.shape(part)[:2] != tuple(expected):
            raise InputError(
                f"{name} have shape {np.shape(part)}, expected {tuple(expected)} first, as the frames"
            )


def _pair(first: Any, second: Any) -> Any:
    if isinstance(first, Mapping):
        if not isinstance(second, Mapping) or set(first) != set(second):
            raise InputError(f"otherwise must be a dict with keys {sorted(first)}, as the actions")
        return {k: _pair(v, second[k]) for k, v in first.items()}
    return np.concatenate((first, second))
