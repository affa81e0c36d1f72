from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces

from worldmodel.training.codec import LatentEpisode
from worldmodel.training.flow import Latents
from worldmodel.training.heads import HeadsStage, HeadsTraining
from worldmodel.training.loop import LoopConfig
from worldmodel.training.returns import returns_to_go, worth_imitating

REWARDS = torch.tensor([1.0, 2.0, 4.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0])
LENGTHS = np.array([3, 6])


def test_returns_are_of_what_comes_after() -> None:
    terminated = torch.tensor([False, False, True] + [False] * 6)
    values, known = returns_to_go(REWARDS, terminated, LENGTHS, 0.5)
    assert values[:3].tolist() == [2.0 + 0.5 * 4.0, 4.0, 0.0]
    assert known[:3].all()  # all of an episode that ended
    assert values[3].item() == pytest.approx(-(1 - 0.5**5) / 0.5)
    assert known[3:].tolist() == [True, True, False, False, False, False]  # 0.5^4 behind a cut is negligible


def test_the_better_half_is_imitated_where_something_follows() -> None:
    assert worth_imitating(REWARDS, LENGTHS).tolist() == [True, True, False] + [False] * 6
    three = torch.cat((REWARDS, torch.tensor([9.0, 9.0])))
    chosen = worth_imitating(three, np.array([3, 6, 2]))
    assert chosen.tolist() == [True, True, False] + [False] * 6 + [True, False]


def test_heads_learn_what_the_latents_tell() -> None:
    """A latent that says how it ends, when, and what comes next: value and prior find it, on latents not seen."""
    rng, episodes = np.random.default_rng(0), []
    for good in [True, False] * 40:
        length = int(rng.integers(4, 9))
        actions = torch.from_numpy(rng.integers(0, 3, length))
        left = torch.arange(length - 1, -1, -1.0)
        latents = torch.zeros(length, 5, 1, 1)
        latents[:, 0, 0, 0] = left / 4 - 1
        latents[torch.arange(length - 1), 1 + (actions[1:] if good else 2 - actions[1:]), 0, 0] = 1.0
        latents[:, 4] = float(good)
        ends = torch.arange(length) == length - 1
        rewards = torch.full((length,), 1.0) + (good - 0.5) * ends * 20
        episodes.append(LatentEpisode(latents, actions, rewards, ends))
    space = spaces.Discrete(3)
    data, fresh = Latents.of(episodes[:60], space), Latents.of(episodes[60:], space)
    loop = LoopConfig(steps=400, lr=5e-3, warmup=10)
    stage = HeadsStage(HeadsTraining(loop, width=32, batch=64, discount=1.0), data)
    optimizer = torch.optim.Adam(stage.module.parameters(), lr=loop.lr)
    for step in range(loop.steps):
        optimizer.zero_grad()
        metrics = stage.backward(
            np.random.default_rng(step), torch.Generator().manual_seed(step), step / loop.steps
        )
        optimizer.step()
    assert set(metrics) == {"loss", "reward", "termination", "value", "prior"}
    ahead = stage.heads.ahead(fresh.latents)
    chosen = worth_imitating(fresh.rewards, fresh.lengths)
    following = fresh.packed.roll(-1, 0)
    assert (ahead.prior[chosen].argmax(1) == following[chosen].argmax(1)).float().mean() > 0.95
    values, _ = returns_to_go(fresh.rewards, fresh.terminated, fresh.lengths, 1.0)
    counted = values - values.mean(), ahead.value - ahead.value.mean()
    assert float((counted[0] * counted[1]).mean() / counted[0].std() / counted[1].std()) > 0.95
