"""What several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from worldmodel.world import WorldModel

World = Annotated[
    str,
    typer.Argument(
        help="A world that ships with the package (pendulum, lunarlander), a world directory, apple/starflow-v, or "
        "apple/starflow (pictures)."
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda or cuda:N. Default: a GPU if there is one; the CPU for worlds of small frames, as those that ship."
    ),
]


def load(world: str, device: str | None, prompt_cache: Path | None = None) -> WorldModel:
    """The world of a command's `World` and `Device`."""
    from worldmodel.checkpoint import read_spec
    from worldmodel.plan import device_for
    from worldmodel.published import obtain
    from worldmodel.world import WorldModel

    path = obtain(world)
    return WorldModel.load(path, device_for(read_spec(path), device), prompt_cache)
