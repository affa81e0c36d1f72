from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from agents import (
    LatentDistance,
    Moment,
    MPCAgent,
    Objective,
    Planner,
    PredictedReward,
    Search,
    draw_plan,
    imagine,
)
from agents.memory import branch_bytes
from worldmodel import InputError, Sampling, WorldModel

SMALL = Search(candidates=12, iterations=2, horizon=3, elites=4)
TARGET = torch.tensor([1.0, -1.5, 0.5])


def to_target(moment: Moment) -> torch.Tensor:
    return -(torch.from_numpy(moment.actions)[:, 0] - TARGET[moment.step]).square()


def test_finds_a_known_optimum(world: WorldModel) -> None:
    state, _ = world.reset([0])
    search = Search(method="cem", candidates=40, iterations=8, horizon=3, elites=6)
    plan = Planner(search).plan(world, state, to_target)
    assert np.abs(plan.actions[:, 0] - TARGET.numpy()).max() < 0.2
    assert plan.value == pytest.approx(float(to_sum(plan.actions)), abs=1e-5)
    assert plan.futures.returns[0] == plan.value


def to_sum(actions: np.ndarray) -> float:
    return -float(np.square(actions[:, 0] - TARGET.numpy()).sum())


def test_reaches_a_goal_by_choices(discrete: WorldModel) -> None:
    """With all noise off the world is deterministic: the choices that made the goal are the best ones."""
    still = Sampling(temperature=0.0)
    state, _ = discrete.reset([0])
    truth = np.array([[2, 3]])
    goal = discrete.rollout(state, truth, still)[1][-1].latent[0]
    search = Search(method="cem", candidates=24, iterations=3, horizon=2, elites=4)
    plan = Planner(search, still).plan(discrete, state, LatentDistance(goal, only_last=True))
    np.testing.assert_array_equal(plan.actions, truth[0])
    assert plan.value == pytest.approx(0.0, abs=1e-6)
    assert (plan.returns <= 0).all()


def test_branches_are_forks_of_the_state(world: WorldModel) -> None:
    """The futures of a plan are what `WorldModel.rollout` imagines in forks; the state is left alone."""
    state, _ = world.reset([0])
    actions = np.random.default_rng(0).uniform(-2, 2, (3, 2, 1)).astype(np.float32)
    futures = imagine(world, state, actions, lambda m: m.chunk.reward)
    _, chunks = world.rollout(state.fork(3), actions)
    for t, chunk in enumerate(chunks):
        np.testing.assert_array_equal(futures.frames[:, t], chunk.frames.numpy())
        np.testing.assert_array_equal(futures.log_prob[:, t], chunk.log_prob.numpy())
    np.testing.assert_allclose(futures.returns, sum(c.reward.double() for c in chunks), rtol=1e-6)
    best = futures.best(2)
    assert best.returns.tolist() == sorted(futures.returns, reverse=True)[:2]


def test_the_same_seed_gives_the_same_plan(world: WorldModel) -> None:
    state, _ = world.reset([0])
    a, b, c = (Planner(SMALL).plan(world, state, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(a.actions, b.actions)
    np.testing.assert_array_equal(a.returns, b.returns)
    np.testing.assert_array_equal(a.futures.frames, b.futures.frames)
    assert not np.array_equal(a.actions, c.actions)


def test_the_best_futures_of_all_iterations_are_kept(world: WorldModel) -> None:
    state, _ = world.reset([0])
    plan = Planner(replace(SMALL, method="shooting", iterations=3)).plan(world, state, to_target)
    assert plan.value == plan.futures.returns[0]
    np.testing.assert_array_equal(plan.actions, plan.futures.actions[0])
    assert (np.diff(plan.futures.returns) <= 0).all()
    assert plan.futures.frames.shape == (4, 3, 4, 32, 32, 3)
    assert plan.returns.max() <= plan.value


def test_too_many_branches_say_how_many_fit(world: WorldModel) -> None:
    state, _ = world.reset([0])
    planner = Planner(SMALL, memory=5 * branch_bytes(world, SMALL.horizon) + 1)
    with pytest.raises(InputError, match=r"^12 branches .* 5 fit; ask for fewer candidates$"):
        planner.plan(world, state)
    enough = replace(planner, search=replace(SMALL, candidates=5))
    assert len(enough.plan(world, state).returns) == 5


def test_a_branch_is_not_overestimated_much(world: WorldModel) -> None:
    """What a fork really holds after a plan, its pictures and the decoder's scratch are most of the estimate."""
    state, _ = world.reset([0])
    n, horizon = 16, 5
    after, chunks = world.rollout(state.fork(n), np.zeros((n, horizon, 1), np.float32))
    pixels = sum(c.frames.nbytes for c in chunks) / n
    held = (after.nbytes - state.nbytes) / n + pixels + 4 * pixels / horizon * 4
    assert 0.5 * branch_bytes(world, horizon) < held < branch_bytes(world, horizon)


def test_actions_of_several_kinds_are_planned_together(mixed: WorldModel) -> None:
    def objective(moment: Moment) -> np.ndarray:
        return -np.abs(moment.actions["push"][:, 0] - 1.0) - (moment.actions["gear"] != 2)

    state, _ = mixed.reset([0])
    search = Search(method="cem", candidates=40, iterations=6, horizon=2, elites=6)
    plan = Planner(search).plan(mixed, state, objective)
    assert plan.actions["push"].shape == (2, 1)
    assert plan.actions["push"].dtype == np.float32
    np.testing.assert_array_equal(plan.actions["gear"], 2)
    np.testing.assert_allclose(plan.actions["push"], 1.0, atol=0.15)
    assert plan.futures.actions["gear"].shape == (4, 2)
    assert draw_plan(plan).ndim == 3

    agent = MPCAgent(mixed, Planner(SMALL), objective)
    clip = mixed.starts["frames"][0, 0]
    agent.reset(clip)
    assert mixed.spec.action_space.contains(agent.act())
    assert mixed.spec.action_space.contains(agent.act(clip))


def test_proposals_are_among_the_candidates(world: WorldModel) -> None:
    """One that a search of a few candidates would not find."""
    state, _ = world.reset([0])
    truth = TARGET.numpy()[None, :, None]
    search = replace(SMALL, method="shooting", iterations=1)
    plan = Planner(search).plan(world, state, to_target, proposals=truth)
    np.testing.assert_allclose(plan.actions, truth[0], atol=1e-6)
    assert len(plan.returns) == search.candidates
    with pytest.raises(InputError, match="proposals have 3 chunks, expected 2"):
        Planner(replace(search, horizon=2)).plan(world, state, to_target, proposals=truth)


def test_what_cannot_be_planned(world: WorldModel) -> None:
    state, _ = world.reset([0, 1])
    with pytest.raises(InputError, match="holds 2 sessions"):
        Planner(SMALL).plan(world, state)
    plan = Planner(SMALL).plan(world, state.select([1]))
    with pytest.raises(InputError, match="warm start has 3 chunks, expected 4"):
        Planner(replace(SMALL, horizon=4)).plan(world, state.select([1]), warm=plan.warm)
    with pytest.raises(InputError, match="choose from"):
        Planner.preset("slow")
    with pytest.raises(InputError, match="not a field of Search"):
        Planner.preset("fast", branches=3)
    bare = copy.copy(world)
    bare.heads = None
    with pytest.raises(InputError, match="world toy predicts no reward"):
        Planner(SMALL).plan(bare, state.select([1]))
    assert Planner.preset("quality", horizon=3).search == Search(
        candidates=64, iterations=3, elites=8, horizon=3
    )


def test_a_plan_can_be_drawn(world: WorldModel) -> None:
    state, _ = world.reset([0])
    plan = Planner(SMALL).plan(world, state)
    sheet = draw_plan(plan, scale=2)
    assert sheet.dtype == np.uint8
    assert plan.futures.frames.shape == (4, 3, 4, 32, 32, 3)
    blind, watched = (
        imagine(world, state, plan.candidates, PredictedReward(), decode=decode) for decode in (False, True)
    )
    assert blind.frames.shape[2] == 0
    np.testing.assert_array_equal(blind.decoded(world).frames, watched.frames)
    np.testing.assert_array_equal(blind.returns, watched.returns)
    assert sheet.shape == (16 + 4 * (16 + 64 + 16), 3 * (64 + 4), 3)
    cell = sheet[32 : 32 + 64, : 2 * 32]
    np.testing.assert_array_equal(cell[::2, ::2], plan.futures.frames[0, 0, -1])


def test_the_agent_observes_reality(world: WorldModel) -> None:
    """Its state is the one that observing by hand gives, whatever it imagined in between."""
    frames = world.starts["frames"]
    agent = MPCAgent(world, Planner(SMALL), to_target)
    agent.reset(frames[0, 0, 0], seed=4)
    still = np.stack([frames[0, 0, 0]] * 4)
    state, _ = world.observe(world.initial_state([4]), still[None])
    for clip in frames[1:3, 0]:
        action = agent.act()
        assert world.spec.action_space.contains(action)
        agent.observe(clip, action)
        state, _ = world.observe(state, clip[None], action[None])
    assert agent.state is not None
    torch.testing.assert_close(agent.state.log_prob, state.log_prob, rtol=0, atol=0)
    torch.testing.assert_close(agent.state.latent, state.latent, rtol=0, atol=0)


def test_an_agent_whose_plan_fails_has_observed_nothing(world: WorldModel) -> None:
    """The frames are given again, and count once."""
    good = True

    def sometimes(moment: Moment) -> torch.Tensor:
        value = to_target(moment)
        return value if good else value * float("nan")

    agent = MPCAgent(world, Planner(SMALL), sometimes)
    clip = world.starts["frames"][0, 0]
    agent.reset(clip)
    agent.act()
    before, good = agent.state, False
    for _ in range(2):
        with pytest.raises(InputError):
            agent.act(clip)
        assert agent.state is before
    good = True
    agent.act(clip)
    assert agent.state is not None and before is not None
    assert int(agent.state.steps[0]) == int(before.steps[0]) + 1


def test_the_agent_begins_with_the_last_plan(world: WorldModel) -> None:
    """The first candidate of a plan is the mean of the plan before, one chunk on; none after a reset."""
    firsts: list[float] = []

    def watch(moment: Moment) -> torch.Tensor:
        if moment.step == 0:
            firsts.append(float(moment.actions[0, 0]))
        return to_target(moment)

    agent = MPCAgent(world, Planner(replace(SMALL, iterations=1)), watch)
    clip = world.starts["frames"][0, 0]
    agent.reset(clip)
    action = agent.act()
    assert agent.last_plan is not None
    shifted = agent.last_plan.actions[1, 0]
    assert agent.act() == action  # nothing has happened: the same plan
    agent.observe(clip, action)
    agent.act()
    agent.reset(clip)
    assert agent.act() == action
    np.testing.assert_allclose(firsts, [0.0, 0.0, shifted, 0.0], atol=1e-6)


def test_the_agent_chooses(discrete: WorldModel) -> None:
    agent = MPCAgent(discrete, Planner(SMALL), lambda m: -np.abs(m.actions - 3.0))
    with pytest.raises(InputError, match="call reset"):
        agent.act()
    with pytest.raises(InputError, match="no action has caused"):
        agent.act(discrete.starts["frames"][0, 0])
    clip = discrete.starts["frames"][0, 0]
    agent.reset(clip)
    action = agent.act()
    for _ in range(2):
        assert discrete.spec.action_space.contains(action)
        action = agent.act(clip)
    assert action == 3
    assert agent.state is not None
    assert int(agent.state.steps[0]) == 3


def test_the_action_gain_is_left_out_unless_an_objective_weighs_it(world: WorldModel) -> None:
    state, _ = world.reset([0])
    actions = np.zeros((2, 2, *world.spec.action_space.shape), np.float32)
    seen: list[torch.Tensor] = []

    class Gain(Objective):
        weighs_action_gain = True

        def value(self, moment: Moment) -> torch.Tensor:
            seen.append(moment.chunk.action_gain)
            return moment.chunk.action_gain

    futures = imagine(world, state, actions, PredictedReward() + Gain())
    plain = imagine(world, state, actions, PredictedReward())
    assert len(seen) == 2 and all(torch.isfinite(gain).all() for gain in seen)
    np.testing.assert_allclose(futures.log_prob, plain.log_prob, rtol=1e-5)
    np.testing.assert_allclose(futures.latents, plain.latents, rtol=0, atol=1e-4)
    _, chunk = world.step(state, actions[:1, 0], action_gain=False)
    assert torch.isnan(chunk.action_gain).all()

    class Forgetful(Gain):
        weighs_action_gain = False

    with pytest.raises(InputError, match="Forgetful returned nan at step 0 of 2"):
        imagine(world, state, actions, Forgetful())
