"""What a world has learned about acting: its prior's sequences, its value behind a plan, and the agent that uses both."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium import spaces

from agents import (
    BehaviourPenalty,
    MPCAgent,
    Planner,
    PredictedReward,
    Search,
    TerminalValue,
    imagine,
    propose_behaviour,
)
from agents.proposals import unlike_behaviour
from tests.toy import BOX, toy_world
from worldmodel import InputError, WorldModel

SMALL = Search(candidates=12, iterations=1, horizon=3, elites=4)


@pytest.fixture(scope="module")
def chooser(tmp_path_factory: pytest.TempPathFactory) -> WorldModel:
    """Three choices, numbered from 1, and heads that foresee."""
    return toy_world(tmp_path_factory.mktemp("ahead") / "toy", spaces.Discrete(3, start=1), discount=0.9)


def set_prior(world: WorldModel, *expected: float) -> None:
    """The prior says the same of every latent."""
    assert world.heads is not None and world.heads.ahead_layers is not None
    last = world.heads.ahead_layers[-1]
    with torch.no_grad():
        last.weight[1:] = 0.0
        last.bias[1:] = torch.tensor(expected)


def test_proposals_follow_the_prior(chooser: WorldModel) -> None:
    set_prior(chooser, 0.1, 0.2, 0.7)
    state, _ = chooser.reset([0])
    proposals = propose_behaviour(chooser, state, 400, 2, np.random.default_rng(0))
    assert proposals.shape == (400, 2)
    np.testing.assert_array_equal(proposals[0], 3)  # the most probable ones
    shares = np.bincount(proposals.ravel(), minlength=4)[1:] / proposals.size
    np.testing.assert_allclose(shares, (0.1, 0.2, 0.7), atol=0.06)


def test_the_prior_reads_imagined_latents(chooser: WorldModel) -> None:
    """The second action of a proposal depends on where the first one led."""
    assert chooser.heads is not None and chooser.heads.ahead_layers is not None
    last = chooser.heads.ahead_layers[-1]
    with torch.no_grad():
        last.weight[1:] = torch.randn(last.weight[1:].shape, generator=torch.Generator().manual_seed(0))
    state, _ = chooser.reset([0])
    greedy = propose_behaviour(chooser, state, 1, 2, np.random.default_rng(0))
    after, _ = chooser.step(state.fork(1), greedy[:, 0])
    for latent, action in ((state.latent, greedy[0, 0]), (after.latent, greedy[0, 1])):
        assert int(chooser.heads.ahead(latent).prior.argmax()) + 1 == action


def test_proposals_in_several_kinds_of_actions(tmp_path_factory: pytest.TempPathFactory) -> None:
    space = spaces.Dict({"gear": spaces.MultiDiscrete([2, 3]), "push": BOX})
    world = toy_world(tmp_path_factory.mktemp("mixed") / "toy", space, discount=0.9)
    set_prior(world, 0.0, 1.0, 0.0, 0.0, 1.0, 0.5)
    state, _ = world.reset([0])
    proposals = propose_behaviour(world, state, 64, 2, np.random.default_rng(0), spread=0.1)
    np.testing.assert_array_equal(proposals["gear"][0], [[1, 2], [1, 2]])
    assert proposals["gear"].shape == (64, 2, 2) and proposals["push"].shape == (64, 2, 1)
    np.testing.assert_allclose(proposals["push"][0], 1.0, atol=1e-6)  # 0.5 of the range [-2, 2]
    assert proposals["push"][1:].std() == pytest.approx(0.2, rel=0.2)
    plan = Planner(SMALL).plan(world, state, proposals={k: v[:4, [0, 1, 1]] for k, v in proposals.items()})
    assert plan.actions["gear"].shape == (3, 2)


def test_the_informed_agent_uses_value_and_prior(chooser: WorldModel) -> None:
    set_prior(chooser, 0.0, 1.0, 0.0)
    planner = Planner(replace(SMALL, method="shooting"))
    agent = MPCAgent.informed(chooser, planner)
    agent.reset(chooser.starts["frames"][0, 0])
    assert agent.state is not None and chooser.spec.action_space.contains(agent.act())
    plan = agent.last_plan
    assert plan is not None
    assert plan.candidates.shape == (12, 2)  # no longer than the value asks for
    assert (plan.candidates == 2).all(1).any()  # what the prior proposes is among them
    worth = PredictedReward(0.9) + TerminalValue.of(chooser) + BehaviourPenalty.of(chooser)
    np.testing.assert_allclose(imagine(chooser, agent.state, plan.candidates, worth).returns, plan.returns)

    agent = MPCAgent.informed(chooser, planner, horizon=None)
    agent.reset(chooser.starts["frames"][0, 0])
    agent.act()
    assert agent.last_plan is not None and agent.last_plan.candidates.shape == (12, 3)


def test_a_plan_that_the_prior_would_not_make_costs_nats(chooser: WorldModel) -> None:
    """Those of the distribution that proposals are drawn from, relative to its most probable action."""
    set_prior(chooser, 0.1, 0.2, 0.7)
    state, _ = chooser.reset([0])
    candidates = np.array([[3, 3], [1, 3], [3, 2]])
    penalty = BehaviourPenalty(2.0, discount=0.5)
    after, first = chooser.step(state.fork(3), candidates[:, 0])
    survival = 1.0 - first.termination.double().numpy()
    wanted = -2.0 * np.array([0.0, np.log(7), 0.5 * np.log(3.5)]) * [1, 1, survival[2]]
    np.testing.assert_allclose(imagine(chooser, state, candidates, penalty).returns, wanted, rtol=1e-3)


def test_penalties_in_several_kinds_of_actions(tmp_path_factory: pytest.TempPathFactory) -> None:
    space = spaces.Dict({"gear": spaces.MultiDiscrete([2, 3]), "push": BOX})
    world = toy_world(tmp_path_factory.mktemp("mixed") / "penal", space, discount=0.9)
    set_prior(world, 0.5, 0.5, 0.1, 0.1, 0.8, 0.5)
    state, _ = world.reset([0])
    actions = {"gear": np.array([[0, 2], [1, 0]]), "push": np.array([[1.0], [1.6]], np.float32)}
    nats = unlike_behaviour(world, state.fork(2), actions, spread=0.3)
    np.testing.assert_allclose(nats, [0.0, np.log(8) + 0.5], atol=1e-4)  # 0.3 of the range [-2, 2]'s half off


def test_a_world_that_foresees_nothing(world: WorldModel) -> None:
    state, _ = world.reset([0])
    with pytest.raises(InputError, match="has no prior over actions"):
        propose_behaviour(world, state, 4, 2, np.random.default_rng(0))
    with pytest.raises(InputError, match="foresees no value"):
        TerminalValue.of(world)
    with pytest.raises(InputError, match="no prior over actions"):
        BehaviourPenalty.of(world)
    agent = MPCAgent.informed(world, Planner(SMALL))
    assert agent.objective is None and agent.proposals is None
