"""Behaviour policies that collect episodes, by name or as MODULE:FUNCTION, and wide starts. All randomness comes from the
rng.
"""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable
from typing import Any, cast

import gymnasium
import numpy as np

from worldmodel.errors import ConfigError

Policy = Callable[[gymnasium.Env[Any, Any], Any], Any]
"""Called once a chunk with the environment and its last observation; returns the action to hold."""

MakePolicy = Callable[[gymnasium.Space[Any], np.random.Generator], Policy]
"""Called once an episode with the action space and the episode's generator."""


def random(space: gymnasium.Space[Any], rng: np.random.Generator) -> Policy:
    """A new uniform action every chunk."""
    own = copy.deepcopy(space)
    own.seed(int(rng.integers(2**31)))
    return lambda env, observation: own.sample()


def random_held(space: gymnasium.Space[Any], rng: np.random.Generator) -> Policy:
    """A uniform action, held for 1 to 8 chunks."""
    draw = random(space, rng)
    left, action = 0, None

    def act(env: gymnasium.Env[Any, Any], observation: Any) -> Any:
        nonlocal left, action
        if left == 0:
            left, action = int(rng.integers(1, 9)), draw(env, observation)
        left -= 1
        return action

    return act


def pendulum_swing(space: gymnasium.Space[Any], rng: np.random.Generator) -> Policy:
    """Pendulum-v1: pump energy until near upright, then balance there, most of the time; noise varies by episode."""
    return _pump_and_balance(float(rng.choice([0.05, 0.3, 0.8, 1.5])), rng)


def pendulum_restless(space: gymnasium.Space[Any], rng: np.random.Generator) -> Policy:
    """Pendulum-v1: as `pendulum_swing`, with so much noise that it seldom stays at the top."""
    return _pump_and_balance(float(rng.choice([0.5, 1.0, 1.5, 2.5])), rng)


def _pump_and_balance(scale: float, rng: np.random.Generator) -> Policy:
    """scale: of the torque's noise, in N m. The gains suit a torque held for 4 steps of 0.05 s."""

    def act(env: gymnasium.Env[Any, Any], observation: Any) -> np.ndarray:
        theta, speed = (float(x) for x in getattr(env.unwrapped, "state"))  # noqa: B009
        theta = (theta + math.pi) % (2 * math.pi) - math.pi
        energy = speed**2 / 2 + 15 * (math.cos(theta) - 1)
        if abs(theta) < 0.6 and abs(speed) < 2.5:
            torque = -6.2 * theta - 1.7 * speed
        else:
            torque = -0.6 * energy * (1 if speed >= 0 else -1)
        return np.clip([torque + scale * rng.standard_normal()], -2, 2).astype(np.float32)

    return act


def lunar_lander(space: gymnasium.Space[Any], rng: np.random.Generator) -> Policy:
    """LunarLander-v3: Gymnasium's own heuristic, with a share of random actions that varies by episode."""
    from gymnasium.envs.box2d import lunar_lander as simulator

    share = float(rng.choice([0.0, 0.05, 0.15, 0.3, 0.6]))
    draw = random_held(space, rng)

    def act(env: gymnasium.Env[Any, Any], observation: Any) -> int:
        world: Any = env.unwrapped
        state = lander_state(world)  # also where it is not needed: of another environment there is none
        return int(draw(env, observation) if rng.random() < share else simulator.heuristic(world, state))

    return act


def lander_state(world: Any) -> np.ndarray:
    """(8,) LunarLander's observation, read off the simulator as its own `step` does."""
    from gymnasium.envs.box2d import lunar_lander as simulator

    half_width = simulator.VIEWPORT_W / simulator.SCALE / 2
    half_height = simulator.VIEWPORT_H / simulator.SCALE / 2
    body, pad = world.lander, world.helipad_y + simulator.LEG_DOWN / simulator.SCALE
    return np.array(
        [
            body.position.x / half_width - 1,
            (body.position.y - pad) / half_height,
            body.linearVelocity.x * half_width / simulator.FPS,
            body.linearVelocity.y * half_height / simulator.FPS,
            body.angle,
            20.0 * body.angularVelocity / simulator.FPS,
            *(float(leg.ground_contact) for leg in world.legs),
        ]
    )


POLICIES: dict[str, MakePolicy] = {
    "random": random,
    "random_held": random_held,
    "pendulum_swing": pendulum_swing,
    "pendulum_restless": pendulum_restless,
    "lunar_lander": lunar_lander,
}


def find_policy(name: str) -> MakePolicy:
    """What makes a policy: one of `POLICIES`, or the FUNCTION of ``MODULE:FUNCTION``, whose module is imported.

    Raises:
        ConfigError: no policy of that name, no such module, or no such function in it.
    """
    module, colon, function = name.partition(":")
    if not colon:
        if name not in POLICIES:
            raise ConfigError(
                f"no policy {name!r}; choose from {', '.join(POLICIES)}, or give MODULE:FUNCTION"
            )
        return POLICIES[name]
    try:
        made = getattr(importlib.import_module(module), function, None)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"policy {name!r}: cannot import {module!r} ({' '.join(str(error).split())})"
        ) from error
    if not callable(made):
        raise ConfigError(
            f"policy {name!r}: no function {function!r} in {module}, expected f(action_space, rng) that returns "
            "act(env, observation)"
        )
    return cast(MakePolicy, made)


def make_policy(name: str, space: gymnasium.Space[Any], rng: np.random.Generator) -> Policy:
    """The policy of that name for one episode. Raises ConfigError as `find_policy`."""
    return find_policy(name)(space, rng)


Start = Callable[[gymnasium.Env[Any, Any], np.random.Generator], np.ndarray]
"""Puts a freshly reset environment into a wide start state; returns the observation there."""


def pendulum_anywhere(env: gymnasium.Env[Any, Any], rng: np.random.Generator) -> np.ndarray:
    """Pendulum-v1: angle uniform in [-pi, pi], speed uniform in [-8, 8] rad/s."""
    theta, speed = rng.uniform(-math.pi, math.pi), rng.uniform(-8, 8)
    setattr(env.unwrapped, "state", np.array([theta, speed]))  # noqa: B010
    return np.array([math.cos(theta), math.sin(theta), speed], dtype=np.float32)


WIDE_STARTS: dict[str, Start] = {"Pendulum-v1": pendulum_anywhere}
"""By environment id."""
