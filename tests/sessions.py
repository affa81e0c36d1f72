"""Sessions of a small random world, and what it means for two of them to be equal."""

from __future__ import annotations

from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import Tensor

from tests.toy import toy_world
from worldmodel.codec.conv import PIXEL_SCALE, ConvCodec
from worldmodel.sampling import Sampling
from worldmodel.state import WorldState
from worldmodel.world import Chunk, WorldModel

POLICIES = {
    "reencode": Sampling(tolerance=1e-8, context="reencode"),
    "rolling": Sampling(tolerance=1e-8, context="rolling"),
}
policy = pytest.mark.parametrize("sampling", POLICIES.values(), ids=POLICIES)


@lru_cache
def small_world() -> WorldModel:
    """Windows of 6 chunks, re-encoded to 3; 4 tokens of 3 dimensions a chunk."""
    with TemporaryDirectory() as folder:
        return toy_world(Path(folder) / "toy")


def actions(rows: int, horizon: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-2, 2, (rows, horizon, 1)).astype(np.float32)


def pictures(world: WorldModel, rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, *world.frames_shape), dtype=np.uint8)


def features(world: WorldModel, a: np.ndarray) -> Tensor:
    """Actions (B, T, 1) to features (B, T, E), written out: bounds of +-2 to +-1."""
    assert world.actions is not None
    packed = torch.from_numpy(a / 2.0).float()
    return world.actions(packed, torch.ones(packed.shape[:2], dtype=torch.bool))


def walk(
    world: WorldModel, state: WorldState, a: np.ndarray, sampling: Sampling | None = None
) -> tuple[WorldState, list[Chunk], Tensor]:
    """Step through actions (B, T, 1): the state, the chunks, and the noisy tokens (B, T, N, D)."""
    chunks, noisy = [], []
    for t in range(a.shape[1]):
        state, chunk = world.step(state, a[:, t], sampling)
        chunks.append(chunk)
        noisy.append(state.noisy[:, -1])
    return state, chunks, torch.stack(noisy, dim=1) if noisy else torch.empty(0)


def same_chunk(a: Chunk, b: Chunk) -> bool:
    """Bit for bit, every field."""
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(Chunk)]
    return all((x is None and y is None) or torch.equal(x, y) for x, y in pairs)


def contents(state: WorldState) -> list[Tensor]:
    """Every tensor of a state, with the keys and values in view, copied."""
    kept = [t.clone() for t in state._tensors().values()]
    return kept + [s.kv.clone() for c in state.context.cache.cohorts for s in c.segments]


def unchanged(before: list[Tensor], state: WorldState) -> bool:
    after = contents(state)
    return len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def near_tie(world: WorldModel, latent: Tensor) -> Tensor:
    """(B, F, height, width, 3) bool: before rounding, the pixel is within 1e-3 of half a level."""
    assert isinstance(world.codec, ConvCodec)
    output = rearrange(world.codec.decoder(latent), "b (f c) height width -> b f c height width", c=3)
    pixels = output * PIXEL_SCALE + world.codec.background
    return rearrange((pixels.frac().abs() - 0.5).abs() < 1e-3, "b f c height width -> b f height width c")


def close(world: WorldModel, a: Chunk, b: Chunk) -> None:
    """Across batch shapes: uint8 frames equal (but for ties of rounding), everything else to 1e-4."""
    differs = a.frames != b.frames
    assert not (differs & ~near_tie(world, a.latent)).any()
    assert differs.sum() <= 2 and ((a.frames.int() - b.frames.int()).abs() <= 1).all()
    for name in ("log_prob", "action_gain", "reward", "termination", "latent", "noise", "log_prob_map"):
        assert torch.allclose(getattr(a, name), getattr(b, name), rtol=1e-4, atol=1e-4), name
    assert torch.equal(a.sweeps, b.sweeps) and torch.equal(a.context_frames, b.context_frames)


def row(chunk: Chunk, i: int) -> Chunk:
    values = {f.name: getattr(chunk, f.name) for f in fields(Chunk)}
    return Chunk(**{k: None if v is None else v[i : i + 1] for k, v in values.items()})
