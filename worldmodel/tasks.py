"""What STARFlow-V was trained to do, as sessions of a world: videos and pictures from text, a picture, a clip or a source.

    text-to-video        nothing is observed; the prompt is all there is
    image-to-video       the picture is observed as the first chunk, and goes on
    video continuation   the clip's last chunks are observed, and go on
    video-to-video       the source is observed; then the target begins as a clip of its own, chunk by chunk as long
    text-to-image        a world of pictures (``fps`` 0): one chunk

Longer videos than the window go on from its last frames, under a caption that says so; see `worldmodel.prompted`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from worldmodel.condition.prompts import for_task
from worldmodel.errors import InputError
from worldmodel.world import Chunk, WorldModel


@dataclass(frozen=True)
class Brief:
    """What is to be made. prompt: the caption. At most one of: image (height, width, 3), clip and source
    (n, height, width, 3), uint8 RGB. chunks: how many to imagine; None for what the window holds, and for as many as
    the source has.
    """

    prompt: str = ""
    image: np.ndarray | None = None
    clip: np.ndarray | None = None
    source: np.ndarray | None = None
    chunks: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises InputError for several things to begin with."""
        if sum(x is not None for x in (self.image, self.clip, self.source)) > 1:
            raise InputError("an image, a video and a source exclude each other; give one")
        if self.chunks is not None and self.chunks < 1:
            raise InputError(f"chunks is {self.chunks}, expected at least 1")

    @property
    def task(self) -> str:
        """The name of the task."""
        if self.source is not None:
            return "video-to-video"
        if self.clip is not None:
            return "video continuation"
        return "text-to-video" if self.image is None else "image-to-video"


@dataclass(frozen=True)
class Made:
    """A chunk of the result (one session), and how it came about."""

    kind: Literal["observed", "imagined"]
    chunk: Chunk


def chunks_for(world: WorldModel, seconds: float, goes_on: bool = False) -> int:
    """Chunks of a video of at least so many seconds, or of so many more where it ``goes_on``.

    Raises:
        InputError: not a positive time, or a world of pictures.
    """
    if not (math.isfinite(seconds) and seconds > 0) or not world.spec.fps:
        raise InputError(f"{seconds} seconds at {world.spec.fps:g} frames a second is no video")
    frames, first = seconds * world.spec.fps - 1e-6, 0 if goes_on else world.first_frames
    return (0 if goes_on else 1) + max(0, math.ceil((frames - first) / world.chunk_frames))


def make(world: WorldModel, brief: Brief) -> Iterator[Made]:
    """The chunks of the result one after the other, as they are ready: those observed of a clip, then the imagined ones.

    Raises:
        InputError: a prompt in a world that takes none, frames of another size, or as `imagined_chunks`.
    """
    count = imagined_chunks(world, brief)
    caption = for_task(brief.prompt, "v2v") if brief.source is not None else brief.prompt
    prompts = [caption] if world.prompts is not None or caption else None
    state = world.initial_state([brief.seed], prompts)
    given = _given(world, brief)
    shown = brief.source is None
    for part in [] if given is None else world.chunks_of(given[None]):
        state, chunk = world.observe(state, np.ascontiguousarray(part))
        if shown:
            yield Made("observed", chunk)
    if not shown:
        state = world.begin_clip(state)
    for _ in range(count):
        state, chunk = world.step(state)
        yield Made("imagined", chunk)


def imagined_chunks(world: WorldModel, brief: Brief) -> int:
    """How many chunks `make` imagines.

    Raises:
        InputError: more than one picture, or something to begin with, in a world of pictures; or a source and a target
            that do not fit the window.
    """
    if not world.spec.fps:
        if any(x is not None for x in (brief.image, brief.clip, brief.source)) or (brief.chunks or 1) > 1:
            raise InputError(
                f"{world.spec.name} makes one picture of a prompt: nothing comes before it or after it"
            )
        return 1
    given = _given(world, brief)
    seen = 0 if given is None else len(world.chunks_of(given[None]))
    if brief.source is not None:
        if brief.chunks is not None and seen + brief.chunks > world.flow.config.window:
            raise InputError(
                f"a source of {seen} chunks and a target of {brief.chunks} do not fit the window of "
                f"{world.flow.config.window}"
            )
        return brief.chunks or seen
    return brief.chunks or max(1, world.flow.config.window - seen)


def _given(world: WorldModel, brief: Brief) -> np.ndarray | None:
    """The frames (n, height, width, 3) that a session observes: whole chunks, no more than it can keep."""
    window = world.flow.config.window
    if brief.image is not None:
        return np.repeat(brief.image[None], world.first_frames, axis=0)
    if brief.clip is not None:
        most = max(1, min(world.flow.config.context, window - 1))
        whole = _whole(world, len(brief.clip), most)
        return brief.clip[len(brief.clip) - whole :]
    if brief.source is not None:
        return brief.source[: _whole(world, len(brief.source), max(1, window // 2))]
    return None


def _whole(world: WorldModel, frames: int, most: int) -> int:
    """Frames of at most ``most`` whole chunks.

    Raises:
        InputError: not even one.
    """
    if frames < world.first_frames:
        raise InputError(f"a clip of {frames} frames, expected at least {world.first_frames}")
    more = min(most - 1, (frames - world.first_frames) // world.chunk_frames)
    return world.first_frames + more * world.chunk_frames


def run(world: WorldModel, brief: Brief) -> tuple[np.ndarray, dict[str, Any]]:
    """Frames (n, height, width, 3) uint8 and a record for JSON; after Ctrl-C those that were ready, ``complete`` False.

    Raises:
        InputError: as `worldmodel.tasks.make`.
    """
    made: list[Made] = []
    total, complete = imagined_chunks(world, brief), True
    with tqdm(total=total, desc=brief.task, unit="chunk") as bar:
        try:
            for item in make(world, brief):
                made.append(item)
                if item.kind == "imagined":
                    bar.set_postfix(nats=f"{float(item.chunk.log_prob[0]):.0f}")
                    bar.update()
        except KeyboardInterrupt:
            complete = False
    frames = [item.chunk.frames[0].cpu().numpy() for item in made]
    return (
        np.concatenate(frames) if frames else np.zeros((0, *world.spec.frame_size, 3), np.uint8),
        _record(world, brief, made, complete),
    )


def _record(world: WorldModel, brief: Brief, made: list[Made], complete: bool) -> dict[str, Any]:
    imagined = [float(item.chunk.log_prob[0]) for item in made if item.kind == "imagined"]
    return {
        "world": world.spec.name,
        "fingerprint": world.fingerprint,
        "task": brief.task if world.spec.fps else "text-to-image",
        "prompt": brief.prompt,
        "text": None if world.prompts is None else world.prompts.text(brief.prompt),
        "seed": brief.seed,
        "frame_size": list(world.spec.frame_size),
        "fps": world.spec.fps,
        "sampling": asdict(world.spec.sampling),
        "complete": complete,
        "mean_log_prob": float(np.mean(imagined)) if imagined else None,
        "chunks": [_chunk(item) for item in made],
    }


def _chunk(item: Made) -> dict[str, Any]:
    c = item.chunk
    guided = c.guided_log_prob
    return {
        "kind": item.kind,
        "frames": c.frames.shape[1],
        "log_prob": float(c.log_prob[0]),
        "guided_log_prob": None if guided is None else float(guided[0]),
        "bits_per_dim": float(c.bits_per_dim[0]),
        "prompt_gain": float(c.action_gain[0]),
        "sweeps": int(c.sweeps[0]),
        "context_frames": int(c.context_frames[0]),
    }
