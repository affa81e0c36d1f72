"""``worldmodel serve`` and ``worldmodel keys``."""

from __future__ import annotations

import math
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from worldmodel.cli_arguments import Device, load

DEFAULT_KEYS = Path("~/.config/worldmodel/keys")

World = Annotated[
    str,
    typer.Argument(help="A world that ships with the package (pendulum, lunarlander), or a world directory."),
]
KeyFolder = Annotated[Path, typer.Option("--keys", help="The key store, a directory.")]

keys = typer.Typer(help="CURVE keys: who may connect to `worldmodel serve --keys`.", no_args_is_help=True)


def serve(
    world: World = "pendulum",
    bind: Annotated[
        str, typer.Option(help="Where to listen. Beyond 127.0.0.1 only with --keys.")
    ] = "tcp://127.0.0.1:5555",
    keys: Annotated[
        Path | None,
        typer.Option(help="A key store (see `worldmodel keys`): encrypt, and let in only its allowed keys."),
    ] = None,
    memory: Annotated[float, typer.Option(help="GiB for sessions; beyond it, new ones are told busy.")] = 4.0,
    lease: Annotated[float, typer.Option(help="Seconds that a session lives without a request.")] = 60.0,
    window: Annotated[
        float, typer.Option(help="Milliseconds that a batch waits for more clients, 0 to 5.")
    ] = 5.0,
    health: Annotated[
        int | None, typer.Option(help="Port on 127.0.0.1 for /healthz, /readyz and /metrics.")
    ] = None,
    on_ray: Annotated[
        bool, typer.Option("--ray", help="Run replicas as Ray actors behind this address (extra: ray).")
    ] = False,
    replicas: Annotated[int, typer.Option(help="How many, with --ray; each takes a processor.")] = 2,
    device: Device = None,
) -> None:
    """Host sessions of a world for many clients at once: `envs.RemoteEnv("tcp://...")`.

    Ends on Ctrl-C or SIGTERM, once what is under way is answered. docs/protocol.md says what travels.
    """
    from envs.serving.security import KeyStore
    from envs.serving.server import WorldServer
    from envs.serving.sessions import Limits
    from envs.serving.world_backend import WorldBackend
    from worldmodel.errors import InputError

    if not (0 < memory * 2**30 < math.inf and 0 < lease < math.inf):
        raise InputError(f"memory is {memory:g} and lease {lease:g}, expected finite numbers above 0")
    if on_ray and device not in (None, "cpu"):
        raise InputError("--ray runs its replicas on processors; leave --device out")
    store = None if keys is None else KeyStore(keys)
    limits = Limits(lease=lease, memory=int(memory * 2**30))
    backend = _ray(world, replicas) if on_ray else WorldBackend(load(world, device))
    server = WorldServer(backend, bind, keys=store, limits=limits, window=window / 1000, health=health)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.drain())
    print(f"serving {world} on {server.url}", file=sys.stderr)
    if server.public_key is not None and store is not None:
        print(f"server key {server.public_key.decode()}", file=sys.stderr)
        print(f"{len(store.allowed())} client keys allowed in {store.folder}", file=sys.stderr)
    if server.health is not None:
        print(f"health http://127.0.0.1:{server.health.port}/readyz", file=sys.stderr)
    server.run()


def _ray(world: str, replicas: int) -> Any:
    from worldmodel.errors import InputError

    try:
        from envs.serving.ray import RayBackend
    except ModuleNotFoundError as error:
        raise InputError("--ray needs Ray: pip install 'worldmodel[ray]'") from error
    return RayBackend(world, replicas)


@keys.command()
def new(
    name: Annotated[str, typer.Argument(help="A name for the pair: NAME.secret, NAME.public.")],
    folder: KeyFolder = DEFAULT_KEYS,
) -> None:
    """Make a key pair, for a client on this machine (or with the name "server", for the server)."""
    from envs.serving.security import KeyStore

    store = KeyStore(folder)
    pair = store.new(name)
    print(pair.public.decode())
    print(f"written to {store.folder / name}.secret and .public", file=sys.stderr)


@keys.command()
def allow(
    name: Annotated[str, typer.Argument(help="A name for the client.")],
    key: Annotated[
        str | None,
        typer.Argument(
            help="Its public key (40 characters), or a .public file; default: NAME.public of this store."
        ),
    ] = None,
    folder: KeyFolder = DEFAULT_KEYS,
) -> None:
    """Let a client in; a running server notices by itself."""
    from envs.serving.security import KeyStore, check_key, read_public

    store = KeyStore(folder)
    source = str(store.folder / f"{name}.public") if key is None else key
    store.allow(name, read_public(source) if source.endswith(".public") else check_key(source, "key"))
    print(f"{name} is allowed", file=sys.stderr)


@keys.command()
def revoke(
    name: Annotated[str, typer.Argument(help="The client's name.")], folder: KeyFolder = DEFAULT_KEYS
) -> None:
    """Shut a client out, its open connections too; a running server notices by itself."""
    from envs.serving.security import KeyStore

    KeyStore(folder).revoke(name)
    print(f"{name} is shut out", file=sys.stderr)


@keys.command(name="list")
def list_keys(folder: KeyFolder = DEFAULT_KEYS) -> None:
    """The clients that are allowed, and their public keys."""
    from envs.serving.security import KeyStore

    for key, name in sorted(KeyStore(folder).allowed().items(), key=lambda item: item[1]):
        print(f"{name:24s} {key.decode()}")


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command()(serve)
    app.add_typer(keys, name="keys")
