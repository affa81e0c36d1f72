"""Swing up the real Pendulum-v1 from pixels: the learned world plans, the real simulator answers.

Beside it, on the same starts: the same search with the simulator's true dynamics instead of the world, and random actions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from agents import MPCAgent, Plan, Planner, draw_plan
from agents.beliefs import first_belief
from agents.search import search_actions
from envs import ChunkedEnv
from worldmodel import WorldModel
from worldmodel.training.evaluate import HELD_OUT_SEED
from worldmodel.training.measure import EvaluateConfig, interval
from worldmodel.training.plots import write_sheet

PICTURED = 8
"""The chunk of the first episode whose plan is drawn."""


def true_returns(state: np.ndarray, actions: np.ndarray, held: int) -> np.ndarray:
    """Returns (N,) of torques (N, H, 1), each held for some steps of Pendulum-v1 from state (angle, speed)."""
    angle, speed = np.full(len(actions), state[0]), np.full(len(actions), state[1])
    total = np.zeros(len(actions))
    for torque in np.repeat(actions[..., 0].astype(np.float64), held, axis=1).T:
        wrapped = (angle + np.pi) % (2 * np.pi) - np.pi
        total -= wrapped**2 + 0.1 * speed**2 + 0.001 * torque**2
        speed = np.clip(speed + (15.0 * np.sin(angle) + 3.0 * torque) * 0.05, -8, 8)
        angle = angle + 0.05 * speed
    return total


def with_the_world(agent: MPCAgent, env: ChunkedEnv, seed: int, chunks: int, plans: list[Plan]) -> float:
    """The return of an episode planned in the world; appends every plan."""
    frames, _ = env.reset(seed=seed)
    agent.reset(frames, seed)
    total = 0.0
    for _ in tqdm(range(chunks), desc="learned world", unit="chunk", leave=False):
        action = agent.act()
        frames, reward, _, _, _ = env.step(action)
        agent.observe(frames, action)
        assert agent.last_plan is not None
        plans.append(agent.last_plan)
        total += float(reward)
    return total


def with_true_dynamics(planner: Planner, env: ChunkedEnv, seed: int, chunks: int) -> float:
    """The return of an episode planned with the simulator's own equations."""
    env.reset(seed=seed)
    search, rng = planner.search, np.random.default_rng(seed)
    belief, tried = first_belief(env.action_space, search), None
    total = 0.0
    for _ in range(chunks):
        state: Any = env.unwrapped.state  # type: ignore[attr-defined]

        def evaluate(actions: np.ndarray, state: np.ndarray = state) -> np.ndarray:
            return true_returns(state, actions, env.camera.frame_skip)

        found = search_actions(evaluate, belief, search, rng, tried)
        belief, tried = found.shift(search)
        total += float(env.step(found.actions[0])[1])
    return total


def at_random(env: ChunkedEnv, seed: int, chunks: int) -> float:
    """The return of an episode of uniform actions."""
    env.reset(seed=seed)
    env.action_space.seed(seed)
    return float(sum(float(env.step(env.action_space.sample())[1]) for _ in range(chunks)))


def main() -> None:
    """Run the episodes and print the mean returns with 95 % bootstrap intervals."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", default="pendulum", help="a world that ships, or a world directory")
    parser.add_argument("--preset", default="fast", help="fast, quality or paper")
    parser.add_argument("--episodes", type=int, default=4, help="held-out starts")
    parser.add_argument("--chunks", type=int, default=50, help="length of an episode; a chunk is 4 frames")
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED, help="of the first start")
    parser.add_argument("--out", type=Path, default=Path("plan_pendulum.png"), help="a picture of one plan")
    options = parser.parse_args()

    world = WorldModel.load(options.world)
    env = ChunkedEnv("Pendulum-v1", world.chunk_frames, world.spec.frame_size, hide=("last_u",))
    planner = Planner.preset(options.preset)
    agent, plans = MPCAgent(world, planner), list[Plan]()
    ways: dict[str, Callable[[int], float]] = {
        "learned world, from pixels": lambda s: with_the_world(agent, env, s, options.chunks, plans),
        "true dynamics, same search": lambda s: with_true_dynamics(planner, env, s, options.chunks),
        "random actions": lambda s: at_random(env, s, options.chunks),
    }
    seeds = range(options.seed, options.seed + options.episodes)
    for name, play in ways.items():
        returns = np.array([play(seed) for seed in tqdm(seeds, desc=name, unit="episode")])
        mean = interval(returns, np.mean, EvaluateConfig())
        each = " ".join(f"{r:.0f}" for r in returns)
        print(
            f"{name:28s} mean return {mean['value']:8.1f} [{mean['low']:.1f}, {mean['high']:.1f}]  ({each})"
        )
    env.close()
    seconds = float(np.median([plan.seconds for plan in plans]))
    print(f"{seconds:.2f} s a plan, {1 / seconds:.2f} plans a second ({options.preset})")
    write_sheet(options.out, draw_plan(plans[min(PICTURED, len(plans) - 1)]))
    print(f"a plan is drawn in {options.out}")


if __name__ == "__main__":
    main()
