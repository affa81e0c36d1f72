"""Run a function on several processes that talk over gloo, as torchrun would start them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
from torch import multiprocessing


def _rank(rank: int, size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    function(*arguments)
    os._exit(0)  # torch's own threads may abort a process that is taken down while they live


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> None:
    """Call ``function`` (of a module's top level) on ``size`` fresh processes; its errors are raised here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_rank, (size, port, function, arguments), nprocs=size)
