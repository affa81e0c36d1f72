"""Learn to swing up in imagination alone, then do it in the real Pendulum-v1: pip install "worldmodel[rl,demo]".

PPO (Stable-Baselines3) never meets the simulator: it acts in the world's vector environment, on latents. The policy is
kept after every update, so the script can be stopped at any time and run again with more chunks.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

from agents.evaluation.planning import episode_chunks
from agents.evaluation.trial import TrialConfig, mean_of, real_env
from agents.imagination import PolicyAgent, chunks_learned, play_policy, train_policy
from worldmodel import WorldModel


def main() -> None:
    """Train, then print the mean real return over held-out starts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", default="pendulum", help="a world that ships, or a world directory")
    parser.add_argument("--steps", type=int, default=30_000, help="chunks to imagine, in all")
    parser.add_argument(
        "--minutes", type=float, default=None, help="stop learning after so long, at the latest"
    )
    parser.add_argument("--episodes", type=int, default=20, help="real episodes to judge the policy by")
    parser.add_argument("--chunks", type=int, default=None, help="of a real episode; default: its own limit")
    parser.add_argument("--policy", type=Path, default=Path("runs/ppo_in_imagination/policy.safetensors"))
    options = parser.parse_args()

    world = WorldModel.load(options.world)
    policy = train_policy(world, options.steps, options.policy, minutes=options.minutes)
    config = TrialConfig(starts=options.episodes, chunks=options.chunks)
    env, agent = real_env(world), PolicyAgent(world, policy)
    chunks = episode_chunks(env, config)
    returns = [
        play_policy(agent, env, seed, chunks)["return"]
        for seed in tqdm(config.seeds, desc="the policy in reality", unit="episode")
    ]
    env.close()
    mean = mean_of(returns, config)
    print(
        f"{chunks_learned(world, options.policy)} imagined chunks, no real one: mean real return {mean['value']:.1f} "
        f"[{mean['low']:.1f}, {mean['high']:.1f}] ({' '.join(f'{r:.0f}' for r in np.sort(returns))})"
    )
    print(f"the policy is in {options.policy}")


if __name__ == "__main__":
    main()
