"""Step a learned world next to the simulator it was learned from: ``make demo``.

The world observes a few real chunks, then imagines on its own under the same actions (open loop). The video shows the
real pendulum above, the imagined one below, and the likelihood of both under the world: of what really happened, given
the real past, and of what was imagined, given the imagined past. A report says how far they came apart.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from tqdm import tqdm

from envs.real import ChunkedEnv
from envs.recorder import write_video
from worldmodel import WorldModel
from worldmodel.files import write_atomic
from worldmodel.training.measure import psnr
from worldmodel.training.plots import write_sheet
from worldmodel.training.probes import PROBES, wrap

CONTEXT = 3
RED, BLUE = (214, 39, 40), (31, 119, 180)


def real_clip(world: WorldModel, chunks: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frames (T, F, height, width, 3), actions (T, ...) and true angles (T,) of a real episode of random held actions."""
    made = world.spec.environment
    env = ChunkedEnv(
        made["env"], world.chunk_frames, world.spec.frame_size, tuple(made["hide"]), **made["env_kwargs"]
    )
    env.reset(seed=seed)
    env.action_space.seed(seed)
    frames, actions, observations = [], [], []
    action: Any = None
    for t in tqdm(range(chunks), desc="real simulator", unit="chunk"):
        if t % 4 == 0:
            action = env.action_space.sample()
        picture, _, _, _, info = env.step(action)
        frames.append(picture)
        actions.append(action)
        observations.append(info["observation"])
    env.close()
    probe = PROBES.get(made["env"])
    angles = probe[1](np.stack(observations)) if probe else np.full(chunks, np.nan)
    return np.stack(frames), np.stack(actions), angles


def imagine(
    world: WorldModel, frames: np.ndarray, actions: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Imagined frames (T, F, ...), nats (T,) of the real and of the imagined chunks, and seconds a step."""
    real = imagined = world.initial_state([seed])
    pictures, nats_real, nats_imagined, seconds = [], [], [], []
    for t in tqdm(range(len(frames)), desc="world", unit="chunk"):
        real, observed = world.observe(real, frames[None, t], actions[None, t])
        if t < CONTEXT:
            imagined, chunk = real, observed
        else:
            began = time.perf_counter()
            imagined, chunk = world.step(imagined, actions[None, t])
            seconds.append(time.perf_counter() - began)
        pictures.append(chunk.frames[0].numpy())
        nats_real.append(float(observed.log_prob[0]))
        nats_imagined.append(float(chunk.log_prob[0]))
    return np.stack(pictures), np.array(nats_real), np.array(nats_imagined), float(np.median(seconds))


def compose(
    real: np.ndarray, imagined: np.ndarray, nats: tuple[np.ndarray, np.ndarray], scale: int = 5
) -> np.ndarray:
    """Video frames (T * F, ...): real above, imagined below, a strip of nats a chunk drawn as it goes."""
    chunks, per_chunk = real.shape[:2]
    size = real.shape[3] * scale
    values = np.concatenate(nats)
    low, high = np.percentile(values, 1) - 20, values.max() + 20
    video = []
    for index in tqdm(range(chunks * per_chunk), desc="video", unit="frame"):
        t, f = divmod(index, per_chunk)
        panels = []
        for name, clip, colour in (("real", real, BLUE), ("imagined", imagined, RED)):
            panel = cv2.resize(clip[t, f], (size, real.shape[2] * scale), interpolation=cv2.INTER_CUBIC)
            label = name if name == "real" or t >= CONTEXT else "observing the real one"
            cv2.putText(panel, label, (8, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.5, colour, 1, cv2.LINE_AA)
            panels.append(panel)
        strip = np.full((120, size, 3), 255, dtype=np.uint8)
        for series, colour in zip(nats, (BLUE, RED), strict=True):
            x = np.linspace(8, size - 8, chunks)[: t + 1]
            y = 112 - 84 * (np.clip(series[: t + 1], low, high) - low) / (high - low)
            points = np.stack((x, y), axis=1).round().astype(np.int32)
            cv2.polylines(strip, [points[:, None]], False, colour, 1, cv2.LINE_AA)
        text = f"nats a chunk: real {nats[0][t]:.0f}, imagined {nats[1][t]:.0f}"
        cv2.putText(strip, text, (8, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (60, 60, 60), 1, cv2.LINE_AA)
        line = np.full((2, size, 3), 200, dtype=np.uint8)
        video.append(np.concatenate((panels[0], line, panels[1], line, strip)))
    return np.stack(video)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", default="pendulum", help="a shipped world or a world directory")
    parser.add_argument("--chunks", type=int, default=45, help="length of the episode")
    parser.add_argument("--seed", type=int, default=2026, help="start, actions and noise")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the video and the report")
    options = parser.parse_args()

    torch.set_num_threads(1)  # one session of a small world: more threads only wait for each other
    world = WorldModel.load(options.world)
    frames, actions, angles = real_clip(world, options.chunks, options.seed)
    imagined, nats_real, nats_imagined, seconds = imagine(world, frames, actions, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    write_video(
        options.out / "demo.webm", compose(frames, imagined, (nats_real, nats_imagined)), world.spec.fps / 2
    )
    rows = [np.concatenate(list(clip[:16, -1]), axis=1) for clip in (frames, imagined)]
    write_sheet(options.out / "demo.png", np.repeat(np.repeat(np.concatenate(rows), 2, axis=0), 2, axis=1))

    horizons = [h for h in (1, 2, 5, 8, 12, 20, 30) if CONTEXT + h <= options.chunks]
    probe = PROBES.get(world.spec.environment["env"])
    quality = psnr(imagined[None], frames[None])[0]
    table = []
    for h in horizons:
        row = {"chunks": h, "psnr": round(float(quality[CONTEXT + h - 1]), 2)}
        if probe is not None:
            off = np.degrees(abs(wrap(probe[0](imagined[CONTEXT + h - 1, -1]) - angles[CONTEXT + h - 1])))
            row["angle_error_degrees"] = round(float(off), 2)
        table.append(row)
    report = {
        "world": world.spec.name,
        "seed": options.seed,
        "context_chunks": CONTEXT,
        "temperature": world.spec.sampling.temperature,
        "seconds_per_step": round(seconds, 4),
        "frames_per_second": round(world.chunk_frames / seconds, 1),
        "mean_nats_real": round(float(nats_real[CONTEXT:].mean()), 2),
        "mean_nats_imagined": round(float(nats_imagined[CONTEXT:].mean()), 2),
        "by_horizon": table,
    }
    write_atomic(
        options.out / "report.json", lambda f: f.write_text(json.dumps(report, indent=2) + "\n") and None
    )
    write_atomic(options.out / "report.md", lambda f: f.write_text(report_text(report)) and None)
    print(report_text(report))
    print(f"written: {options.out}/demo.webm, demo.png, report.md, report.json")


def report_text(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    columns = list(report["by_horizon"][0]) if report["by_horizon"] else []
    lines = [
        f"# A learned world beside the real one: {report['world']}, seed {report['seed']}",
        "",
        f"After {report['context_chunks']} real chunks the world went on alone, under the same actions. One episode, no",
        "average: for held-out statistics with confidence intervals run `worldmodel evaluate`.",
        "",
        "| " + " | ".join(c.replace("_", " ") for c in columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(f"{row.get(c, '')}" for c in columns) + " |" for row in report["by_horizon"]),
        "",
        f"* Likelihood of the noised latent: {report['mean_nats_real']} nats a chunk for what really happened (given the",
        f"  real past), {report['mean_nats_imagined']} for what was imagined (given the imagined past). Imagined at",
        f"  temperature {report['temperature']}: below 1 a sample has less noise, and more nats, than anything real.",
        f"* One step (4 frames with their likelihood): {1000 * report['seconds_per_step']:.0f} ms here,",
        f"  {report['frames_per_second']} frames a second.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
