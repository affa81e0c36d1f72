"""``worldmodel bench``: the performance tables; the work is in benchmarks/, which only a checkout has."""

from __future__ import annotations

import json
from typing import Annotated

import typer

bench = typer.Typer(help="Measure: ratios within one run, on this machine.", no_args_is_help=True)


@bench.callback()
def _group() -> None:
    """Keeps the name of a single command."""


@bench.command()
def serving(
    world: Annotated[str, typer.Option(help="A world that ships, or a world directory.")] = "pendulum",
    seconds: Annotated[float, typer.Option(help="Measured for each size, direction and security.")] = 4.0,
    rounds: Annotated[int, typer.Option(help="Alternations of served, batched and alone.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Round trips of a null model against a bare socket, and steps a second of many clients against a local batch."""
    from worldmodel.errors import ConfigError

    try:
        from benchmarks.serving import report
        from benchmarks.serving import serving as run
    except ModuleNotFoundError as error:
        raise ConfigError("benchmarks/ is not installed with the package; run this in a checkout") from error
    result = run(world, seconds, rounds)
    print(json.dumps(result, indent=2) if as_json else report(result))


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.add_typer(bench, name="bench")
