from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces

from tests.toy import toy_world
from worldmodel import InputError, WorldModel
from worldmodel.errors import ConfigError
from worldmodel.heads import Eye, EyeConfig, Heads, HeadsConfig


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> WorldModel:
    return toy_world(tmp_path_factory.mktemp("ahead") / "toy", spaces.Discrete(3, start=1), discount=0.9)


def test_a_world_brings_its_value_and_prior(world: WorldModel) -> None:
    assert world.heads is not None
    state, _ = world.reset([0, 1])
    value, prior = world.heads.ahead(state.latent)
    assert value.shape == (2,) and prior.shape == (2, 3)
    assert not value.requires_grad
    alone = world.heads.ahead(state.latent[1:])
    torch.testing.assert_close(alone.value, value[1:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alone.prior, prior[1:], rtol=1e-5, atol=1e-6)


def test_value_is_in_units_of_reward() -> None:
    torch.manual_seed(0)
    heads = Heads(HeadsConfig(8, 2, 4, discount=1.0))
    latent = torch.randn(3, 2, 2, 2)
    raw, _ = heads.raw_ahead(latent)
    heads.value_mean.fill_(-5.0)
    heads.value_std.fill_(10.0)
    torch.testing.assert_close(heads.ahead(latent).value, raw.detach() * 10.0 - 5.0)


def test_heads_without_a_discount_are_what_they_were(tmp_path: Path) -> None:
    """Same weights by name, so that worlds made before load strictly; what they lack is refused."""
    world = toy_world(tmp_path / "plain")
    assert world.heads is not None
    names = {f"layers.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    assert set(world.heads.state_dict()) == names | {"reward_mean", "reward_std"}
    state, _ = world.reset([0])
    with pytest.raises(InputError, match="train them with a discount"):
        world.heads.ahead(state.latent)


def test_value_and_prior_read_the_observation_that_the_memory_tells() -> None:
    torch.manual_seed(0)
    heads = Heads(HeadsConfig(8, 2, 4, discount=1.0, eye=EyeConfig(memory=6), observed=3))
    seen = torch.randn(5, 6)
    assert heads.tell is not None
    value, prior = heads.raw_ahead(seen)
    told, _ = heads.raw_ahead(torch.zeros(5, 6), heads.tell(seen))
    assert torch.equal(value, told) and prior.shape == (5, 2)
    with pytest.raises(ConfigError, match="observed is 3 without a memory"):
        HeadsConfig(8, 2, eye=EyeConfig(), observed=3)


def test_a_discount_is_a_share() -> None:
    for bad in (0.0, 1.5, float(np.nan)):
        with pytest.raises(ConfigError, match="discount"):
            HeadsConfig(8, 2, discount=bad)


EYES = [EyeConfig(frames=4, channels=6, points=4), EyeConfig(frames=4, channels=6, points=4, memory=5)]


@pytest.fixture(scope="module", params=EYES, ids=["eye", "memory"])
def watcher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> WorldModel:
    folder = tmp_path_factory.mktemp("watcher") / "toy"
    return toy_world(folder, spaces.Discrete(3), discount=0.9, eye=request.param)


def test_an_eye_sees_the_same_with_and_without_the_pixels_asked_for(watcher: WorldModel) -> None:
    """And alone what it sees in company."""
    state, _ = watcher.reset([0, 1, 2])
    action = np.array([0, 1, 2])
    after, shown = watcher.step(state, action)
    _, unseen = watcher.step(state, action, decode=False)
    assert torch.equal(shown.reward, unseen.reward) and torch.equal(shown.termination, unseen.termination)
    assert shown.reward.std() > 0 and unseen.frames.shape[1] == 0
    one, alone = watcher.step(state.select([1]), action[1:2])
    assert torch.equal(alone.reward, shown.reward[1:2])
    assert torch.equal(watcher.ahead(one).value, watcher.ahead(after).value[1:2])
    assert torch.equal(watcher.ahead(one).prior, watcher.ahead(after).prior[1:2])


def test_what_an_eye_keeps_goes_with_its_session(watcher: WorldModel, tmp_path: Path) -> None:
    state, _ = watcher.reset([0, 1])
    assert state.seen is not None and watcher.heads is not None
    assert state.seen.shape == (2, watcher.heads.config.seen) and state.seen[0].ne(state.seen[1]).any()
    assert torch.equal(state.fork(2).seen, state.seen.repeat_interleave(2, 0))
    both = type(state).concat([state.select([1]), state.select([0])])
    assert torch.equal(both.seen, state.seen.flip(0))
    watcher.save_state(state, tmp_path / "state")
    assert torch.equal(watcher.load_state(tmp_path / "state").seen, state.seen)


def test_a_memory_tells_pasts_apart(watcher: WorldModel) -> None:
    """The same chunk behind other ones: a memory keeps a difference, an eye without one does not."""
    rng = np.random.default_rng(0)
    clips = rng.integers(0, 256, (2, *watcher.frames_shape), dtype=np.uint8)
    state, action = watcher.initial_state([0, 1]), np.array([1, 1])
    state, _ = watcher.observe(state, clips, action)
    state, _ = watcher.observe(state, clips[[0, 0]], action)
    assert state.seen is not None and watcher.heads is not None
    remembers = watcher.heads.memory is not None
    assert torch.equal(state.seen[0], state.seen[1]) != remembers


def test_an_eye_reads_the_real_frames_that_are_observed(watcher: WorldModel) -> None:
    assert watcher.heads is not None
    state, _ = watcher.reset([0])
    frames = np.random.default_rng(0).integers(0, 256, (1, *watcher.frames_shape), dtype=np.uint8)
    after, chunk = watcher.observe(state, frames, np.array([1]))
    packed, latent = torch.tensor([[0.0, 1.0, 0.0]]), torch.zeros(1, *watcher.latent_shape)
    seen = watcher.heads.see(state.seen, latent, torch.from_numpy(frames), packed, watcher.codec)
    assert seen is not None and after.seen is not None and torch.equal(seen, after.seen)
    assert torch.equal(chunk.reward, watcher.heads(latent, seen, packed).reward)


def test_an_eye_follows_what_moves() -> None:
    """Before training, the points that are drawn to motion are far on the way to it, whatever the scenery."""
    torch.manual_seed(0)
    eye, rng = Eye(EyeConfig(frames=4, channels=8, points=8)), np.random.default_rng(0)
    for row, column in ((10, 40), (50, 8)):
        frames = np.repeat(rng.integers(0, 256, (1, 1, 64, 64, 3), dtype=np.uint8), 4, axis=1)
        for k in range(4):
            frames[0, k, row : row + 3, column + k : column + k + 3] = 128
        with torch.no_grad():
            places = eye(torch.from_numpy(frames)).view(8, -1)[1::2, :2]  # (row, column) in [-1, 1]
        wanted = torch.tensor([row + 1.0, column + 2.0]) / 31.5 - 1.0
        assert ((places - wanted).norm(dim=1) < 0.6 * wanted.norm()).all()


def test_an_eye_of_other_chunks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="heads.eye looks at 5 frames, expected the codec's 4"):
        toy_world(tmp_path / "toy", eye=EyeConfig(frames=5))
    for bad in ({"frames": 1}, {"channels": 0}, {"points": 0}, {"memory": -1}):
        with pytest.raises(ConfigError):
            EyeConfig(**bad)


def test_a_world_without_heads_foresees_nothing(watcher: WorldModel, world: WorldModel) -> None:
    bare = WorldModel(watcher.spec, watcher.flow, watcher.codec, watcher.actions, None, watcher.starts)
    with pytest.raises(InputError, match="has no heads"):
        bare.ahead(bare.initial_state([0]))
    state, _ = world.reset([0, 1])
    assert world.heads is not None and state.seen is None
    assert torch.equal(world.ahead(state).value, world.heads.ahead(state.latent).value)
