from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from agents import (
    Custom,
    LatentDistance,
    Moment,
    PredictedReward,
    SurprisePenalty,
    TerminationPenalty,
    imagine,
)
from agents.objectives import Objective, as_objective, judge
from worldmodel import InputError, WorldModel

N, H = 4, 3


@pytest.fixture(scope="module")
def moments(world: WorldModel) -> list[Moment]:
    """The moments of one imagined plan."""
    kept: list[Moment] = []

    def watch(moment: Moment) -> np.ndarray:
        kept.append(moment)
        return np.zeros(N)

    rng = np.random.default_rng(0)
    state, _ = world.reset([3])
    imagine(world, state, rng.uniform(-2, 2, (N, H, 1)).astype(np.float32), watch)
    return kept


def returns(world: WorldModel, objective: Objective | Any) -> np.ndarray:
    rng = np.random.default_rng(0)
    state, _ = world.reset([3])
    return imagine(world, state, rng.uniform(-2, 2, (N, H, 1)).astype(np.float32), objective).returns


def test_moments_follow_each_other(moments: list[Moment]) -> None:
    assert [m.step for m in moments] == [0, 1, 2]
    assert [m.last for m in moments] == [False, False, True]
    torch.testing.assert_close(moments[0].survival, torch.ones(N, dtype=torch.float64))
    for now, following in zip(moments, moments[1:], strict=False):
        torch.testing.assert_close(following.survival, now.survival * (1 - now.chunk.termination.double()))
        assert following.before is now.after


def test_reward_and_termination_by_hand(world: WorldModel, moments: list[Moment]) -> None:
    expected = np.zeros(N)
    alive = np.ones(N)
    for t, m in enumerate(moments):
        ends = m.chunk.termination.double().numpy()
        expected += 0.9**t * alive * m.chunk.reward.double().numpy() - 50.0 * alive * ends
        alive = alive * (1 - ends)
    got = returns(world, PredictedReward(0.9) + TerminationPenalty(50.0))
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_objectives_add_up(world: WorldModel) -> None:
    def third(moment: Moment) -> Any:
        return moment.chunk.reward * 2

    parts = [PredictedReward(), TerminationPenalty(3.0), Custom(third)]
    total = returns(world, parts[0] + parts[1] + parts[2])
    np.testing.assert_allclose(total, sum(returns(world, p) for p in parts), rtol=1e-6)


def test_latent_distance(world: WorldModel, moments: list[Moment]) -> None:
    picture = world.starts["frames"][0, 0, 0]
    objective = LatentDistance.to_picture(world, picture, weight=2.0)
    clip = torch.from_numpy(np.stack([picture] * 4))[None]
    goal = world.codec.encode(clip, world.codec.initial_state(1))[0][0, 0]
    m = moments[0]
    by_hand = [-2.0 * float((latent - goal).square().mean()) for latent in m.chunk.latent]
    np.testing.assert_allclose(judge(objective, m).numpy(), by_hand, rtol=1e-5)
    last = LatentDistance(goal, only_last=True)
    assert not judge(last, moments[0]).any()
    assert (judge(last, moments[-1]) < 0).all()
    assert float(judge(LatentDistance(m.chunk.latent[1]), m)[1]) == 0.0
    with pytest.raises(InputError, match="goal picture"):
        LatentDistance.to_picture(world, picture[:-1])


def test_surprise_is_of_the_frames_encoded_again(world: WorldModel, moments: list[Moment]) -> None:
    m = moments[1]
    _, seen = world.observe(m.before, m.chunk.frames, m.actions)
    surprise = -seen.log_prob
    limit = float(surprise.median())
    expected = -0.5 * (surprise - limit).clamp_min(0)
    got = judge(SurprisePenalty(0.5, limit), m)
    torch.testing.assert_close(got, expected)
    assert (got == 0).any() and (got < 0).any()
    own = -0.5 * (-m.chunk.log_prob - limit).clamp_min(0)
    assert not torch.allclose(got, own)


def test_surprise_is_calibrated_on_real_chunks(world: WorldModel) -> None:
    frames = world.starts["frames"]
    actions = world.start_actions(np.arange(len(frames)))
    state, _ = world.observe(world.initial_state(range(len(frames))), frames[:, 0], actions[:, 0])
    nats = -world.score(state, frames[:, 1], actions[:, 1]).log_prob.numpy()
    for quantile in (0.5, 0.95):
        objective = SurprisePenalty.calibrated(world, 1.0, quantile)
        assert objective.limit == pytest.approx(np.quantile(nats, quantile), rel=1e-6)
    with pytest.raises(InputError, match="2 or more"):
        SurprisePenalty.calibrated(world, 1.0, clips=(frames[:, :1], actions[:, :1]))


def test_a_terminal_value_is_asked_once(world: WorldModel) -> None:
    asked = []

    def value(moment: Moment) -> np.ndarray:
        asked.append(moment.step)
        return np.full(N, 7.0)

    np.testing.assert_array_equal(returns(world, Custom(value)), 7.0 * H)
    assert asked == [H - 1]


def test_nan_names_the_step_that_made_it(world: WorldModel) -> None:
    def broken(moment: Moment) -> np.ndarray:
        values = np.zeros(N)
        values[2] = np.nan if moment.step == 1 else 0.0
        return values

    for objective in (broken, PredictedReward() + Custom(broken)):
        with pytest.raises(InputError, match=r"broken returned nan at step 1 of 3 \(branch 2") as caught:
            returns(world, objective)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [0.0, np.zeros((N, 1)), np.zeros(N - 1), "high", None])
def test_other_shapes_are_refused(world: WorldModel, value: Any) -> None:
    with pytest.raises(InputError, match=rf"at step 0 returned .*expected \({N},\)"):
        returns(world, lambda moment: value)


def test_an_objective_is_one_or_a_function() -> None:
    with pytest.raises(InputError, match="expected an Objective or a function"):
        as_objective(3)  # type: ignore[arg-type]
