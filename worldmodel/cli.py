"""The command line: ``worldmodel --help``."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated, NoReturn

import typer

from worldmodel import cli_bench, cli_evaluate, cli_imagine, cli_serving, cli_training, cli_watch
from worldmodel.cli_arguments import World

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    help="STARFlow-V as a world you can step: learn a world from a real environment, imagine in it, measure it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


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
    from worldmodel.native import build
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
            f"{spec.frame_size[0]} x {spec.frame_size[1]} uint8 RGB"
            + (f" at {spec.fps:g} a second, {frames} a chunk" if spec.fps else ", one a session"),
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
            f"{len(files.starts['frames'])} real clips"
            if files.starts
            else ("none: begin with a picture" if spec.fps else "none: a session is a picture"),
        ),
    ]
    rows.append(("kernels", build() or "torch's alone: reinstall with gcc at hand, steps are then faster"))
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


for part in (cli_training, cli_evaluate, cli_imagine, cli_serving, cli_watch, cli_bench):
    part.register(app)


GO_ON = (["collect"], ["train"], ["finetune"], ["evaluate"])
"""Commands that keep what they have done."""


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
        sys.exit(getattr(error, "exit_status", 1))
    except (KeyboardInterrupt, typer.Abort):
        goes_on = "; run the same command to continue" if sys.argv[1:2] in GO_ON else ""
        print(f"worldmodel: stopped{goes_on}", file=sys.stderr)
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
