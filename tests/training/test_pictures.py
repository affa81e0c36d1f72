"""What heads with an eye learn from: real chunks, some before the scenery of other episodes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from worldmodel.errors import ConfigError, DataError
from worldmodel.heads import EyeConfig
from worldmodel.training.episodes import Episode
from worldmodel.training.flow import HeadsStage, HeadsTraining, Latents, train_heads
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
    drawn = pictures.chunks(np.array([2, 3, 7]), 0.0, np.random.default_rng(0))
    wanted = [episodes[0].frames[9:13], episodes[1].frames[1:5], episodes[1].frames[17:21]]
    assert np.array_equal(drawn.numpy(), np.stack(wanted))
    ends = np.stack([episodes[0].observations[12], episodes[1].observations[4], episodes[1].observations[20]])
    every = np.concatenate([e.observations[4::4] for e in episodes])
    told = (ends - every.mean(0)) / every.std(0)
    np.testing.assert_allclose(pictures.observations[[2, 3, 7]], told, atol=1e-4)


def test_another_scenery_leaves_what_moves() -> None:
    episodes = [flight(0), flight(7)]
    assert (scenery(episodes[0].frames) == 20).all() and (scenery(episodes[1].frames) == 55).all()
    assert in_front(episodes[0].frames[:1], scenery(episodes[0].frames)).sum() == 9
    pictures, rng = Pictures(episodes, 4), np.random.default_rng(0)
    drawn = pictures.chunks(np.full(40, 3), 1.0, rng).numpy()
    spots = (drawn == 250).all(-1)
    assert (spots == spots[0]).all() and (spots[0].sum((1, 2)) == 9).all()
    assert set(drawn[~spots].ravel()) == {20, 55}
    assert (pictures.chunks(np.full(40, 3), 0.0, rng).numpy()[~spots] == 20).all()


def test_half_of_the_chunks_are_as_the_codec_decodes_them() -> None:
    episodes = [flight(0), flight(7)]
    paler = [np.clip(e.frames[1:], 0, 200) for e in episodes]
    pictures = Pictures(episodes, 4, paler)
    drawn = pictures.chunks(np.full(200, 3), 0.5, np.random.default_rng(0)).numpy()
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
    frames = pictures.chunks(np.arange(len(data.rewards)), 0.0, np.random.default_rng(0))
    with torch.no_grad():
        told = heads(data.latents, heads.eye(frames), data.packed).reward
    missed = (told - data.rewards).square().mean() / data.rewards.var()
    assert float(missed) < 0.2


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
