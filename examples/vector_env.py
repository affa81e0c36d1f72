"""Many sessions in one batch, from one Gymnasium call; how many steps a second that makes."""

from __future__ import annotations

import argparse
import time

import gymnasium
import numpy as np

import envs  # registers the worlds


def main() -> None:
    """Step batches of growing size under random actions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", default="pendulum", help="a world that ships, or a world directory")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()

    for size in options.sizes:
        vector = gymnasium.make_vec(envs.env_id("pendulum"), size, world=options.world, max_chunks=None)
        vector.reset(seed=0)
        vector.action_space.seed(0)
        vector.step(vector.action_space.sample())
        start, bits = time.perf_counter(), []
        for _ in range(options.steps):
            _, _, _, _, info = vector.step(vector.action_space.sample())
            bits.append(info["bits_per_dim"])
        speed = size * options.steps / (time.perf_counter() - start)
        print(f"{size:4d} sessions: {speed:7.1f} chunks/s, {np.mean(bits):6.2f} bits/dim")
        vector.close()


if __name__ == "__main__":
    main()
