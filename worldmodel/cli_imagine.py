"""``worldmodel rollout``, ``worldmodel generate`` and ``worldmodel play``."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worldmodel.cli_arguments import Device, World, load

if TYPE_CHECKING:
    from worldmodel.world import WorldModel


def rollout(
    world: World = "pendulum",
    chunks: Annotated[int, typer.Option(min=1, help="Chunks to imagine.")] = 50,
    out: Annotated[Path, typer.Option(help="The video: .mp4, .webm or .gif.")] = Path("rollout.mp4"),
    seed: Annotated[int, typer.Option(min=0, help="Start and noise.")] = 0,
    hold: Annotated[int, typer.Option(min=1, help="Chunks that each random action is held for.")] = 4,
    guidance: Annotated[float | None, typer.Option(help="Guidance weight; default: the world's.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Scale of the noise; default: the world's.")
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(help='When the window is full: "reencode" or "rolling"; default: the world\'s.'),
    ] = None,
    scale: Annotated[
        int | None,
        typer.Option(min=1, help="Enlarge the picture so many times; default: 4 where it is small."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="What to imagine, in a world that takes prompts.")
    ] = None,
    device: Device = None,
) -> None:
    """Imagine a future under random actions or a prompt, write it as a video, and print its likelihood. Ctrl-C writes what
    is there.

    Several processes or GPUs: torchrun --nproc-per-node N -m -- worldmodel rollout ... (guidance and heads are spread).
    """
    import numpy as np
    from tqdm import tqdm

    from envs.recorder import CODECS, write_video
    from worldmodel.condition.spaces import prompt_key
    from worldmodel.errors import InputError

    _check_out(out, CODECS)
    model = load(world, device)
    frames: list[np.ndarray] = []
    given: dict[str, Any] = {"guidance": guidance, "temperature": temperature, "context": context}
    sampling = replace(model.spec.sampling, **{k: v for k, v in given.items() if v is not None})
    model = model.with_sampling(sampling)
    if prompt is not None and model.prompts is None:
        raise InputError(f"{world} takes no prompts; leave --prompt out")
    space = model.spec.action_space
    space.seed(seed)
    key = prompt_key(space)
    nats: list[float] = []
    action, stopped = None, False
    with _processes(model, sampling.guidance != 0) as first:
        if model.prompts is not None:
            state = model.initial_state([seed], [prompt or ""])
        else:
            state, begun = model.reset([seed])
            frames = [c.frames[0].cpu().numpy() for c in begun]
        try:
            for t in tqdm(range(chunks), desc="imagine", unit="chunk", disable=not first):
                if t % hold == 0 and key != "":
                    action = _batch_of_one({**space.sample(), key: prompt or ""} if key else space.sample())
                state, chunk = model.step(state, action)
                frames.append(chunk.frames[0].cpu().numpy())
                nats.append(float(chunk.log_prob[0]))
        except KeyboardInterrupt:
            stopped = True
    if first and nats:
        video = np.concatenate(frames)
        scale = scale or (4 if model.spec.frame_size[0] <= 128 else 1)
        write_video(out, np.repeat(np.repeat(video, scale, axis=1), scale, axis=2), model.spec.fps)
        print(f"{out}: {len(video)} frames, mean {np.mean(nats):.1f} nats a chunk (of the noised latent)")
    if stopped:
        print(f"worldmodel: stopped; {len(nats)} of {chunks} chunks were ready", file=sys.stderr)
        sys.exit(130)


def _check_out(out: Path, suffixes: Collection[str]) -> None:
    """Raises InputError for another suffix, and CheckpointError where ``out`` cannot lie."""
    from worldmodel.errors import InputError
    from worldmodel.files import writable

    if out.suffix not in suffixes:
        raise InputError(f"{out.name}: expected a name that ends in one of {', '.join(suffixes)}")
    writable(out.parent)


def _processes(model: WorldModel, guided: bool) -> AbstractContextManager[bool]:
    """The world spread over torchrun's processes, if any; says whether this one shows and writes."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return nullcontext(True)
    from worldmodel.parallel import spread_by_torchrun

    return spread_by_torchrun(model, guided)


def generate(
    world: World,
    prompt: Annotated[str, typer.Option(help="What to show.")] = "",
    image: Annotated[Path | None, typer.Option(help="A picture to begin with.")] = None,
    video: Annotated[Path | None, typer.Option(help="A video to continue; its last frames count.")] = None,
    v2v: Annotated[Path | None, typer.Option(help="A video to make another of, as the prompt says.")] = None,
    seconds: Annotated[float | None, typer.Option(help="How long; default: what the window holds.")] = None,
    chunks: Annotated[
        int | None, typer.Option(min=1, help="How long, in chunks, instead of --seconds.")
    ] = None,
    aspect: Annotated[
        str | None, typer.Option(help="Aspect ratio, as 16:9; default: the world's own size.")
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance weight; default: the world's.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Scale of the noise; default: the world's.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Noise.")] = 0,
    device: Device = None,
    prompt_cache: Annotated[
        Path | None, typer.Option(help="A folder of encoded prompts: those in it need no text encoder.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The video, .mp4, .webm or .gif (a picture, .png, in a world of pictures)."),
    ] = None,
) -> None:
    """Make a video from text, a picture, a video's end or a source video, with the nats of each chunk.

    A world of pictures (apple/starflow) makes one from text. Beside OUT lies OUT.json: what was asked, and for each chunk
    its log_prob (nats, of the noised latent), bits per dimension, Jacobi sweeps. Ctrl-C writes what is there.
    """
    from envs.recorder import CODECS, write_video
    from worldmodel.condition.prompts import frame_size_for
    from worldmodel.errors import InputError
    from worldmodel.files import write_json
    from worldmodel.media import PICTURES, read_clip, read_picture, write_picture
    from worldmodel.tasks import Brief, chunks_for, run

    model = load(world, device, prompt_cache)
    still = not model.spec.fps
    out = out or Path("picture.png" if still else "video.mp4")
    _check_out(out, PICTURES if still else CODECS)
    if still and (image or video or v2v):
        raise InputError(f"{world} makes a picture of a prompt; leave --image, --video and --v2v out")
    given: dict[str, Any] = {"guidance": guidance, "temperature": temperature}
    model = model.with_sampling(
        replace(model.spec.sampling, **{k: v for k, v in given.items() if v is not None})
    )
    if aspect is not None:
        model = model.at(frame_size_for(aspect, model.spec.frame_size, model.codec.spatial_stride))
    if seconds is not None and chunks is not None:
        raise InputError("--seconds and --chunks exclude each other; give one")
    size, fps = model.spec.frame_size, model.spec.fps
    brief = Brief(
        prompt,
        None if image is None else read_picture(image, size),
        None if video is None else read_clip(video, size, fps),
        None if v2v is None else read_clip(v2v, size, fps),
        chunks if seconds is None else chunks_for(model, seconds, goes_on=bool(image or video)),
        seed,
    )
    frames, record = run(model, brief)
    if len(frames):
        if still:
            write_picture(out, frames[0])
        else:
            write_video(out, frames, fps)
        write_json(out.with_name(f"{out.name}.json"), record)
        mean = record["mean_log_prob"] or 0.0
        many, each = ("a picture", "") if still else (f"{len(frames)} frames", " a chunk")
        nats = f"{'' if still else 'mean '}{mean:.1f} nats{each} (of the noised latent)"
        print(f"{out}: {many} of {size[0]} x {size[1]}, {nats}")
    if not record["complete"]:
        print(f"worldmodel: stopped; {len(frames)} frames were ready", file=sys.stderr)
        sys.exit(130)


def _batch_of_one(action: Any) -> Any:
    import numpy as np

    if isinstance(action, dict):
        return {k: _batch_of_one(v) for k, v in action.items()}
    return np.asarray(action)[None]


def play(
    world: World = "pendulum",
    zoom: Annotated[float, typer.Option(help="Size of the window relative to the frame.")] = 6.0,
    seed: Annotated[int | None, typer.Option(min=0, help="Start and noise.")] = None,
    device: Device = None,
) -> None:
    """Play in a world with the keyboard (arrow keys; close the window to stop)."""
    from worldmodel.errors import InputError, WorldModelError

    if not 0.1 <= zoom <= 100:
        raise InputError(f"zoom is {zoom:g}, expected 0.1 to 100")
    try:
        import pygame  # noqa: F401
    except ImportError as error:
        raise WorldModelError('play needs pygame; install it with: pip install "worldmodel[demo]"') from error
    from gymnasium.utils.play import play as run

    from envs.window import screen_found
    from envs.world_env import WorldModelEnv

    if not screen_found():
        raise WorldModelError(
            "no display was found, and play needs a window; play on a desktop, or make a video: worldmodel rollout"
        )
    env = WorldModelEnv(load(world, device), step_mode="frame", render_mode="rgb_array", max_chunks=None)
    run(env, zoom=zoom, seed=seed, keys_to_action=env.get_keys_to_action(), noop=env.noop_action)


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    for command in (rollout, generate, play):
        app.command()(command)
