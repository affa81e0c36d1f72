"""Land the real LunarLander-v3 from pixels: what happens, and beside it what the world had foreseen.

The world observes every real chunk, plans two chunks ahead, and lets its own value and prior judge what is behind them
(`MPCAgent.informed`). `worldmodel evaluate agents lunarlander --only planning` does it on 20 starts.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from agents import MPCAgent, Planner, imagine
from agents.evaluation.trial import TrialConfig, real_env
from agents.objectives import PredictedReward
from envs.recorder import CODECS, write_video
from worldmodel import WorldModel

SCALE, BAND = 5, 20


def side_by_side(real: np.ndarray, foreseen: np.ndarray, text: str) -> np.ndarray:
    """(F, height, width, 3) uint8 of two chunks (F, h, w, 3), enlarged, over a line of text."""
    both = np.concatenate((real, foreseen), axis=2).repeat(SCALE, axis=1).repeat(SCALE, axis=2)
    band = np.zeros((BAND, both.shape[2], 3), dtype=np.uint8)
    cv2.putText(band, text, (4, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (255, 255, 255), 1, cv2.LINE_AA)
    return np.stack([np.concatenate((frame, band)) for frame in both])


def main() -> None:
    """Fly one episode, print its return, write the video; what was flown until Ctrl-C is kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", default="lunarlander", help="a world that ships, or a world directory")
    parser.add_argument("--preset", default="fast", help="fast, quality or paper")
    parser.add_argument("--seed", type=int, default=TrialConfig().seed, help="the real episode's start")
    parser.add_argument(
        "--chunks", type=int, default=250, help="length of the episode at most; a chunk is 4 frames"
    )
    parser.add_argument("--out", type=Path, default=Path("land_lunarlander.mp4"), help=".mp4, .webm or .gif")
    options = parser.parse_args()
    if options.out.suffix not in CODECS:
        parser.error(f"--out is {options.out}, expected a name that ends in one of {', '.join(CODECS)}")

    world = WorldModel.load(options.world)
    env, agent = real_env(world), MPCAgent.informed(world, Planner.preset(options.preset))
    frames, _ = env.reset(seed=options.seed)
    agent.reset(frames, options.seed)
    total, done, video = 0.0, False, list[np.ndarray]()
    with suppress(KeyboardInterrupt):
        for _ in tqdm(range(options.chunks), desc="flight", unit="chunk"):
            action = agent.act(frames if video else None)
            assert agent.state is not None
            foreseen = imagine(world, agent.state, np.array([[action]]), PredictedReward()).frames[0, 0]
            frames, reward, terminated, truncated, _ = env.step(action)
            total, done = total + float(reward), terminated or truncated
            text = f"really (left), foreseen (right)   action {action}   return {total:.0f}"
            video += list(side_by_side(frames, foreseen, text))
            if done:
                break
    if not video:
        sys.exit("nothing was flown, so no video was written")
    write_video(options.out, np.stack(video), world.spec.fps)
    print(f"return {total:.0f} after {len(video) // world.chunk_frames} chunks; a video is in {options.out}")
    env.close()


if __name__ == "__main__":
    main()
