"""What heads with an eye learn from: real chunks, some before the scenery of other episodes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from worldmodel.errors import ConfigError, DataError, InputError
from worldmodel.heads import EyeConfig, Heads
from worldmodel.training.episodes import Episode
from worldmodel.training.flow import Latents
from worldmodel.training.heads import HeadsStage, HeadsTraining, MemoryTraining, train_heads
from worldmodel.training.loop import LoopConfig
from worldmodel.training.pictures import Pictures, in_front, scenery

EYE = EyeConfig(frames=4, channels=8, points=4)


def flight(index: int, chunks: int = 10) -> Episode:
    """A bright spot that drifts over a grey level of its own; the reward is its height at the chunk's end."""
    rng = np.random.default_rng(index)
    frames = np.full((1 + 4 * chunks, 32, 32, 3), 20 + 5 * (index % 20), dtype=np.uint8)
    row, column = rng.uniform(4, 27, 2)
    speed = rng.uniform(-0.6, 0.6, 2)
    seen = np.zeros((len(frames), 2), dtype=np.float32)
    for k, frame in enumerate(frames):
        place = np.abs((np.array([row, column]) + speed * k) % 50 - 25) + 3  # to and fro
        seen[k] = place
        r, c = place.astype(int)
        frame[r : r + 3, c : c + 3] = 250
    rewards = -seen[4::4, 0] / 10
    no = np.zeros(chunks, dtype=bool)
    return Episode(frames, np.zeros((chunks, 1), np.float32), rewards, no, no, seen, {})


def latents_of(episodes: list[Episode]) -> Latents:
    rewards = torch.from_numpy(np.concatenate([e.rewards for e in episodes]))
    count = len(rewards)
    blind = torch.zeros(count, 1, 1, 1)
    ends = torch.zeros(count, dtype=torch.bool)
    return Latents(blind, torch.zeros(count, 1), rewards, ends, np.array([len(e.rewards) for e in episodes]))


def test_chunks_are_those_of_the_episodes_end_to_end() -> None:
    episodes = [flight(0, 3), flight(1, 5)]
    pictures = Pictures(episodes, 4)
    drawn = pictures.windows(np.array([2, 3, 7]), 1, 0.0, np.random.default_rng(0))[:, 0]
    wanted = [episodes[0].frames[9:13], episodes[1].frames[1:5], episodes[1].frames[17:21]]
    assert np.array_equal(drawn.numpy(), np.stack(wanted))
    ends = np.stack([episodes[0].observations[12], episodes[1].observations[4], episodes[1].observations[20]])
    assert np.array_equal(pictures.observations[[2, 3, 7]], ends)


def test_a_window_keeps_its_scenery() -> None:
    pictures = Pictures([flight(0), flight(7)], 4)
    drawn = pictures.windows(np.full(40, 1), 9, 1.0, np.random.default_rng(0)).numpy()
    assert drawn.shape == (40, 9, 4, 32, 32, 3)
    assert np.array_equal((drawn[3] == 250).reshape(36, 32, 32, 3), flight(0).frames[5:] == 250)
    shades = drawn.min(axis=(2, 3, 4, 5))
    assert (shades == shades[:, :1]).all() and set(shades[:, 0]) == {20, 55}


def test_another_scenery_leaves_what_moves() -> None:
    episodes = [flight(0), flight(7)]
    assert (scenery(episodes[0].frames) == 20).all() and (scenery(episodes[1].frames) == 55).all()
    assert in_front(episodes[0].frames[:1], scenery(episodes[0].frames)).sum() == 9
    pictures, rng = Pictures(episodes, 4), np.random.default_rng(0)
    drawn = pictures.windows(np.full(40, 3), 1, 1.0, rng)[:, 0].numpy()
    spots = (drawn == 250).all(-1)
    assert (spots == spots[0]).all() and (spots[0].sum((1, 2)) == 9).all()
    assert set(drawn[~spots].ravel()) == {20, 55}
    assert (pictures.windows(np.full(40, 3), 1, 0.0, rng)[:, 0].numpy()[~spots] == 20).all()


def test_half_of_the_chunks_are_as_the_codec_decodes_them() -> None:
    episodes = [flight(0), flight(7)]
    paler = [np.clip(e.frames[1:], 0, 200) for e in episodes]
    pictures = Pictures(episodes, 4, paler)
    drawn = pictures.windows(np.full(200, 3), 1, 0.5, np.random.default_rng(0))[:, 0].numpy()
    decoded = drawn.max(axis=(1, 2, 3, 4)) == 200
    assert 0.4 < decoded.mean() < 0.6
    assert np.array_equal(
        drawn[decoded][drawn[decoded] == 200].shape, (36 * 3 * decoded.sum(),)
    )  # 9 pixels, 4 frames
    assert {int(p.min()) for p in drawn} == {20, 55}


def test_heads_with_an_eye_learn_what_only_the_picture_tells(tmp_path: Path) -> None:
    """On scenery never seen; and an interrupted run would go on, since the readout is in its checkpoint."""
    train, fresh = [flight(i) for i in range(40)], [flight(i) for i in range(100, 112)]
    loop = LoopConfig(steps=150, lr=1e-2, warmup=10, ema=0.9)
    config = HeadsTraining(loop, width=32, batch=64, eye=EYE, swap=0.5, observed=0.5)
    heads, _ = train_heads(config, latents_of(train), tmp_path, pictures=Pictures(train, 4))
    again, _ = train_heads(config, latents_of(train), tmp_path, pictures=Pictures(train, 4))
    assert all(torch.equal(a, b) for a, b in zip(heads.parameters(), again.parameters(), strict=True))
    assert heads.eye is not None
    data, pictures = latents_of(fresh), Pictures(fresh, 4)
    frames = pictures.windows(np.arange(len(data.rewards)), 1, 0.0, np.random.default_rng(0))[:, 0]
    with torch.no_grad():
        told = heads(data.latents, heads.eye(frames), data.packed).reward
    missed = (told - data.rewards).square().mean() / data.rewards.var()
    assert float(missed) < 0.2


def recalled(episodes: list[Episode]) -> Latents:
    """As `latents_of`, but each reward is what the chunk before deserved, and every other action 1."""
    data = latents_of(episodes)
    before = torch.cat(
        [torch.cat((part[:1], part[:-1])) for part in data.rewards.split(data.lengths.tolist())]
    )
    packed = (torch.arange(len(before))[:, None] % 2).float()
    return replace(data, rewards=before, packed=packed)


def told_by(heads: Heads, data: Latents, pictures: Pictures) -> tuple[Tensor, Tensor]:
    """What is kept (S, M) of episodes, chunk after chunk, and the predicted rewards (S,)."""
    assert heads.eye is not None and heads.memory is not None
    kept = []
    for at, (first, count) in enumerate(
        zip(np.cumsum(data.lengths) - data.lengths, data.lengths, strict=True)
    ):
        frames = pictures.windows(np.array([first]), int(count), 0.0, np.random.default_rng(at))[0]
        seen = torch.zeros(1, heads.config.seen)
        for features, packed in zip(heads.eye(frames), data.packed[first : first + count], strict=True):
            seen = heads.memory(features[None], packed[None], seen)
            kept.append(seen)
    seen = torch.cat(kept)
    return seen, heads(data.latents, seen, data.packed).reward


def test_a_memory_learns_what_one_chunk_does_not_tell(tmp_path: Path) -> None:
    """The reward of the chunk before, and the observation, on scenery never seen; and an interrupted run goes on."""
    train, fresh = [flight(i) for i in range(40)], [flight(i) for i in range(100, 112)]
    loop = LoopConfig(steps=150, lr=1e-2, warmup=10, ema=0.9)
    memory = MemoryTraining(replace(loop, lr=5e-3), batch=16, length=8, noise=0.05, copies=1)
    config = HeadsTraining(
        loop,
        width=32,
        batch=64,
        discount=0.5,
        eye=replace(EYE, memory=16),
        swap=0.5,
        observed=0.5,
        memory=memory,
    )
    learned = recalled(train), Pictures(train, 4)
    heads, _ = train_heads(config, learned[0], tmp_path, pictures=learned[1])
    again, _ = train_heads(config, learned[0], tmp_path, pictures=learned[1])
    assert all(
        torch.equal(a, b)
        for a, b in zip(heads.state_dict().values(), again.state_dict().values(), strict=True)
    )
    data, pictures = recalled(fresh), Pictures(fresh, 4)
    with torch.no_grad():
        seen, reward = told_by(heads, data, pictures)
        told = heads.observation(seen)
        _, prior = heads.ahead(seen)
    assert float((reward - data.rewards).square().mean() / data.rewards.var()) < 0.4
    assert float((told - pictures.observations).square().mean() / pictures.observations.var()) < 0.2
    assert prior.shape == (len(seen), 1)
    further, _ = train_heads(
        replace(config, eye=None, swap=0.0, observed=0.0), *learned[:1], tmp_path / "on", again, learned[1]
    )
    assert further.memory is again.memory and not (tmp_path / "on" / "checkpoint.safetensors").exists()


def test_a_memory_without_observations_is_read_itself(tmp_path: Path) -> None:
    blind = [flight(i)._replace(observations=np.zeros((41, 0), np.float32)) for i in range(6)]
    loop = LoopConfig(steps=2, warmup=1)
    config = HeadsTraining(
        loop,
        width=8,
        batch=8,
        discount=0.5,
        eye=replace(EYE, memory=4),
        memory=MemoryTraining(loop, batch=2, length=5),
    )
    heads, _ = train_heads(config, latents_of(blind), tmp_path, pictures=Pictures(blind, 4))
    assert heads.config.observed == 0 and heads.tell is None
    seen, _ = told_by(heads.requires_grad_(False), latents_of(blind), Pictures(blind, 4))
    assert heads.ahead(seen).value.shape == (60,)
    with pytest.raises(InputError, match="tell no observation"):
        heads.observation(seen)
    seeing = [flight(i) for i in range(6)]
    told, _ = train_heads(config, latents_of(seeing), tmp_path / "told", pictures=Pictures(seeing, 4))
    train_heads(config, latents_of(blind), tmp_path / "blind", told, Pictures(blind, 4))
    with pytest.raises(DataError, match="no return is known at discount 0.9"):
        train_heads(
            replace(config, discount=0.9),
            latents_of(seeing),
            tmp_path / "short",
            pictures=Pictures(seeing, 4),
        )
    three = [e._replace(observations=np.zeros((41, 3), np.float32)) for e in blind]
    with pytest.raises(DataError, match="observations of 3 numbers, expected 2"):
        train_heads(config, latents_of(three), tmp_path / "three", told, Pictures(three, 4))


def test_what_an_eye_cannot_learn_from_is_refused() -> None:
    config = HeadsTraining(eye=EYE)
    data, few = latents_of([flight(0), flight(1)]), Pictures([flight(0)], 4)
    for pictures in (None, few):
        with pytest.raises(DataError, match="frames of the same chunks"):
            HeadsStage(config, data, pictures=pictures)
    with pytest.raises(DataError, match="no episodes"):
        Pictures([], 4)
    with pytest.raises(ConfigError, match="with an eye"):
        HeadsTraining(swap=0.5)
    with pytest.raises(ConfigError, match="swap is 2"):
        replace(config, swap=2.0)
    for bad in ({"batch": 0}, {"length": 1}, {"copies": 0}, {"noise": -1.0}, {"observed": float("nan")}):
        with pytest.raises(ConfigError):
            MemoryTraining(**bad)
