"""How many imagined branches fit into memory."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from worldmodel import InputError, WorldModel

FLOAT = 4
SCRATCH = 4
"""Floats that the codec needs for every number of the pictures it decodes (measured on the shipped world)."""


def branch_bytes(world: WorldModel, horizon: int) -> int:
    """About what one branch of a plan adds at its peak (the past is shared): K/V of the frames it imagines and, where
    the window fills up, of those it encodes again, with and without actions; pictures, and the scratch that decodes one.
    """
    config = world.flow.config
    tokens = math.prod(world.grid)
    frames = min(config.window, config.context + horizon)
    pages = 2 * 2 * config.layers_per_block[-1] * config.top_channels * tokens * frames
    history = 2 * config.window * (tokens * config.token_dim + config.action_features)
    pixels = math.prod(world.frames_shape)
    return FLOAT * (pages + history + SCRATCH * pixels) + horizon * pixels


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device, or None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, IndexError, ValueError):
        return None


def check_room(world: WorldModel, branches: int, horizon: int, memory: int | None) -> None:
    """``memory``: bytes that may be used, None for what is free on the world's device.

    Raises:
        InputError: fewer than ``branches`` fit; it says how many do.
    """
    free = free_bytes(world.device) if memory is None else memory
    if free is None:
        return
    each = branch_bytes(world, horizon)
    fit = free // each
    if branches > fit:
        raise InputError(
            f"{branches} branches of {horizon} chunks need about {branches * each / 1e9:.2f} GB, {free / 1e9:.2f} GB are "
            f"free: {fit} fit; ask for fewer candidates"
        )
