"""Step a world like any Gymnasium environment, and keep every frame in a video."""

from __future__ import annotations

import argparse
from pathlib import Path

from envs import RecordChunks, WorldModelEnv


def main() -> None:
    """Imagine one episode under random actions; print what the model thinks of each chunk."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", default="pendulum", help="a world that ships, or a world directory")
    parser.add_argument("--chunks", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("step_a_world.webm"), help=".webm, .mp4 or .gif")
    options = parser.parse_args()

    env = RecordChunks(WorldModelEnv(options.world, max_chunks=options.chunks), options.out)
    env.action_space.seed(options.seed)
    observation, info = env.reset(seed=options.seed)
    print(f"a chunk is {observation.shape} {observation.dtype}; actions: {env.action_space}")
    done, total = False, 0.0
    while not done:
        observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
        done, total = terminated or truncated, total + float(reward)
        print(
            f"chunk {info['chunk']:3d}  reward {float(reward):8.2f}  {info['log_prob']:8.1f} nats  "
            f"{info['bits_per_dim']:6.2f} bits/dim  action gain {info['action_gain']:6.2f} nats"
        )
    env.close()
    print(f"return {total:.1f}; every frame is in {options.out}")


if __name__ == "__main__":
    main()
