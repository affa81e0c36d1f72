"""Train a policy inside a world with Stable-Baselines3's PPO, unmodified: pip install "worldmodel[rl]"."""

from __future__ import annotations

import argparse
from pathlib import Path

import gymnasium
from stable_baselines3 import PPO
from stable_baselines3.common.monitor import Monitor

import envs  # registers the worlds


def main() -> None:
    """Learn from pixels, one frame a step; then act for one episode in the imagination."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", default="pendulum", help="a world that ships, or a world directory")
    parser.add_argument("--steps", type=int, default=2000, help="pixel frames to learn from")
    parser.add_argument("--batch", type=int, default=250, help="steps between two updates of the policy")
    parser.add_argument("--out", type=Path, default=None, help="where to save the policy (.zip)")
    options = parser.parse_args()

    env = Monitor(
        gymnasium.make(envs.env_id("pendulum"), world=options.world, step_mode="frame", max_chunks=25)
    )
    agent = PPO("CnnPolicy", env, n_steps=options.batch, batch_size=50, n_epochs=2, device="cpu", seed=0)
    agent.learn(options.steps, progress_bar=False)

    observation, _ = env.reset(seed=1)
    done, total = False, 0.0
    while not done:
        action, _ = agent.predict(observation, deterministic=True)
        observation, reward, terminated, truncated, _ = env.step(action)
        done, total = terminated or truncated, total + float(reward)
    print(f"after {agent.num_timesteps} steps: imagined return {total:.1f}")
    if options.out is not None:
        agent.save(options.out)


if __name__ == "__main__":
    main()
