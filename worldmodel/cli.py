"""The command line: ``worldmodel --help``."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

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
    """
    from worldmodel.files import config_to_dict
    from worldmodel.training.recipes import load_recipe

    chosen = load_recipe(recipe)
    if print_recipe:
        print(json.dumps(config_to_dict(chosen), indent=2))
        return
    from worldmodel.training.export import train_world

    run = run or Path("runs") / chosen.name
    out = out or run / "world"
    world = train_world(chosen, data or Path("data") / chosen.name, run, out, until)
    print(
        f"world written to {out}; look at it with: worldmodel info {out}"
        if world
        else f"{until} done, in {run}"
    )


@app.command()
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
    scale: Annotated[int, typer.Option(help="Enlarge the picture so many times.")] = 4,
) -> None:
    """Imagine a future under random actions, write it as a video, and print its likelihood."""
    import numpy as np
    from tqdm import tqdm

    from envs.recorder import write_video
    from worldmodel.world import WorldModel

    model = WorldModel.load(world)
    given: dict[str, Any] = {"guidance": guidance, "temperature": temperature, "context": context}
    sampling = replace(model.spec.sampling, **{k: v for k, v in given.items() if v is not None})
    state, begun = model.reset([seed])
    frames = [np.asarray(c.frames[0]) for c in begun]
    space = model.spec.action_space
    space.seed(seed)
    nats, action = [], None
    for t in tqdm(range(chunks), desc="imagine", unit="chunk"):
        if t % hold == 0:
            action = _batch_of_one(space.sample())
        state, chunk = model.step(state, action, sampling)
        frames.append(np.asarray(chunk.frames[0]))
        nats.append(float(chunk.log_prob[0]))
    video = np.concatenate(frames)
    write_video(out, np.repeat(np.repeat(video, scale, axis=1), scale, axis=2), model.spec.fps)
    print(f"{out}: {len(video)} frames, mean {np.mean(nats):.1f} nats a chunk (of the noised latent)")


def _batch_of_one(action: Any) -> Any:
    import numpy as np

    if isinstance(action, dict):
        return {k: _batch_of_one(v) for k, v in action.items()}
    return np.asarray(action)[None]


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


bench = typer.Typer(
    help="What the world costs on this machine, as ratios within one run. Alone, the same as: bench steps.",
    rich_markup_mode=None,
)
app.add_typer(bench, name="bench")
BenchWorld = Annotated[str, typer.Option("--world", help="A shipped world or a world directory.")]
Quick = Annotated[
    bool, typer.Option("--quick", help="A minute or two: fewer batches, fewer repeats, no large shapes.")
]
Sections = Annotated[
    list[str] | None, typer.Option("--only", help="A section by name; may be given several times.")
]
Threads = Annotated[int, typer.Option(help="Threads of torch; one is fastest for small batches.")]
Device = Annotated[str, typer.Option(help="Where the weights are: cpu or cuda.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@bench.callback(invoke_without_command=True)
def bench_default(
    context: typer.Context,
    world: BenchWorld = "pendulum",
    quick: Quick = False,
    only: Sections = None,
    threads: Threads = 1,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure the costs of a world; without a subcommand, as `bench steps`."""
    if context.invoked_subcommand is None:
        bench_steps(world, quick, only, threads, device, as_json)


@bench.command("steps")
def bench_steps(
    world: BenchWorld = "pendulum",
    quick: Quick = False,
    only: Sections = None,
    threads: Threads = 1,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Steps, stages, forks, planning, the plain baseline, ablations, large shapes, training."""
    from benchmarks.report import Options, run

    run(Options(world, quick, tuple(only or ()), threads, device, as_json))


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
