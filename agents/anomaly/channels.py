"""What a monitor measures of a real chunk: the bank of channels, and where in the frame they come from.

Axis letters: B episodes, T chunks, F pixel frames of a chunk, C latent channels; h, w latent grid; height, width pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from worldmodel import InputError, WorldModel, WorldState
from worldmodel.training.episodes import Episode

BATCH = 64
"""Episodes measured side by side."""


class Clip(NamedTuple):
    """Real chunks and what caused them.

    frames: (T, F, height, width, 3) uint8. actions: (T, ...), a dict of such, or None where they are not known.
    """

    frames: np.ndarray
    actions: Any


def episode_clip(episode: Episode) -> Clip:
    """The chunks of an episode on disk; the picture that `reset` showed belongs to none."""
    chunks = len(episode.rewards)
    frames = episode.frames[1:]
    return Clip(frames.reshape(chunks, len(frames) // chunks, *frames.shape[1:]), episode.actions)


@dataclass(frozen=True)
class Channel:
    """One number a chunk. two_sided: too small a value is as strange as too large a one (Nalisnick et al., 2019)."""

    name: str
    two_sided: bool
    needs_actions: bool = False


CHANNELS = (
    Channel("nll", True),
    Channel("noise_norm", True),
    Channel("action_loss", True, needs_actions=True),
    Channel("reconstruction", True),
    Channel("clean_nll", True),
    Channel("clean_norm", True),
    Channel("clean_peak", True),
    Channel("clean_action_loss", True, needs_actions=True),
)
"""nll: nats of the noised latent given past and action, negative. noise_norm: mean z^2. action_loss: minus the action gain.
reconstruction: mean squared grey levels that the codec misses the frames by. clean_*: the same of the latent itself, with
no noise added: z then holds what the *chunk* does that the world did not expect, and next to nothing else; clean_peak is
its largest |z|."""


def channels_of(world: WorldModel, actions: bool = True) -> tuple[Channel, ...]:
    """The channels that a world has, where actions are known or not."""
    return tuple(c for c in CHANNELS if (actions and world.actions is not None) or not c.needs_actions)


class Measurement(NamedTuple):
    """B chunks. values: (B, channels) float64. cells: (B, h, w) float32, sum over C of clean z^2.

    pixels: (B, height, width) float32, squared grey levels that the codec misses the frames by, mean over F and colours.
    """

    values: np.ndarray
    cells: np.ndarray
    pixels: np.ndarray


@torch.no_grad()
def measure(
    world: WorldModel, state: WorldState, frames: np.ndarray, actions: Any
) -> tuple[WorldState, Measurement]:
    """Observe B chunks, frames (B, F, height, width, 3) uint8, and measure every channel.

    Where the codec begins with fewer frames, those are the last of a first chunk.

    Raises:
        InputError: as `WorldModel.observe`.
    """
    if frames.shape[1:] == world.frames_shape:
        frames = frames[:, -world.next_frames(state) :]
    after, chunk = world.observe(state, frames, actions)
    clean = world.score(state, chunk.latent, actions, noise=torch.zeros_like(chunk.latent))
    shown, _ = world.codec.decode(chunk.latent[:, None], state.codec)
    pixels = (shown.float() - chunk.frames.to(shown.device).float()).square().mean((1, 4))
    square = clean.noise.square()
    named = {
        "nll": -chunk.log_prob,
        "noise_norm": chunk.noise.square().mean((1, 2, 3)),
        "action_loss": -chunk.action_gain,
        "reconstruction": pixels.mean((1, 2)),
        "clean_nll": -clean.log_prob,
        "clean_norm": square.mean((1, 2, 3)),
        "clean_peak": square.amax((1, 2, 3)).sqrt(),
        "clean_action_loss": -clean.action_gain,
    }
    values = torch.stack(
        [named[c.name].cpu().double() for c in channels_of(world, actions is not None)], dim=1
    )
    return after, Measurement(values.numpy(), square.sum(1).cpu().numpy(), pixels.cpu().numpy())


def measure_clips(
    world: WorldModel, clips: Sequence[Clip], title: str, seed: int = 0, progress: bool = True
) -> Iterator[tuple[int, Measurement]]:
    """(index, T chunks) of every clip, each from an empty past and the seed, 64 side by side; longest first.

    Raises:
        InputError: as `WorldModel.observe`, with the clip's number.
    """
    order = sorted(range(len(clips)), key=lambda i: -len(clips[i].frames))
    total = sum(len(clip.frames) for clip in clips)
    with tqdm(total=total, desc=title, unit="chunk", disable=not progress, delay=2, leave=False) as bar:
        for first in range(0, len(order), BATCH):
            rows = order[first : first + BATCH]
            yield from zip(rows, _measure_batch(world, [clips[i] for i in rows], seed, bar), strict=True)


def _measure_batch(world: WorldModel, clips: list[Clip], seed: int, bar: Any) -> list[Measurement]:
    """Clips by falling length; those that have ended leave the batch."""
    lengths = [len(clip.frames) for clip in clips]
    state = world.initial_state([seed] * len(clips))
    parts: list[list[Measurement]] = [[] for _ in clips]
    for t in range(lengths[0]):
        rows = sum(length > t for length in lengths)
        if rows < state.rows:
            state = state.select(range(rows))
        frames = np.stack([clip.frames[t] for clip in clips[:rows]])
        state, seen = measure(world, state, frames, _stack([clip.actions for clip in clips[:rows]], t))
        for row in range(rows):
            parts[row].append(Measurement(*(part[row] for part in seen)))
        bar.update(rows)
    return [Measurement(*(np.stack(part) for part in zip(*chunks, strict=True))) for chunks in parts]


def _stack(actions: list[Any], t: int) -> Any:
    if actions[0] is None:
        return None
    if isinstance(actions[0], dict):
        return {name: np.stack([a[name][t] for a in actions]) for name in actions[0]}
    return np.stack([a[t] for a in actions])


def check_clip(world: WorldModel, clip: Clip, actions: bool, where: str) -> None:
    """Raises InputError for frames of another shape or dtype, an empty clip, or actions that are absent or too many."""
    frames = clip.frames
    expected = world.frames_shape
    if frames.dtype != np.uint8 or frames.ndim != 5 or frames.shape[1:] != expected or not len(frames):
        raise InputError(
            f"{where}: frames are {frames.dtype} {frames.shape}, expected uint8 (T, *{expected})"
        )
    known = clip.actions is not None
    if known != actions:
        raise InputError(
            f"{where}: actions are {'given' if known else 'not given'}, but the monitor is "
            f"{'' if actions else 'not '}to know them; see MonitorConfig.actions"
        )
    parts = list(clip.actions.values()) if isinstance(clip.actions, dict) else [clip.actions]
    if known and any(len(part) != len(frames) for part in parts):
        raise InputError(f"{where}: {len(frames)} chunks, but actions of another length")
