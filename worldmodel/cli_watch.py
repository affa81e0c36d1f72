"""``worldmodel watch``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def watch(
    url: Annotated[str, typer.Argument(help="The server: tcp://host:port.")],
    session: Annotated[
        str | None, typer.Option(help="The session's name in hexadecimal; default: the newest of your key.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write this .mp4 or .webm instead of a window.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Stop after so long; default: at Ctrl-C.")] = None,
    key: Annotated[Path | None, typer.Option(help="Your .secret file, for a server with keys.")] = None,
    server_key: Annotated[Path | None, typer.Option(help="The server's .public file.")] = None,
    jpeg: Annotated[int, typer.Option(help="Quality of the pictures, 1 to 100; 0 for raw ones.")] = 85,
) -> None:
    """Watch a served world live: each frame with its step, action, nats and bits/dim.

    Shows the newest change whenever it is done with the last one; whatever it misses is skipped, and nobody waits for it.
    """
    from envs.serving.connection import Connection, client_keys
    from envs.serving.watch import watch as run
    from worldmodel.errors import InputError

    try:
        name = None if session is None else bytes.fromhex(session)
    except ValueError as error:
        raise InputError(f"session is {session!r}, expected 48 hexadecimal digits") from error
    if not 0 <= jpeg <= 100:
        raise InputError(f"jpeg is {jpeg}, expected 0 to 100")
    connection = Connection(url, client_keys(key, server_key), 10.0)
    try:
        seen = run(connection, name, out, seconds, jpeg or None)
    finally:
        connection.close()
    where = f", written to {out}" if out is not None and seen else ""
    print(f"{seen} changes seen{where}", file=sys.stderr)


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(watch)
