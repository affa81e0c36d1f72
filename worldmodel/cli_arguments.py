"""What several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

World = Annotated[
    str,
    typer.Argument(
        help="A world that ships with the package (pendulum, lunarlander), a world directory, apple/starflow-v, or "
        "apple/starflow (pictures)."
    ),
]
