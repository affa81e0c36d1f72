"""What can be read off a picture of a known environment: the judge of imagined frames, never an input of a model."""

from __future__ import annotations

from collections.abc import Callable

import gymnasium
import numpy as np

PERTURBATION = (0.2, 0.05)
"""Degrees and radians a second by which `pendulum_perturbed` misses the state: about what three chunks of pixels tell."""


def pendulum_angle(frames: np.ndarray) -> np.ndarray:
    """Angle (...,) in radians of Pendulum-v1's rod in frames (..., height, width, 3) uint8; 0 is upright.

    The direction of the rod's centre of mass from the pivot, which is the centre of the picture. NaN where there is no rod.
    """
    ink = 255.0 - frames[..., 1].astype(np.float64)
    ink = np.where(ink > 24.0, ink, 0.0)
    height, width = ink.shape[-2:]
    rows, columns = np.arange(height) + 0.5 - height / 2, np.arange(width) + 0.5 - width / 2
    down, right = (ink * rows[:, None]).sum((-2, -1)), (ink * columns).sum((-2, -1))
    angle = np.arctan2(-right, -down)
    return np.where(ink.sum((-2, -1)) > 255.0, angle, np.nan)


def pendulum_true_angle(observations: np.ndarray) -> np.ndarray:
    """Angle (...,) from Pendulum-v1's observation (..., 3) = (cos, sin, speed)."""
    return np.arctan2(observations[..., 1], observations[..., 0])


def pendulum_perturbed(
    observations: np.ndarray, actions: np.ndarray, repeat: int, seed: int = 0
) -> np.ndarray:
    """Angles (B, T) of the *exact* simulator, restarted a little off: what no model that sees pixels can beat by much.

    ``observations`` (B, 3) before the first chunk, ``actions`` (B, T, 1), each held for ``repeat`` steps. The start is
    off by Gaussian noise of `PERTURBATION`; near upright it grows e-fold every 0.26 s.
    """
    env = gymnasium.make("Pendulum-v1", max_episode_steps=None).unwrapped
    rng, angles = np.random.default_rng(seed), []
    for observation, sequence in zip(observations, actions, strict=True):
        env.reset(seed=seed)
        off = rng.standard_normal(2) * (np.radians(PERTURBATION[0]), PERTURBATION[1])
        env.state = np.array([pendulum_true_angle(observation), observation[2]]) + off  # type: ignore[attr-defined]
        path = []
        for action in sequence:
            for _ in range(repeat):
                seen = env.step(action)[0]
            path.append(pendulum_true_angle(seen))
        angles.append(path)
    env.close()
    return np.array(angles)


def wrap(angle: np.ndarray) -> np.ndarray:
    """Radians to [-pi, pi)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi


Probe = tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]

PROBES: dict[str, Probe] = {"Pendulum-v1": (pendulum_angle, pendulum_true_angle)}
"""Environment id to (angle off the picture, true angle off the simulator's observation)."""
