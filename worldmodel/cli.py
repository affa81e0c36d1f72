"""The command line: ``worldmodel --help``."""

from __future__ import annotations

import json
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from worldmodel import cli_bench, cli_serving, cli_watch

if TYPE_CHECKING:
    from worldmodel.world import WorldModel

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    help="STARFlow-V as a world you can step: learn a world from a real environment, imagine in it, measure it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

World = Annotated[
    str,
    typer.Argument(
        help="A world that ships with the package (pendulum), a world directory, or apple/starflow-v."
    ),
]


@app.command()
def info(
    world: World,
    as_json: Annotated[bool, typer.Option("--json", help="Print world.json, or the plan, as JSON.")] = False,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Print what it needs and how much of it fits here; loads nothing, needs no weights.",
        ),
    ] = False,
) -> None:
    """What a world is: spaces, sizes, how it was made, and its measured quality."""
    if plan:
        _print_plan(world, as_json)
        return
    from worldmodel.checkpoint import read_world
    from worldmodel.files import config_to_dict
    from worldmodel.published import obtain

    files = read_world(obtain(world))
    spec = files.spec
    if as_json:
        print(json.dumps(config_to_dict(spec), indent=2))
        return
    count = {part: sum(t.numel() for t in tensors.values()) for part, tensors in files.tensors.items()}
    size = sum(f.stat().st_size for f in files.path.iterdir())
    frames = spec.codec.frames
    rows = [
        ("world", f"{spec.name}   ({files.path})"),
        ("environment", spec.environment.get("env", "unknown")),
        (
            "frames",
            f"{spec.frame_size[0]} x {spec.frame_size[1]} uint8 RGB at {spec.fps:g} a second, {frames} a chunk",
        ),
        ("actions", str(spec.action_space)),
        ("window", f"{spec.flow.window} latent frames, {spec.flow.context} kept when re-encoded"),
        (
            "noise",
            f"{spec.flow.noise_std} on the latent: log_prob is the density of the noised latent, in nats",
        ),
        ("parameters", ", ".join(f"{k} {v / 1e6:.2f} M" for k, v in count.items())),
        ("size", f"{size / 1e6:.1f} MB on disk, fingerprint {files.fingerprint[:12]}"),
        (
            "starts",
            f"{len(files.starts['frames'])} real clips" if files.starts else "none: begin with a picture",
        ),
    ]
    rows += [
        (f"quality: {k}", ", ".join(f"{n} {x:.4g}" for n, x in v.items())) for k, v in spec.quality.items()
    ]
    for name, value in rows:
        print(f"{name:16s} {value}")


def _print_plan(world: str, as_json: bool) -> None:
    from worldmodel.plan import devices, plan
    from worldmodel.published import planned_spec

    counted = plan(planned_spec(world))
    if as_json:
        print(json.dumps(counted.to_json(devices()), indent=2))
    else:
        print("\n".join([f"{counted.name}: before anything is loaded", *counted.lines(devices())]))


@app.command()
def collect(
    recipe: Annotated[
        str, typer.Argument(help="A recipe (pendulum), a recipe file, or the id of a Gymnasium environment.")
    ],
    out: Annotated[Path | None, typer.Option(help="Where to; default data/NAME.")] = None,
    episodes: Annotated[int | None, typer.Option(help="How many episodes.")] = None,
    chunks: Annotated[int | None, typer.Option(help="Length of an episode in chunks.")] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="Behaviour policy NAME or NAME=SHARE; may be given several times."),
    ] = None,
    hide: Annotated[
        list[str] | None, typer.Option(help="Attribute of the simulator to set to None while filming.")
    ] = None,
    frame_size: Annotated[int | None, typer.Option(help="Height and width of the frames in pixels.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the whole collection.")] = None,
    workers: Annotated[int, typer.Option(help="Processes.")] = 2,
) -> None:
    """Collect episodes from a real environment that renders; lossless, resumable, documented in docs/episodes.md."""
    from worldmodel.training.collect import CollectConfig, PolicyShare
    from worldmodel.training.collect import collect as run
    from worldmodel.training.recipes import RECIPES, load_recipe

    named = recipe in RECIPES or Path(recipe).is_file()
    config = load_recipe(recipe).collect if named else CollectConfig(env=recipe)
    changes: dict[str, Any] = {"episodes": episodes, "chunks": chunks, "seed": seed, "workers": workers}
    changes["hide"] = tuple(hide) if hide else None
    changes["frame_size"] = (frame_size, frame_size) if frame_size else None
    changes["policies"] = tuple(PolicyShare(*_share(p)) for p in policy) if policy else None
    config = replace(config, **{k: v for k, v in changes.items() if v is not None})
    name = load_recipe(recipe).name if named else recipe.replace("/", "-")
    folder = out or Path("data") / name
    run(config, folder)
    print(f"{config.episodes} episodes in {folder}")


def _share(text: str) -> tuple[str, float]:
    name, _, share = text.partition("=")
    try:
        return name, float(share or 1.0)
    except ValueError:
        raise typer.BadParameter(f"{text!r}: expected NAME or NAME=SHARE") from None


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe (pendulum), or a recipe file.")],
    data: Annotated[Path | None, typer.Option(help="The episodes; default data/NAME.")] = None,
    run: Annotated[Path | None, typer.Option(help="Checkpoints and logs; default runs/NAME.")] = None,
    out: Annotated[Path | None, typer.Option(help="The world directory; default RUN/world.")] = None,
    until: Annotated[str, typer.Option(help="Stop after this stage: codec, flow or heads.")] = "heads",
    print_recipe: Annotated[
        bool, typer.Option(help="Print the recipe as JSON and stop: a start for your own.")
    ] = False,
) -> None:
    """Train codec, flow, denoiser and heads on collected episodes and write a world.

    Kill it at any moment and run the same command again: it continues. TensorBoard logs lie in RUN/*/tensorboard.
    Several processes or GPUs: torchrun --nproc-per-node N -m -- worldmodel train RECIPE (FSDP2).
    """
    from worldmodel.files import config_to_dict
    from worldmodel.training.recipes import load_recipe

    chosen = load_recipe(recipe)
    if print_recipe:
        print(json.dumps(config_to_dict(chosen), indent=2))
        return
    from worldmodel.training.export import train_world
    from worldmodel.training.parallel import Ranks

    run = run or Path("runs") / chosen.name
    out = out or run / "world"
    with Ranks.joined() as ranks:
        world = train_world(chosen, data or Path("data") / chosen.name, run, out, until, ranks)
    if ranks.first:
        done = f"world written to {out}; look at it with: worldmodel info {out}"
        print(done if world else f"{until} done, in {run}")


@app.command()
def finetune(
    world: World,
    data: Annotated[
        str,
        typer.Option(
            help="minari:NAME, or a folder: of LeRobot, of videos beside captions (clip.txt) or actions "
            "(clip.npy, clip.csv, clip.json), or of collected episodes."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The world directory to write.")],
    lora: Annotated[int, typer.Option(help="Rank of the low-rank adapters.")] = 16,
    full: Annotated[bool, typer.Option("--full", help="Train every weight instead of adapters.")] = False,
    run: Annotated[
        Path | None, typer.Option(help="Converted data, checkpoints and logs; default runs/OUT.")
    ] = None,
    camera: Annotated[str | None, typer.Option(help="Which pictures, where the data has several.")] = None,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 2_000,
    minutes: Annotated[float | None, typer.Option(help="End after so many minutes, if sooner.")] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-4,
    batch: Annotated[int, typer.Option(help="Windows a step, over all processes.")] = 16,
    length: Annotated[int, typer.Option(help="Latent frames a window, at most the world's.")] = 16,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Activation checkpointing: less memory, more time.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the training.")] = 0,
) -> None:
    """Fine-tune a world on your data; one without actions learns them (unchanged until it is trained).

    Kill it at any moment and run the same command again: it continues. TensorBoard logs lie in RUN/flow/tensorboard.
    Several processes or GPUs: torchrun --nproc-per-node N -m -- worldmodel finetune ... (FSDP2).
    Adapters are merged into the weights that are written; apart, they stay in RUN/flow.
    """
    from worldmodel.training.finetune import Finetune
    from worldmodel.training.finetune import finetune as train_further
    from worldmodel.training.loop import LoopConfig
    from worldmodel.training.parallel import Ranks

    loop = LoopConfig(steps=steps, minutes=minutes, lr=lr, warmup=min(50, steps), seed=seed)
    config = Finetune(
        loop,
        lora=0 if full else lora,
        batch=batch,
        length=length,
        recompute=recompute,
        compiled=steps >= 500,  # compiling takes as long as hundreds of steps
    )
    folder = run or Path("runs") / out.name
    with Ranks.joined() as ranks:
        tuned = train_further(world, data, folder, out, config, camera, ranks=ranks)
    if tuned is not None:
        print(f"world written to {out}; look at it with: worldmodel info {out}")
        for name, values in tuned.spec.quality.items():
            print(f"{name}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()))


class WorldFirst(TyperGroup):
    """``evaluate WORLD`` is ``evaluate world WORLD``: what names no subcommand is the world's."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See the class."""
        known = args and (args[0] in self.commands or args[0] in ctx.help_option_names)
        return super().parse_args(ctx, args if known else ["world", *args])


evaluate_app = typer.Typer(
    cls=WorldFirst,
    help="Measure a world on held-out real episodes (`evaluate WORLD`), or what agents do with it in the real "
    "environment (`evaluate agents WORLD`).",
    add_completion=False,
    rich_markup_mode=None,
)
app.add_typer(evaluate_app, name="evaluate")


@evaluate_app.command("agents")
def evaluate_agents(
    world: World = "pendulum",
    out: Annotated[
        Path | None, typer.Option(help="Where JSON and plots go; default evaluation/NAME-agents.")
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            help="Sections, with commas between: planning, fidelity, inference, counterfactuals, termination, "
            "imagination, anomalies. Default: all that fit the world."
        ),
    ] = None,
    starts: Annotated[int, typer.Option(help="Held-out starts of an episode.")] = 20,
    clips: Annotated[int, typer.Option(help="Held-out clips for inference and counterfactuals.")] = 100,
    chunks: Annotated[
        int | None,
        typer.Option(help="At most so many chunks of an episode; default: the environment's limit."),
    ] = None,
    preset: Annotated[str, typer.Option(help="Of the planner: fast, quality or paper.")] = "fast",
    policy_chunks: Annotated[int, typer.Option(help="Imagined chunks that PPO learns from.")] = 60_000,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON instead of the summary.")] = False,
) -> None:
    """Agents proven in the real environment: planning, inference, counterfactuals, learning in imagination, anomalies.

    Every section is kept in OUT/sections with its finished parts: kill it at any moment and run the same command again.
    About an hour and a half on one CPU core.
    """
    from agents.evaluation import evaluate_agents as run
    from agents.evaluation import summary
    from agents.trial import TrialConfig
    from worldmodel.world import WorldModel

    model = WorldModel.load(world)
    config = TrialConfig(starts, chunks, preset, clips, policy_chunks)
    folder = out or Path("evaluation") / f"{model.spec.name}-agents"
    numbers = run(model, folder, config, only.split(",") if only else ())
    print(json.dumps(numbers, indent=2) if as_json else summary(numbers))
    print(f"written to {folder}", file=sys.stderr)


@evaluate_app.command("world")
def evaluate(
    world: World = "pendulum",
    data: Annotated[
        Path | None,
        typer.Option(help="Real episodes; default: fresh ones are collected, with a seed of their own."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where JSON and plots go; default evaluation/NAME.")
    ] = None,
    clips: Annotated[int, typer.Option(help="Held-out clips, one an episode.")] = 90,
    horizon: Annotated[int, typer.Option(help="Chunks imagined and judged.")] = 16,
    long_horizon: Annotated[int, typer.Option(help="Chunks of the endurance test, 0 for none.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON instead of the summary.")] = False,
) -> None:
    """Measure a world on held-out real episodes: nats, bits/dim, PSNR, SSIM, angle error, reward; JSON and plots."""
    from worldmodel.training.episodes import EpisodeDataset
    from worldmodel.training.evaluate import evaluate as run
    from worldmodel.training.evaluate import held_out_dataset, summary
    from worldmodel.training.measure import EvaluateConfig
    from worldmodel.world import WorldModel

    model = WorldModel.load(world)
    dataset = EpisodeDataset.open(data) if data else held_out_dataset(model, clips)
    folder = out or Path("evaluation") / model.spec.name
    numbers = run(
        model, dataset, folder, EvaluateConfig(horizon=horizon, clips=clips, long_horizon=long_horizon)
    )
    print(json.dumps(numbers, indent=2) if as_json else summary(numbers))
    print(f"written to {folder}", file=sys.stderr)


@app.command()
def rollout(
    world: World = "pendulum",
    chunks: Annotated[int, typer.Option(help="Chunks to imagine.")] = 50,
    out: Annotated[Path, typer.Option(help="The video: .mp4, .webm or .gif.")] = Path("rollout.mp4"),
    seed: Annotated[int, typer.Option(help="Start and noise.")] = 0,
    hold: Annotated[int, typer.Option(help="Chunks that each random action is held for.")] = 4,
    guidance: Annotated[float | None, typer.Option(help="Guidance weight; default: the world's.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Scale of the noise; default: the world's.")
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(help='When the window is full: "reencode" or "rolling"; default: the world\'s.'),
    ] = None,
    scale: Annotated[
        int | None, typer.Option(help="Enlarge the picture so many times; default: 4 where it is small.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="What to imagine, in a world that takes prompts.")
    ] = None,
) -> None:
    """Imagine a future under random actions or a prompt, write it as a video, and print its likelihood.

    Several processes or GPUs: torchrun --nproc-per-node N -m -- worldmodel rollout ... (guidance and heads are spread).
    """
    import numpy as np
    from tqdm import tqdm

    from envs.recorder import write_video
    from worldmodel.condition.spaces import prompt_key
    from worldmodel.errors import InputError
    from worldmodel.world import WorldModel

    model = WorldModel.load(world)
    frames: list[np.ndarray] = []
    given: dict[str, Any] = {"guidance": guidance, "temperature": temperature, "context": context}
    sampling = replace(model.spec.sampling, **{k: v for k, v in given.items() if v is not None})
    model = model.with_sampling(sampling)
    if prompt is not None and model.prompts is None:
        raise InputError(f"{world} takes no prompts; leave --prompt out")
    space = model.spec.action_space
    space.seed(seed)
    key = prompt_key(space)
    nats, action = [], None
    with _processes(model, sampling.guidance != 0) as first:
        if model.prompts is not None:
            state = model.initial_state([seed], [prompt or ""])
        else:
            state, begun = model.reset([seed])
            frames = [np.asarray(c.frames[0]) for c in begun]
        for t in tqdm(range(chunks), desc="imagine", unit="chunk", disable=not first):
            if t % hold == 0 and key != "":
                action = _batch_of_one({**space.sample(), key: prompt or ""} if key else space.sample())
            state, chunk = model.step(state, action)
            frames.append(np.asarray(chunk.frames[0]))
            nats.append(float(chunk.log_prob[0]))
    if first:
        video = np.concatenate(frames)
        scale = scale or (4 if model.spec.frame_size[0] <= 128 else 1)
        write_video(out, np.repeat(np.repeat(video, scale, axis=1), scale, axis=2), model.spec.fps)
        print(f"{out}: {len(video)} frames, mean {np.mean(nats):.1f} nats a chunk (of the noised latent)")


def _processes(model: WorldModel, guided: bool) -> AbstractContextManager[bool]:
    """The world spread over torchrun's processes, if any; says whether this one shows and writes."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return nullcontext(True)
    from worldmodel.parallel import spread_by_torchrun

    return spread_by_torchrun(model, guided)


@app.command()
def generate(
    world: World,
    prompt: Annotated[str, typer.Option(help="What to show.")] = "",
    image: Annotated[Path | None, typer.Option(help="A picture to begin with.")] = None,
    video: Annotated[Path | None, typer.Option(help="A video to continue; its last frames count.")] = None,
    v2v: Annotated[Path | None, typer.Option(help="A video to make another of, as the prompt says.")] = None,
    seconds: Annotated[float | None, typer.Option(help="How long; default: what the window holds.")] = None,
    chunks: Annotated[int | None, typer.Option(help="How long, in chunks, instead of --seconds.")] = None,
    aspect: Annotated[
        str | None, typer.Option(help="Aspect ratio, as 16:9; default: the world's own size.")
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance weight; default: the world's.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Scale of the noise; default: the world's.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Noise.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda; default: a GPU if there is one.")] = None,
    prompt_cache: Annotated[
        Path | None, typer.Option(help="A folder of encoded prompts: those in it need no text encoder.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The video, .mp4, .webm or .gif (a picture, .png, in a world of pictures)."),
    ] = None,
) -> None:
    """Make a video from text, a picture, a video's end or a source video, with the nats of each chunk.

    Beside OUT lies OUT.json: what was asked, and for each chunk its log_prob (nats, of the noised latent), bits per
    dimension, Jacobi sweeps. Ctrl-C writes what is there.
    """
    import torch

    from envs.recorder import CODECS, write_video
    from worldmodel.condition.prompts import frame_size_for
    from worldmodel.errors import InputError
    from worldmodel.files import write_json
    from worldmodel.media import read_clip, read_picture, write_picture
    from worldmodel.tasks import Brief, chunks_for, run
    from worldmodel.world import WorldModel

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = WorldModel.load(world, where, prompt_cache)
    still = not model.spec.fps
    out = out or Path("picture.png" if still else "video.mp4")
    if not still and out.suffix not in CODECS:
        raise InputError(f"{out.name}: expected a name that ends in one of {', '.join(CODECS)}")
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
        print(
            f"{out}: {len(frames)} frames of {size[0]} x {size[1]}, mean {mean:.1f} nats a chunk (of the noised latent)"
        )
    if not record["complete"]:
        print(f"worldmodel: stopped; {len(frames)} frames were ready", file=sys.stderr)
        sys.exit(130)


def _batch_of_one(action: Any) -> Any:
    import numpy as np

    if isinstance(action, dict):
        return {k: _batch_of_one(v) for k, v in action.items()}
    return np.asarray(action)[None]


@app.command()
def monitor(
    source: Annotated[
        Path, typer.Argument(help="A directory of episodes, a video file, or a directory of videos.")
    ],
    world: Annotated[str, typer.Option(help="The world that knows what is normal.")] = "pendulum",
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Normal episodes or videos, or a saved monitor (.safetensors); default: 200 fresh episodes of the "
            "world's own environment. Calibrates once: the monitor is kept in the cache folder."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where to; default monitor/SOURCE.")] = None,
    alpha: Annotated[float, typer.Option(help="Share of normal episodes that may raise an alarm.")] = 0.05,
    videos: Annotated[int, typer.Option(help="Overlay videos, of the strangest episodes.")] = 4,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the JSON instead of a line an episode.")
    ] = False,
) -> None:
    """Judge real episodes by a world's likelihood: alarms, scores, heat maps; JSON, CSV, a plot and overlay videos.

    A video holds no actions, so it is judged given its past alone; compression is strange to a monitor that was
    calibrated on lossless episodes, so calibrate on normal videos of the same camera.
    """
    from agents.monitoring import default_out, monitor_source
    from worldmodel.world import WorldModel

    folder = out or default_out(source)
    numbers = monitor_source(WorldModel.load(world), source, calibration, folder, alpha, videos)
    if as_json:
        print(json.dumps(numbers, indent=2))
    else:
        for row in numbers["results"]:
            alarm = f"ALARM at chunk {row['first_alarm_chunk']}" if row["alarm"] else "normal"
            print(
                f"{row['name']}  {alarm}, highest score {row['highest_score']:.1f} ({row['strangest_channel']})"
            )
        print(f"{numbers['episodes_with_alarm']} of {numbers['episodes']} episodes raised an alarm")
    print(f"written to {folder}", file=sys.stderr)


@app.command()
def play(
    world: World = "pendulum",
    zoom: Annotated[float, typer.Option(help="Size of the window relative to the frame.")] = 6.0,
    seed: Annotated[int | None, typer.Option(help="Start and noise.")] = None,
) -> None:
    """Play in a world with the keyboard (arrow keys; close the window to stop)."""
    from gymnasium.utils.play import play as run

    from envs.world_env import WorldModelEnv

    env = WorldModelEnv(world, step_mode="frame", render_mode="rgb_array", max_chunks=None)
    run(env, zoom=zoom, seed=seed, noop=env.noop_action)


for part in (cli_serving, cli_watch, cli_bench):
    part.register(app)


def main() -> NoReturn:
    """Entry point: every error of ours is one line; Ctrl-C is quiet."""
    from worldmodel.errors import WorldModelError

    code: object = 0
    try:
        code = app(standalone_mode=False)  # typer turns Ctrl-C into the exit status 130 that it returns
        if code == 130:
            raise KeyboardInterrupt
    except WorldModelError as error:
        print(f"worldmodel: {error}", file=sys.stderr)
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        print("worldmodel: stopped; run the same command to continue", file=sys.stderr)
        sys.exit(130)
    except typer.Exit as leave:
        sys.exit(leave.exit_code)
    except Exception as error:
        show = getattr(error, "show", None)  # click's own usage errors know how to print themselves
        if show is None:
            raise
        show()
        sys.exit(getattr(error, "exit_code", 2))
    sys.exit(code if isinstance(code, int) else 0)
