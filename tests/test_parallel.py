"""A world on two processes steps as on one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from tests.ranks import on_ranks
from tests.toy import toy_world, write_toy
from worldmodel.errors import ConfigError
from worldmodel.files import load_tensors, save_tensors
from worldmodel.parallel import spread, spread_heads
from worldmodel.sampling import Sampling
from worldmodel.training.parallel import Ranks
from worldmodel.world import Chunk, WorldModel

SHAPE = {"channels": 64, "head_dim": 32}
GUIDED = Sampling(guidance=1.5, tolerance=1e-9)


def play(world: WorldModel, steps: int = 8) -> tuple[list[Chunk], int]:
    """A session that observes, forks, and steps past its window (6); chunks, and bytes of K/V."""
    state, _ = world.reset([3, 4])
    state = state.fork(2)
    chunks = []
    for t in range(steps):
        action = np.full((4, 1), np.sin(t), dtype=np.float32)
        action[1::2] *= -1
        state, chunk = world.step(state, action, GUIDED)
        chunks.append(chunk)
    return chunks, state.context.cache.nbytes


def written(world: WorldModel, file: Path) -> None:
    chunks, size = play(world)
    names = ("frames", "log_prob", "guided_log_prob", "action_gain", "noise", "latent")
    tensors = {name: torch.stack([getattr(c, name) for c in chunks]) for name in names}
    save_tensors(file, tensors | {"kv": torch.tensor(size)})


def two_ranks(path: Path) -> None:
    with Ranks.joined() as ranks:
        for guided in (False, True):
            world = WorldModel.load(path / "toy")
            spread(world, ranks, guided)
            written(world, path / f"guided{int(guided)}-{ranks.rank}.safetensors")
        odd = toy_world(path / f"odd{ranks.rank}", top_channels=96, head_dim=32)
        with pytest.raises(ConfigError, match="the deep block's 3 heads do not divide by 2"):
            spread_heads(odd.flow, init_device_mesh("cpu", (2,)))


def test_two_processes_step_as_one(tmp_path: Path) -> None:
    write_toy(tmp_path / "toy", **SHAPE)
    written(WorldModel.load(tmp_path / "toy"), tmp_path / "alone.safetensors")
    on_ranks(2, two_ranks, tmp_path)
    alone = load_tensors(tmp_path / "alone.safetensors")
    for name in ("guided0-0", "guided0-1", "guided1-0", "guided1-1"):
        rank = load_tensors(tmp_path / f"{name}.safetensors")
        assert torch.equal(rank["frames"], alone["frames"])
        for key in ("log_prob", "guided_log_prob", "noise", "latent"):
            torch.testing.assert_close(rank[key], alone[key], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rank["action_gain"], alone["action_gain"], rtol=0, atol=1e-3)
        by_heads = name.startswith("guided0")
        assert int(rank["kv"]) * (2 if by_heads else 1) == int(alone["kv"])
    assert (alone["guided_log_prob"] - alone["log_prob"]).abs().mean() > 0.1
