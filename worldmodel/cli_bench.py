"""``worldmodel bench``: the performance tables; the work is in benchmarks/, which only a checkout has."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

bench = typer.Typer(
    help="What the world costs on this machine, as ratios within one run. Alone, the same as: bench steps.",
    rich_markup_mode=None,
)
World = Annotated[str, typer.Option("--world", help="A shipped world or a world directory.")]
Quick = Annotated[
    bool, typer.Option("--quick", help="A minute or two: fewer batches, fewer repeats, no large shapes.")
]
Sections = Annotated[
    list[str] | None, typer.Option("--only", help="Sections, with commas between or given several times.")
]
Threads = Annotated[int, typer.Option(help="Threads of torch; one is fastest for small batches.")]
Device = Annotated[str, typer.Option(help="Where the weights are: cpu or cuda.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def _checkout() -> None:
    """Let ``benchmarks`` be this checkout's, whatever else is installed under that name (TorchRL brings one)."""
    from worldmodel.errors import ConfigError

    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks" / "report.py").is_file():
        raise ConfigError("benchmarks/ is not installed with the package; run this in a checkout")
    sys.path.insert(0, str(root))


@bench.callback(invoke_without_command=True)
def default(
    context: typer.Context,
    world: World = "pendulum",
    quick: Quick = False,
    only: Sections = None,
    threads: Threads = 1,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure the costs of a world; without a subcommand, as `bench steps`."""
    if context.invoked_subcommand is None:
        steps(world, quick, only, threads, device, as_json)


@bench.command()
def steps(
    world: World = "pendulum",
    quick: Quick = False,
    only: Sections = None,
    threads: Threads = 1,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Steps, stages, forks, planning, the plain baseline, ablations, large shapes, training."""
    _checkout()
    from benchmarks.report import Options, run

    sections = tuple(name for text in only or () for name in text.split(",") if name)
    run(Options(world, quick, sections, threads, device, as_json))


@bench.command()
def serving(
    world: World = "pendulum",
    seconds: Annotated[float, typer.Option(help="Measured for each size, direction and security.")] = 4.0,
    rounds: Annotated[int, typer.Option(help="Alternations of served, batched and alone.")] = 11,
    as_json: AsJson = False,
) -> None:
    """Round trips of a null model against a bare socket, and steps a second of many clients against a local batch."""
    _checkout()
    from benchmarks.serving import report
    from benchmarks.serving import serving as run

    result = run(world, seconds, rounds)
    print(json.dumps(result, indent=2) if as_json else report(result))


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.add_typer(bench, name="bench")
