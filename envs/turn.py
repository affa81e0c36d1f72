"""A session's current chunk as an environment shows it, and how sessions begin: pure functions that both
shells use.

Axis letters: B sessions, T chunks, F pixel frames of a chunk, C latent channels; h, w latent grid.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from envs.options import RESET_OPTIONS, EnvOptions
from worldmodel import Chunk, InputError, WorldModel, WorldState
from worldmodel.chunk import actions_at
from worldmodel.training.episodes import EpisodeDataset

Info = dict[str, float | int]
TOLD = ("log_prob", "bits_per_dim", "action_gain", "sweeps", "residual", "context_frames")
"""What ``info`` tells of a chunk, beside its number."""


@dataclass(frozen=True)
class Turn:
    """One session's current chunk.

    frames: (F, height, width, 3) uint8. latent: (C, h, w) float32. reward: of the whole chunk. terminated,
    truncated: the episode ends with this chunk. info: finite Python numbers. shown: how many of the F
    frames the user has seen.
    """

    frames: np.ndarray
    latent: np.ndarray
    reward: float
    terminated: bool
    truncated: bool
    info: Info
    shown: int

    @property
    def over(self) -> bool:
        """Every frame has been shown; the next step needs a new chunk."""
        return self.shown == len(self.frames)

    def next_frame(self) -> Turn:
        """The same chunk with one more frame shown."""
        return replace(self, shown=self.shown + 1)

    def new_frames(self, options: EnvOptions) -> np.ndarray:
        """(n, height, width, 3) uint8: the frames that the last reset or step brought."""
        return self.frames if options.step_mode == "chunk" else self.frames[self.shown - 1 : self.shown]

    def observation(self, options: EnvOptions) -> np.ndarray:
        """What the agent sees; a copy."""
        if options.observation == "latent":
            return self.latent.copy()
        return (self.frames if options.step_mode == "chunk" else self.frames[self.shown - 1]).copy()

    def outcome(self, options: EnvOptions) -> tuple[np.ndarray, float, bool, bool, Info]:
        """What `Env.step` returns. Frame by frame, the reward is split evenly and the flags come last."""
        return self.observation(options), *self.verdict(options), dict(self.info)

    def verdict(self, options: EnvOptions) -> tuple[float, bool, bool]:
        """Reward, terminated and truncated of an `outcome`."""
        share = 1 if options.step_mode == "chunk" else len(self.frames)
        return self.reward / share, self.terminated and self.over, self.truncated and self.over


def turns(
    chunk: Chunk, counts: Sequence[int], horizons: Sequence[int | None], options: EnvOptions
) -> list[Turn]:
    """The B sessions of a chunk; ``counts`` are chunks since each one's reset, 0 for the reset itself."""
    frames, latent = chunk.frames.cpu().numpy(), chunk.latent.cpu().numpy()
    told = {name: getattr(chunk, name).tolist() for name in TOLD}
    rewards, ends = chunk.reward.tolist(), chunk.termination.tolist()
    shown = frames.shape[1] if options.step_mode == "chunk" else 1
    result = []
    for b, (count, horizon) in enumerate(zip(counts, horizons, strict=True)):
        info: Info = {name: values[b] for name, values in told.items()} | {"chunk": int(count)}
        at_reset = count == 0
        result.append(
            Turn(
                frames[b],
                latent[b],
                0.0 if at_reset else rewards[b],
                not at_reset and ends[b] > options.termination_threshold,
                not at_reset and horizon is not None and count >= horizon,
                info,
                frames.shape[1] if at_reset else shown,
            )
        )
    return result


def chunk_rows(chunk: Chunk, rows: Sequence[int]) -> Chunk:
    """The given sessions of a chunk, in that order."""
    index = torch.tensor(list(rows), dtype=torch.int64)
    guided = chunk.guided_log_prob
    whole = {f.name: getattr(chunk, f.name) for f in fields(chunk)}
    picked = {k: v[index.to(v.device)] for k, v in whole.items() if v is not None}
    return Chunk(**{"guided_log_prob": guided, **picked})


def chunks_apart(chunk: Chunk) -> list[Chunk]:
    """Each session of a chunk alone, sharing no pixels and latents with the others."""
    if len(chunk.log_prob) == 1:
        return [chunk]
    whole = {f.name: getattr(chunk, f.name) for f in fields(chunk)}
    split = {name: x.split(1) for name, x in whole.items() if x is not None}
    for name in ("frames", "latent", "noise", "log_prob_map"):
        split[name] = [x.clone() for x in split[name]]
    rows = zip(*split.values(), strict=True)
    return [Chunk(**{"guided_log_prob": None, **dict(zip(split, row, strict=True))}) for row in rows]


def concat_chunks(chunks: Sequence[Chunk]) -> Chunk:
    """Sessions of several chunks in one; an unguided chunk's ``guided_log_prob`` is its ``log_prob``."""
    if len(chunks) == 1:
        return chunks[0]
    guided = any(c.guided_log_prob is not None for c in chunks)
    joined: dict[str, torch.Tensor] = {}
    for name in (f.name for f in fields(Chunk)):
        parts = [getattr(c, name) for c in chunks]
        if name == "guided_log_prob":
            parts = [c.log_prob if p is None else p for c, p in zip(chunks, parts, strict=True)]
        joined[name] = torch.cat([p.to(parts[0].device) for p in parts])
    whole = Chunk(**joined)
    return whole if guided else replace(whole, guided_log_prob=None)


def session_seed(rng: np.random.Generator) -> int:
    """The seed of a new session's noise."""
    return int(rng.integers(2**62))


def child_stream(rng: np.random.Generator, state: WorldState, child: int) -> Any:
    """The state of the random stream of a forked environment, whose session ``state`` (B = 1) is: child 0 has its parent's,
    others one of their own branch and step.
    """
    parent: Any = copy.deepcopy(rng.bit_generator.state)
    if not child:
        return parent
    own = [*parent["state"].values(), int(state.branches[0]), int(state.steps[0])]
    return np.random.PCG64(np.random.SeedSequence(own)).state


class Start(NamedTuple):
    """What a session observes first: a clip (n, height, width, 3) uint8 of whole chunks, and actions (T, ...) or None.

    With no frames (n = 0) its first chunk is imagined. prompt: its caption, in worlds that take some.
    """

    frames: np.ndarray
    actions: Any
    prompt: str | None = None


def choose_start(world: WorldModel, source: Mapping[str, Any], rng: np.random.Generator) -> Start:
    """What a session begins with; draws from ``rng`` for the bank alone.

    A prompt without anything to look at begins with an imagined chunk, and so does a world without a bank that takes
    prompts.

    Raises:
        InputError: frames of the wrong shape or dtype, an index out of range, or a prompt in a world that takes none.
            DataError: not a dataset.
    """
    if world.prompts is None:
        if "prompt" in source:
            raise InputError("this world takes no prompts; start from " + ", ".join(RESET_OPTIONS[1:-1]))
        return _seen(world, source, rng)
    prompt = source.get("prompt")
    if (prompt is not None and set(source) == {"prompt"}) or (not source and "frames" not in world.starts):
        return Start(np.zeros((0, *world.spec.frame_size, 3), np.uint8), None, prompt or "")
    start = _seen(world, source, rng)
    if prompt is None or start.actions is None:
        return start._replace(prompt=prompt)
    batch = map_actions(start.actions, lambda values: np.asarray(values)[None])
    told = world.with_prompts(batch, [prompt])
    actions = None if told is None else map_actions(told, lambda values: values[0])
    return Start(start.frames, actions, prompt)


def map_actions(actions: Any, function: Callable[[Any], Any]) -> Any:
    """``function`` of actions, or of each array in a dict of such."""
    return (
        {k: map_actions(v, function) for k, v in actions.items()}
        if isinstance(actions, Mapping)
        else function(actions)
    )


def _seen(world: WorldModel, source: Mapping[str, Any], rng: np.random.Generator) -> Start:
    if "image" in source:
        image = _pixels(world, source["image"], "image", 3)
        return Start(np.broadcast_to(image, (world.first_frames, *image.shape)), None)
    if "clip" in source:
        clip = _pixels(world, source["clip"], "clip", 4)
        if len(clip) < world.first_frames:
            raise InputError(
                f"clip has {len(clip)} frames, expected at least {world.first_frames}; or give an image"
            )
        return Start(clip[(len(clip) - world.first_frames) % world.chunk_frames :], None)
    if "episode" in source:
        return _episode(world, source["episode"])
    if "frames" not in world.starts:
        raise InputError("this world has no bank of clips; reset with an image or a clip in options")
    bank = world.starts["frames"]
    index = source["bank_index"] if "bank_index" in source else int(rng.integers(len(bank)))
    if not _is_int(index) or not 0 <= index < len(bank):
        raise InputError(f"bank_index is {index!r}, expected an integer in [0, {len(bank)})")
    return Start(bank[index].reshape(-1, *bank.shape[-3:]), world.start_actions(np.asarray(index)))


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _pixels(world: WorldModel, value: Any, name: str, dims: int) -> np.ndarray:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InputError(f"{name} is not an array: {error}") from error
    expected = (*world.spec.frame_size, 3)
    if array.dtype != np.uint8 or array.ndim != dims or array.shape[-3:] != expected:
        wanted = expected if dims == 3 else ("n", *expected)
        raise InputError(
            f"{name} has shape {array.shape} and dtype {array.dtype}, expected {wanted} uint8".replace(
                "'", ""
            )
        )
    return array


def real_chunk(world: WorldModel, frames: Any) -> np.ndarray:
    """A copy of a real chunk, checked: (F, height, width, 3) uint8.

    Raises:
        InputError: another shape or dtype.
    """
    array = np.array(_pixels(world, frames, "frames", 4))
    if len(array) != world.chunk_frames:
        raise InputError(f"{len(array)} frames, expected the {world.chunk_frames} of one chunk")
    return array


def _episode(world: WorldModel, where: Any) -> Start:
    if not isinstance(where, tuple | list) or len(where) != 3 or not all(_is_int(i) for i in where[1:]):
        raise InputError(f"episode is {where!r}, expected (dataset directory, episode index, first chunk)")
    folder, index, first = Path(where[0]), int(where[1]), int(where[2])
    data = EpisodeDataset.open(folder)
    if data.frame_size != world.spec.frame_size or data.frame_skip != world.chunk_frames:
        raise InputError(
            f"{folder}: chunks of {data.frame_skip} frames of {data.frame_size}, "
            f"expected {world.chunk_frames} of {world.spec.frame_size}"
        )
    if not 0 <= index < data.episodes:
        raise InputError(f"episode index is {index}, expected one in [0, {data.episodes})")
    episode = data.episode(index)
    length = world.start_chunks
    last = len(episode.rewards) - length
    if last < 0:
        raise InputError(
            f"episode {index} has {len(episode.rewards)} of the {length} chunks of a start; choose another"
        )
    if not 0 <= first <= last:
        raise InputError(f"first chunk is {first}, expected one in [0, {last}] of episode {index}")
    span = slice(first, first + length)
    frames = episode.frames[1 + first * world.chunk_frames : 1 + (first + length) * world.chunk_frames]
    actions: Any = None
    if world.actions is not None:
        raw = episode.actions
        actions = {k: v[span] for k, v in raw.items()} if isinstance(raw, Mapping) else raw[span]
    return Start(frames[world.chunk_frames - world.first_frames :], actions)


def begin(world: WorldModel, starts: Sequence[Start], seeds: Sequence[int]) -> tuple[WorldState, Chunk]:
    """B sessions that have observed their starts, and the last chunk each one observed.

    Raises:
        InputError: actions that the world does not take.
    """
    groups: dict[tuple[int, bool], list[int]] = {}
    for row, start in enumerate(starts):
        groups.setdefault((len(start.frames), start.actions is None), []).append(row)
    told = world.prompts is not None
    states, lasts, order = [], [], []
    for (length, bare), rows in groups.items():
        prompts = [starts[r].prompt or "" for r in rows] if told else None
        state = world.initial_state([seeds[r] for r in rows], prompts)
        frames = np.stack([starts[r].frames for r in rows])
        actions = None if bare else _stack([starts[r].actions for r in rows])
        if not length:
            state, chunk = world.step(state)
        for t, part in enumerate(world.chunks_of(frames) if length else []):
            state, chunk = world.observe(state, part, actions_at(actions, t))
        states.append(state)
        lasts.append(_held(chunk, world.chunk_frames))
        order += rows
    back = [order.index(row) for row in range(len(starts))]
    state, chunk = WorldState.concat(states), concat_chunks(lasts)
    return (state, chunk) if len(groups) == 1 else (state.select(back), chunk_rows(chunk, back))


def _held(chunk: Chunk, length: int) -> Chunk:
    """The chunk with its first frame held so that it has ``length`` frames: how a first chunk of one picture is shown."""
    lead = length - chunk.frames.shape[1]
    return (
        replace(chunk, frames=torch.cat((chunk.frames[:, :1].expand(-1, lead, -1, -1, -1), chunk.frames), 1))
        if lead
        else chunk
    )


def _stack(actions: Sequence[Any]) -> Any:
    if isinstance(actions[0], Mapping):
        return {key: _stack([a[key] for a in actions]) for key in actions[0]}
    return np.stack(actions)
