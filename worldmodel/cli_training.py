"""``worldmodel collect``, ``worldmodel train`` and ``worldmodel finetune``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from worldmodel.cli_arguments import World


def collect(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A recipe (pendulum, lunarlander), a recipe file, or the id of a Gymnasium environment (MODULE:NAME-v0 "
            "imports the module that registers it)."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Where to; default data/NAME.")] = None,
    episodes: Annotated[int | None, typer.Option(help="How many episodes.")] = None,
    chunks: Annotated[int | None, typer.Option(help="Length of an episode in chunks.")] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="Behaviour policy NAME or NAME=SHARE; may be given several times. NAME: random, random_held, or "
            "MODULE:FUNCTION of your own (docs/episodes.md)."
        ),
    ] = None,
    hide: Annotated[
        list[str] | None, typer.Option(help="Attribute of the simulator to set to None while filming.")
    ] = None,
    frame_size: Annotated[int | None, typer.Option(help="Height and width of the frames in pixels.")] = None,
    frame_skip: Annotated[
        int | None,
        typer.Option(help="Steps of the simulator, and so frames, of a chunk: they hold one action."),
    ] = None,
    env_kwargs: Annotated[
        str | None, typer.Option(help="Arguments of the environment as JSON, such as '{\"gravity\": 5.0}'.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed; a recipe's further collections take the next.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes.")] = 2,
) -> None:
    """Collect episodes from a real environment that renders; lossless, resumable, documented in docs/episodes.md.

    A recipe may collect again for a further round of training: into DIR/further1 and so on.
    """
    from worldmodel.training.collect import CollectConfig, PolicyShare
    from worldmodel.training.collect import collect as run
    from worldmodel.training.episodes import counted
    from worldmodel.training.recipes import RECIPES, load_recipe

    named = recipe in RECIPES or Path(recipe).is_file()
    name = load_recipe(recipe).name if named else recipe.replace("/", "-")
    folder = out or Path("data") / name
    todo = load_recipe(recipe).collections(folder) if named else {folder: CollectConfig(env=recipe)}
    changes: dict[str, Any] = {"episodes": episodes, "chunks": chunks, "workers": workers}
    changes |= {"frame_skip": frame_skip, "env_kwargs": None if env_kwargs is None else _object(env_kwargs)}
    changes["hide"] = tuple(hide) if hide else None
    changes["frame_size"] = None if frame_size is None else (frame_size, frame_size)
    changes["policies"] = tuple(PolicyShare(*_share(p)) for p in policy) if policy else None
    for number, (place, config) in enumerate(todo.items()):
        changes["seed"] = None if seed is None else seed + number
        config = replace(config, **{k: v for k, v in changes.items() if v is not None})
        run(config, place)
        print(f"{counted(config.episodes)} in {place}")


def _object(text: str) -> dict[str, Any]:
    from worldmodel.errors import ConfigError

    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"env-kwargs is {text}, expected a JSON object such as '{{\"gravity\": 5.0}}'")
    return value


def _share(text: str) -> tuple[str, float]:
    name, _, share = text.partition("=")
    try:
        return name, float(share or 1.0)
    except ValueError:
        raise typer.BadParameter(f"{text!r}: expected NAME or NAME=SHARE") from None


def train(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A folder of collected episodes, a recipe (pendulum, lunarlander), or a recipe file.",
            metavar="DATA_OR_RECIPE",
        ),
    ],
    data: Annotated[
        Path | None, typer.Option(help="The episodes; default the folder that was given, else data/NAME.")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Checkpoints and logs; default runs/NAME.")] = None,
    out: Annotated[Path | None, typer.Option(help="The world directory; default RUN/world.")] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="For codec and flow together; default the recipe's, for a folder 90. Heads take minutes more."
        ),
    ] = None,
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
    from worldmodel.training.recipes import load_recipe, within

    chosen = load_recipe(recipe)
    if minutes is not None:
        chosen = within(chosen, minutes)
    if data is None:
        data = Path(recipe) if Path(recipe).is_dir() else Path("data") / chosen.name
    if print_recipe:
        print(json.dumps(config_to_dict(chosen), indent=2))
        return
    from worldmodel.training.export import train_world
    from worldmodel.training.parallel import Ranks

    run = run or Path("runs") / chosen.name
    out = out or run / "world"
    with Ranks.joined() as ranks:
        world = train_world(chosen, data, run, out, until, ranks)
    if ranks.first:
        done = f"world written to {out}; look at it with: worldmodel info {quote(str(out))}"
        print(done if world else f"{until} done, in {run}")


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
        print(f"world written to {out}; look at it with: worldmodel info {quote(str(out))}")
        for name, values in tuned.spec.quality.items():
            print(f"{name}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()))


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    for command in (collect, train, finetune):
        app.command()(command)
