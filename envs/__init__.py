"""Worlds behind Gymnasium: ``import envs`` registers every world that ships as ``worldmodel/NAME-v0``."""

from __future__ import annotations

import re

import gymnasium

from envs.real import ChunkedEnv
from envs.recorder import RecordChunks, write_video
from envs.snapshot import Snapshot
from envs.vector_env import WorldModelVectorEnv
from envs.world_env import WorldModelEnv
from worldmodel.checkpoint import shipped_worlds

__all__ = [
    "ChunkedEnv",
    "RecordChunks",
    "Snapshot",
    "WorldModelEnv",
    "WorldModelVectorEnv",
    "env_id",
    "write_video",
]


def env_id(world: str) -> str:
    """The Gymnasium id of a world that ships: "pendulum" is ``worldmodel/Pendulum-v0``."""
    name = "".join(part.capitalize() for part in re.split("[-_]", world))
    return f"worldmodel/{name}-v0"


def _register() -> None:
    for world in sorted({"pendulum", *shipped_worlds()}):
        if env_id(world) not in gymnasium.registry:
            gymnasium.register(
                env_id(world),
                entry_point="envs.world_env:WorldModelEnv",
                vector_entry_point="envs.vector_env:WorldModelVectorEnv",
                kwargs={"world": world},
            )


_register()
