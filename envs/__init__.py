"""Worlds behind Gymnasium: ``import envs`` registers every world that ships as ``worldmodel/NAME-v0``."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium

import worldmodel

if TYPE_CHECKING:
    from envs.real import ChunkedEnv
    from envs.recorder import RecordChunks, write_video
    from envs.serving.client import RemoteEnv
    from envs.serving.vector_client import RemoteVectorEnv
    from envs.snapshot import Snapshot
    from envs.vector_env import WorldModelVectorEnv
    from envs.world_env import WorldModelEnv

__all__ = [
    "ChunkedEnv",
    "RecordChunks",
    "RemoteEnv",
    "RemoteVectorEnv",
    "Snapshot",
    "WorldModelEnv",
    "WorldModelVectorEnv",
    "env_id",
    "write_video",
]

# Loaded at first use (PEP 562): the clients of a served world do without torch.
_MODULES = {
    "ChunkedEnv": "envs.real",
    "RecordChunks": "envs.recorder",
    "RemoteEnv": "envs.serving.client",
    "RemoteVectorEnv": "envs.serving.vector_client",
    "Snapshot": "envs.snapshot",
    "WorldModelEnv": "envs.world_env",
    "WorldModelVectorEnv": "envs.vector_env",
    "write_video": "envs.recorder",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def env_id(world: str) -> str:
    """The Gymnasium id of a world that ships: "pendulum" is ``worldmodel/Pendulum-v0``."""
    name = "".join(part.capitalize() for part in re.split("[-_]", world))
    return f"worldmodel/{name}-v0"


def _register() -> None:
    shipped = (Path(root).glob("worlds/*/world.json") for root in worldmodel.__path__)
    for world in sorted({"pendulum", *(file.parent.name for files in shipped for file in files)}):
        if env_id(world) not in gymnasium.registry:
            gymnasium.register(
                env_id(world),
                entry_point="envs.world_env:WorldModelEnv",
                vector_entry_point="envs.vector_env:WorldModelVectorEnv",
                kwargs={"world": world},
            )


_register()
