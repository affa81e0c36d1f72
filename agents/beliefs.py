"""What a search believes about good sequences of actions: distributions that are sampled, fitted again and shifted.

A sequence x is (H, A): H chunks of the horizon, A numbers of one action, in a belief's own coordinates: a Box's range
is [-1, 1], choices count from 0. N candidates, E elites.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from gymnasium import spaces

from agents.actions import Actions
from agents.presets import Search
from worldmodel import InputError


def coloured_noise(rng: np.random.Generator, shape: tuple[int, int, int], colour: float) -> np.ndarray:
    """Gaussian noise (N, H, A) of unit variance whose power over H falls as 1 / f^colour (Timmer and König, 1995).

    Cut from runs four times as long: the slow part of the noise is longer than a short horizon.
    """
    if colour == 0:
        return rng.standard_normal(shape)
    n, horizon, size = shape
    length = 4 * horizon
    scale = np.maximum(np.fft.rfftfreq(length), 1 / length) ** (-colour / 2)
    real, imaginary = rng.standard_normal((2, n, len(scale), size))
    edge = np.zeros(len(scale), dtype=bool)  # the two frequencies that have no phase
    edge[[0, -1]] = True
    spectrum = np.where(edge[:, None], math.sqrt(2) * real, real + 1j * imaginary) * scale[:, None]
    power = (np.where(edge, 2.0, 4.0) * scale**2).sum() / length**2
    return np.fft.irfft(spectrum, n=length, axis=1)[:, :horizon] / math.sqrt(power)


@dataclass(frozen=True)
class Gaussian:
    """Independent normals over Box actions, clipped to the range; mean and std (H, A), the range being [-1, 1]."""

    space: spaces.Box
    mean: np.ndarray
    std: np.ndarray

    def sample(self, rng: np.random.Generator, n: int, search: Search) -> np.ndarray:
        """(n, H, A), the mean first."""
        if search.method == "shooting":
            x = rng.uniform(-1.0, 1.0, (n, *self.mean.shape))
        else:
            x = self.mean + self.std * coloured_noise(rng, (n, *self.mean.shape), search.colour)
        x[0] = self.mean
        return np.clip(x, -1.0, 1.0)

    def fit(self, x: np.ndarray, weights: np.ndarray, search: Search) -> Gaussian:
        """Mean and standard deviation of sequences x (E, H, A) with weights (E,) that sum to one."""
        mean = np.einsum("e,eha->ha", weights, x)
        variance = np.einsum("e,eha->ha", weights, np.square(x - mean))
        return replace(self, mean=mean, std=np.clip(np.sqrt(variance), *search.std_range))

    def shift(self, search: Search) -> Gaussian:
        """One chunk later: the mean moves up and its last action is repeated; the width is the initial one again."""
        return replace(self, mean=shift_rows(self.mean), std=np.full_like(self.std, search.initial_std))

    @property
    def centre(self) -> np.ndarray:
        """(H, A): the mean."""
        return self.mean

    def actions(self, x: np.ndarray) -> np.ndarray:
        """x (..., H, A) to actions (..., H, *shape) in the space's dtype."""
        low, high = (np.asarray(b, np.float64).reshape(-1) for b in (self.space.low, self.space.high))
        values = np.clip(low + (x + 1.0) / 2.0 * (high - low), low, high)
        if np.issubdtype(self.space.dtype, np.integer):
            values = np.rint(values)
        return values.reshape(*x.shape[:-1], *self.space.shape).astype(self.space.dtype)

    def coordinates(self, actions: Actions) -> np.ndarray:
        """The inverse of `actions`: (..., H, *shape) to x (..., H, A)."""
        low, high = (np.asarray(b, np.float64).reshape(-1) for b in (self.space.low, self.space.high))
        flat = np.asarray(actions, np.float64).reshape(
            *np.shape(actions)[: np.ndim(actions) - len(self.space.shape)], -1
        )
        return 2.0 * (flat - low) / np.where(high > low, high - low, 1.0) - 1.0


UNIFORM_SHARE = 0.05
"""What a fitted categorical keeps of the uniform one, so that no action dies out; a shifted one keeps half."""


@dataclass(frozen=True)
class Categorical:
    """Independent choices for Discrete and MultiDiscrete; ``probabilities`` (H, A, n), ``allowed`` (A, n) bool."""

    space: spaces.Discrete | spaces.MultiDiscrete
    probabilities: np.ndarray
    allowed: np.ndarray

    @property
    def uniform(self) -> np.ndarray:
        """(A, n): every allowed choice alike."""
        return self.allowed / self.allowed.sum(-1, keepdims=True)

    def sample(self, rng: np.random.Generator, n: int, search: Search) -> np.ndarray:
        """(n, H, A) choices from 0, the most probable ones first."""
        p = self.probabilities
        if search.method == "shooting":
            p = np.broadcast_to(self.uniform, p.shape)
        edges = np.cumsum(p, axis=-1)
        edges = edges / edges[..., -1:]
        draws = rng.random((n, *p.shape[:-1], 1))
        x = (draws >= edges[..., :-1]).sum(-1)
        x[0] = self.centre
        return x

    def fit(self, x: np.ndarray, weights: np.ndarray, search: Search) -> Categorical:
        """Weighted frequencies of choices x (E, H, A), mixed with a little of the uniform distribution."""
        counts = np.einsum("e,ehan->han", weights, np.eye(self.allowed.shape[-1])[x])
        return replace(self, probabilities=(1 - UNIFORM_SHARE) * counts + UNIFORM_SHARE * self.uniform)

    def shift(self, search: Search) -> Categorical:
        """One chunk later, half of it uniform again."""
        return replace(self, probabilities=0.5 * shift_rows(self.probabilities) + 0.5 * self.uniform)

    @property
    def centre(self) -> np.ndarray:
        """(H, A): the most probable choices."""
        return self.probabilities.argmax(-1)

    def actions(self, x: np.ndarray) -> np.ndarray:
        """x (..., H, A) to actions (..., H, *shape) in the space's dtype."""
        if isinstance(self.space, spaces.Discrete):
            return (x[..., 0] + int(self.space.start)).astype(self.space.dtype)
        return (x.reshape(*x.shape[:-1], *self.space.shape) + self.space.start).astype(self.space.dtype)

    def coordinates(self, actions: Actions) -> np.ndarray:
        """The inverse of `actions`: (..., H, *shape) to choices x (..., H, A) from 0."""
        chosen = np.asarray(actions, np.int64) - self.space.start
        own = len(self.space.shape or ())
        return chosen.reshape(*chosen.shape[: chosen.ndim - own], -1)


@dataclass(frozen=True)
class Joint:
    """Beliefs of a Dict space's parts, side by side: their numbers are joined along the last axis of x."""

    parts: dict[str, Belief]

    def _columns(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """x (..., A), cut into the parts' own, choices as integers again."""
        edges = np.cumsum([part.centre.shape[-1] for part in self.parts.values()])[:-1]
        pieces = np.split(x, edges, axis=-1)
        return {
            key: np.rint(piece).astype(np.int64) if isinstance(part, Categorical) else piece
            for (key, part), piece in zip(self.parts.items(), pieces, strict=True)
        }

    def sample(self, rng: np.random.Generator, n: int, search: Search) -> np.ndarray:
        """(n, H, A) float64, the centres first."""
        return np.concatenate([part.sample(rng, n, search) for part in self.parts.values()], axis=-1)

    def fit(self, x: np.ndarray, weights: np.ndarray, search: Search) -> Joint:
        """Each part fitted to its own numbers."""
        columns = self._columns(x)
        return Joint({k: part.fit(columns[k], weights, search) for k, part in self.parts.items()})

    def shift(self, search: Search) -> Joint:
        """Each part one chunk later."""
        return Joint({k: part.shift(search) for k, part in self.parts.items()})

    @property
    def centre(self) -> np.ndarray:
        """(H, A): the parts' centres."""
        return np.concatenate([part.centre for part in self.parts.values()], axis=-1)

    def actions(self, x: np.ndarray) -> Actions:
        """x (..., H, A) to a dict of actions."""
        columns = self._columns(x)
        return {k: part.actions(columns[k]) for k, part in self.parts.items()}

    def coordinates(self, actions: Actions) -> np.ndarray:
        """The inverse of `actions`."""
        return np.concatenate([part.coordinates(actions[k]) for k, part in self.parts.items()], axis=-1)


Belief = Gaussian | Categorical | Joint


def shift_rows(x: np.ndarray) -> np.ndarray:
    """x (H, ...) one row up, the last row repeated."""
    return np.concatenate((x[1:], x[-1:]))


def first_belief(space: spaces.Space[Any], search: Search) -> Belief:
    """What is believed before anything was tried.

    Raises:
        InputError: not a bounded Box, Discrete or MultiDiscrete space, or a Dict of such.
    """
    if isinstance(space, spaces.Dict) and space.spaces:
        return Joint({key: first_belief(part, search) for key, part in space.spaces.items()})
    if isinstance(space, spaces.Box) and np.isfinite(space.low).all() and np.isfinite(space.high).all():
        shape = (search.horizon, math.prod(space.shape))
        return Gaussian(space, np.zeros(shape), np.full(shape, search.initial_std))
    if isinstance(space, spaces.Discrete):
        sizes = np.array([space.n])
    elif isinstance(space, spaces.MultiDiscrete):
        sizes = np.asarray(space.nvec).reshape(-1)
    else:
        raise InputError(
            f"cannot search {space}; expected Discrete, MultiDiscrete, a bounded Box, or a Dict of such"
        )
    allowed = np.arange(sizes.max()) < sizes[:, None]
    uniform = allowed / allowed.sum(-1, keepdims=True)
    return Categorical(space, np.repeat(uniform[None], search.horizon, axis=0), allowed)
