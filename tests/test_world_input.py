"""Inputs are checked before anything moves: one line, and the state goes on bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.sessions import (
    actions,
    contents,
    pictures,
    same_chunk,
    small_world,
    unchanged,
    walk,
)
from worldmodel.chunk import actions_at
from worldmodel.errors import InputError, WorldModelError
from worldmodel.inputs import chunks_given
from worldmodel.sampling import Sampling
from worldmodel.state import WorldState
from worldmodel.world import WorldModel


@pytest.fixture(scope="module")
def world() -> WorldModel:
    """Windows of 6 chunks, re-encoded to 3; 4 tokens of 3 dimensions a chunk."""
    return small_world()


# ---- bad input ---------------------------------------------------------------------------------------------
BAD_ACTIONS: dict[str, Any] = {
    "not batched": np.zeros(1, np.float32),
    "one row too few": np.zeros((1, 1), np.float32),
    "too wide": np.zeros((2, 2), np.float32),
    "NaN": np.array([[0.0], [np.nan]], np.float32),
    "out of range": np.array([[0.0], [2.5]], np.float32),
    "text": "left",
    "a dict": {"torque": 0.0},
}
BAD_FRAMES: dict[str, Callable[[np.ndarray], Any]] = {
    "one row too few": lambda f: f[:1],
    "one frame too few": lambda f: f[:, :3],
    "another size": lambda f: f[:, :, :16],
    "channels first": lambda f: np.moveaxis(f, -1, 2),
    "float32": lambda f: f.astype(np.float32) / 255,
    "int64": lambda f: f.astype(np.int64),
    "one clip": lambda f: f[0],
    "grey": lambda f: f[..., :1],
    "text": lambda f: "frames",
    "None": lambda f: None,
    "ragged": lambda f: [[1], [1, 2]],
}


@pytest.fixture
def session(world: WorldModel) -> WorldState:
    return walk(world, world.initial_state([1, 2]), actions(2, 4))[0]


def refused(world: WorldModel, state: WorldState, call: Callable[[], Any], kind: type = InputError) -> None:
    """One line of the package's own class; the state is what it was, and goes on bit for bit."""
    before = contents(state)
    with pytest.raises(kind) as error:
        call()
    assert isinstance(error.value, WorldModelError)
    assert str(error.value) and "\n" not in str(error.value)
    assert unchanged(before, state)
    fresh, _, _ = walk(world, world.initial_state([1, 2]), actions(2, 4))
    a = actions(2, 3, seed=5)
    _, mine, _ = walk(world, state, a)
    _, theirs, _ = walk(world, fresh, a)
    assert all(same_chunk(x, y) for x, y in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("action", BAD_ACTIONS.values(), ids=BAD_ACTIONS)
def test_bad_actions(world: WorldModel, session: WorldState, action: Any) -> None:
    refused(world, session, lambda: world.step(session, action))
    with pytest.raises(InputError):
        world.observe(session, pictures(world, 2), action)
    with pytest.raises(InputError):
        world.score(session, pictures(world, 2), action)


@pytest.mark.parametrize("spoil", BAD_FRAMES.values(), ids=BAD_FRAMES)
def test_bad_frames(world: WorldModel, session: WorldState, spoil: Callable[[np.ndarray], Any]) -> None:
    frames, a = spoil(pictures(world, 2)), actions(2, 1)[:, 0]
    refused(world, session, lambda: world.observe(session, frames, a))
    with pytest.raises(InputError):
        world.score(session, frames, a)
    with pytest.raises(InputError):
        world.infer_noise(session, frames, a)


def test_bad_noise(world: WorldModel, session: WorldState) -> None:
    good, a = torch.zeros(2, *world.latent_shape), actions(2, 1)[:, 0]
    bad = good.clone()
    bad[1, 0, 0, 0] = float("nan")
    for noise in (good[:1], good[:, :1], bad):
        refused(world, session, lambda noise=noise: world.step(session, a, noise=noise))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("guidance", -1.0),
        ("guidance", float("nan")),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("tolerance", -1e-9),
        ("context", "forget"),
    ],
)
def test_bad_sampling(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=field):
        Sampling(**{field: value})


def test_a_likelihood_that_is_not_finite_is_an_error(world: WorldModel, session: WorldState) -> None:
    """Noise that is finite but absurd overflows: nothing is committed."""
    noise = torch.full((2, *world.latent_shape), 1e30)
    a = actions(2, 1)[:, 0]
    refused(world, session, lambda: world.step(session, a, noise=noise), WorldModelError)


def test_a_world_without_actions_takes_none(world: WorldModel) -> None:
    silent = WorldModel(world.spec, world.flow, world.codec, None, world.heads, world.starts)
    with pytest.raises(InputError, match="takes no actions"):
        silent.step(silent.initial_state([1]), np.zeros((1, 1)))


def test_plans_may_be_lists(world: WorldModel) -> None:
    state, _ = world.reset([0])
    plan = [[[0.5], [-1.0]]]
    _, lists = world.rollout(state, plan)
    _, arrays = world.rollout(state, np.array(plan, dtype=np.float32))
    assert all(same_chunk(a, b) for a, b in zip(lists, arrays, strict=True))
    with pytest.raises(InputError, match="not arrays"):
        world.rollout(state, [[[0.5], [0.5, 0.2]]])


def test_actions_may_be_dicts_of_dicts() -> None:
    nested = {
        "arm": {"left": np.arange(6).reshape(1, 3, 2), "right": np.arange(3)[None]},
        "go": np.zeros((1, 3)),
    }
    assert chunks_given(nested) == 3
    assert actions_at(nested, 1)["arm"]["left"].tolist() == [[2, 3]]
    with pytest.raises(InputError, match="with 1 chunks at least"):
        chunks_given({**nested, "go": np.zeros((1, 2))})
