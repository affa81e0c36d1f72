"""Fork one moment into several futures, one action in each; save the moment and come back to it."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from envs import Snapshot, WorldModelEnv, write_video


def main() -> None:
    """Play each branch under one held action and put the branches side by side in a video."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", default="pendulum", help="a world that ships, or a world directory")
    parser.add_argument("--branches", type=int, default=3)
    parser.add_argument("--chunks", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("fork_and_compare.webm"), help=".webm, .mp4 or .gif")
    options = parser.parse_args()

    env = WorldModelEnv(options.world)
    env.reset(seed=options.seed)
    env.action_space.seed(options.seed)
    env.snapshot().save(options.out.with_suffix(".snapshot"))

    columns = []
    for i, child in enumerate(env.fork(options.branches)):
        action, total, frames = env.action_space.sample(), 0.0, [child.new_frames]
        for _ in range(options.chunks):
            observation, reward, *_ = child.step(action)
            frames.append(observation)
            total += reward
        nats = float(child.state.log_prob[0] - env.state.log_prob[0])
        print(
            f"branch {i}: action {action}, reward {total:8.2f}, {nats:9.1f} nats in {options.chunks} chunks"
        )
        columns.append(np.concatenate(frames))
    write_video(options.out, np.concatenate(columns, axis=2), env.fps)

    later = WorldModelEnv(options.world)
    later.restore(Snapshot.load(options.out.with_suffix(".snapshot")))
    action = env.action_space.sample()
    same = np.array_equal(later.step(action)[0], env.step(action)[0])
    print(f"the branches are in {options.out}; the saved moment continues identically: {same}")


if __name__ == "__main__":
    main()
