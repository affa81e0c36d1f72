"""Swing up the real Pendulum-v1 from pixels: the learned world plans, the real simulator answers.

Beside it, on the same starts: the same search with the simulator's true dynamics instead of the world, and random actions.
`worldmodel evaluate agents --only planning` does it on 20 starts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from agents import MPCAgent, Planner, draw_plan
from agents.evaluation.planning import at_random, play, with_the_world, with_true_dynamics
from agents.evaluation.trial import TrialConfig, mean_of, real_env
from worldmodel import WorldModel
from worldmodel.training.plots import write_sheet

PICTURED = 8
"""Real chunks before the plan that is drawn."""


def main() -> None:
    """Run the episodes and print the mean returns with 95 % bootstrap intervals."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", default="pendulum", help="a world that ships, or a world directory")
    parser.add_argument("--preset", default="fast", help="fast, quality or paper")
    parser.add_argument("--episodes", type=int, default=4, help="held-out starts")
    parser.add_argument("--chunks", type=int, default=50, help="length of an episode; a chunk is 4 frames")
    parser.add_argument("--out", type=Path, default=Path("plan_pendulum.png"), help="a picture of one plan")
    options = parser.parse_args()

    world, planner, chunks = WorldModel.load(options.world), Planner.preset(options.preset), options.chunks
    env, config = real_env(world), TrialConfig(starts=options.episodes)
    ways: dict[str, Callable[[int], dict]] = {
        "learned world, from pixels": lambda seed: with_the_world(world, planner, env, seed, chunks),
        "true dynamics, same search": lambda seed: play(env, seed, chunks, with_true_dynamics(planner, seed)),
        "random actions": lambda seed: play(env, seed, chunks, at_random(seed)),
    }
    for name, way in ways.items():
        episodes = [way(seed) for seed in tqdm(config.seeds, desc=name, unit="episode")]
        returns = [e["return"] for e in episodes]
        mean, each = mean_of(returns, config), " ".join(f"{r:.0f}" for r in returns)
        print(
            f"{name:28s} mean return {mean['value']:8.1f} [{mean['low']:.1f}, {mean['high']:.1f}]  ({each})"
        )
        if "seconds" in episodes[0]:
            seconds = float(np.median([e["seconds"] for e in episodes]))
            print(f"{seconds:.2f} s a plan, {1 / seconds:.2f} plans a second ({options.preset})")

    agent = MPCAgent(world, planner)
    frames, _ = env.reset(seed=config.seed)
    agent.reset(frames, config.seed)
    action = agent.act()
    for _ in range(min(PICTURED, chunks - 1)):
        frames, *_ = env.step(action)
        action = agent.act(frames)
    assert agent.last_plan is not None
    write_sheet(options.out, draw_plan(agent.last_plan))
    print(f"a plan is drawn in {options.out}")
    env.close()


if __name__ == "__main__":
    main()
