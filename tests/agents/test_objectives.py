from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from agents import (
    Custom,
    GoalLikelihood,
    LatentDistance,
    Moment,
    PredictedReward,
    SurprisePenalty,
    TerminalValue,
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


def test_a_terminal_value_is_asked_once_and_of_those_that_still_run(
    world: WorldModel, moments: list[Moment]
) -> None:
    asked: list[torch.Tensor] = []

    def value(latents: torch.Tensor) -> torch.Tensor:
        asked.append(latents)
        return latents.sum((1, 2, 3))

    got = returns(world, TerminalValue(value, discount=0.9))
    assert len(asked) == 1
    alive = np.prod([1 - m.chunk.termination.double().numpy() for m in moments], axis=0)
    expected = 0.9**H * alive * moments[-1].chunk.latent.double().sum((1, 2, 3)).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_a_critic_with_gradients_is_an_objective(world: WorldModel) -> None:
    critic = torch.nn.Linear(int(np.prod(world.latent_shape)), 1)

    def value(latents: torch.Tensor) -> torch.Tensor:
        return critic(latents.flatten(1))[:, 0]

    for objective in (TerminalValue(value), lambda moment: value(moment.chunk.latent)):
        assert np.isfinite(returns(world, objective)).all()


def test_goal_likelihood_is_the_density_of_the_goal(world: WorldModel, moments: list[Moment]) -> None:
    """At temperature 1 it is what `observe` says of the goal; all branches see the same noised goal."""
    last, goal = moments[-1], world.starts["frames"][1, 1]
    value = GoalLikelihood(goal, temperature=1.0).value
    assert not value(moments[0]).any()
    alike = last.before.reseed([0] * N)
    observed = world.observe(alike, np.stack([goal] * N), last.actions)[1]
    torch.testing.assert_close(value(last), observed.log_prob)
    twins = replace(last, before=last.before.select([1] * N), actions=np.repeat(last.actions[1:2], N, axis=0))
    same = value(twins)
    torch.testing.assert_close(same, same[:1].expand(N))


def test_a_warmer_goal_likelihood_is_a_density_too_and_flatter(
    world: WorldModel, moments: list[Moment]
) -> None:
    last, goal = moments[-1], world.starts["frames"][1, 1]
    cold, warm = (GoalLikelihood(goal, temperature=t).value(last) for t in (1.0, 3.0))
    noise = world.observe(last.before.reseed([0] * N), np.stack([goal] * N), last.actions)[1].noise.double()
    base = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(0.0, 3.0)
    off = (base[1].log_prob(noise) - base[0].log_prob(noise)).sum((1, 2, 3))
    torch.testing.assert_close(warm - cold, off)
    with pytest.raises(InputError, match="temperature"):
        GoalLikelihood(goal, temperature=0.0)


def test_a_goal_is_as_likely_under_guidance(world: WorldModel, moments: list[Moment]) -> None:
    """Guidance changes what is imagined, not what the world thinks of a picture."""
    last, goal = moments[-1], world.starts["frames"][1, 1]
    guided = replace(last, world=world.with_sampling(replace(world.spec.sampling, guidance=2.0)))
    for temperature in (1.0, 3.0):
        value = GoalLikelihood(goal, temperature=temperature).value
        torch.testing.assert_close(value(guided), value(last))


def test_a_still_picture_is_a_goal(world: WorldModel) -> None:
    picture = world.starts["frames"][0, 0, 0]
    goal = GoalLikelihood.to_picture(world, picture, weight=0.5)
    assert goal.frames.shape == world.frames_shape
    assert np.isfinite(returns(world, goal + PredictedReward())).all()


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
