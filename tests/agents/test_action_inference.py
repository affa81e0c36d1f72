from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from agents import infer_action, label_video, propose_actions
from agents.action_inference import ActionPosterior, enumerate_actions, fit_temperature
from tests.toy import toy_world
from worldmodel import InputError, WorldModel


@pytest.mark.parametrize("sides", [1, 2])
def test_sets_cover_what_they_say_where_cells_were_wide_at_first(sides: int) -> None:
    """A Gaussian likelihood, much narrower than the first cells: what lies beside the heaviest of them is found too."""
    space, rng, inside = spaces.Box(-2.0, 2.0, (sides,), np.float32), np.random.default_rng(0), []
    for _ in range(300):
        action = rng.uniform(-2, 2, sides)
        seen = action + 0.02 * rng.standard_normal(sides)

        def score(state: Any, frames: Any, actions: np.ndarray, draws: int, seen: Any = seen) -> Any:
            rate = 0.5 * np.square((actions - seen) / 0.02).sum(1)
            return SimpleNamespace(rate=torch.from_numpy(rate))

        world: Any = SimpleNamespace(spec=SimpleNamespace(action_space=space), score=score)
        state: Any = SimpleNamespace(rows=1, select=lambda rows: None)
        inside.append(infer_action(world, state, np.zeros(1), refinements=5).contains(action, 0.9))
    assert np.mean(inside) == pytest.approx(0.9, abs=0.05)


def test_choices_equal_bayes_by_hand(discrete: WorldModel) -> None:
    state, _ = discrete.reset([0])
    frames = discrete.starts["frames"][1, 0]
    posterior = infer_action(discrete, state, frames, draws=3)
    nats = [-float(discrete.score(state, frames[None], np.array([a]), draws=3).rate) for a in (1, 2, 3)]
    expected = np.exp(nats - np.max(nats)) / np.exp(nats - np.max(nats)).sum()
    np.testing.assert_allclose(posterior.probabilities, expected, rtol=1e-4)
    assert posterior.probabilities.sum() == pytest.approx(1.0, abs=1e-12)
    assert posterior.actions.tolist() == [1, 2, 3]
    assert posterior.map == posterior.actions[np.argmax(nats)]
    with pytest.raises(InputError, match="no mean"):
        _ = posterior.mean


def test_a_box_equals_bayes_by_hand(world: WorldModel) -> None:
    state, _ = world.reset([0])
    frames = world.starts["frames"][1, 0]
    posterior = infer_action(world, state, frames, draws=1, refinements=0)
    fine = (np.arange(401) + 0.5) / 401 * 4 - 2
    nats = np.array(
        [float(world.score(state, frames[None], np.array([[a]], np.float32)).log_prob) for a in fine[::10]]
    )
    assert len(posterior.actions) == 41
    np.testing.assert_allclose(posterior.actions[:, 0], (np.arange(41) + 0.5) / 41 * 4 - 2, atol=1e-6)
    p = np.exp(nats - nats.max())
    by_hand = (p * fine[::10]).sum() / p.sum()
    refined = infer_action(world, state, frames, draws=1)
    assert posterior.mean[0] == pytest.approx(by_hand, abs=0.03)
    assert refined.mean[0] == pytest.approx(posterior.mean[0], abs=0.01)
    assert len(refined.actions) > 41
    for each in (posterior, refined):
        assert each.probabilities.sum() == pytest.approx(1.0, abs=1e-12)
        assert each.volume.sum() == pytest.approx(4.0)


@pytest.mark.parametrize("shape", [(2,), (3,), (2, 3)])
def test_cells_tile_the_box(tmp_path: Path, shape: tuple[int, ...]) -> None:
    world = toy_world(tmp_path / "toy", spaces.Box(-1.0, 3.0, shape, np.float32))
    state, _ = world.reset([0])
    posterior = infer_action(world, state, world.starts["frames"][1, 0], draws=1, refinements=1)
    d = int(np.prod(shape))
    assert posterior.volume.sum() == pytest.approx(4.0**d)
    assert posterior.widths is not None
    centres = posterior.actions.reshape(len(posterior.actions), d).astype(float)
    rng = np.random.default_rng(0)
    for point in rng.uniform(-1, 3, (50, d)):
        inside = (np.abs(centres - point) <= posterior.widths / 2 + 1e-6).all(1)
        assert inside.sum() == 1
        assert posterior.contains(point, 0.5) == posterior.credible_set(0.5)[inside][0]
    assert posterior.mean.shape == shape


def test_multi_discrete(tmp_path: Path) -> None:
    space = spaces.MultiDiscrete([2, 3])
    world = toy_world(tmp_path / "toy", space)
    state, _ = world.reset([0])
    posterior = infer_action(world, state, world.starts["frames"][0, 0], draws=1)
    assert posterior.actions.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert posterior.probabilities.sum() == pytest.approx(1.0, abs=1e-12)


def test_a_prior_multiplies(discrete: WorldModel) -> None:
    state, _ = discrete.reset([0])
    frames = discrete.starts["frames"][1, 0]
    flat = infer_action(discrete, state, frames, draws=1)
    weights = np.array([0.2, 0.0, 0.8])
    with np.errstate(divide="ignore"):
        posterior = infer_action(discrete, state, frames, draws=1, log_prior=lambda a: np.log(weights[a - 1]))
    expected = flat.probabilities * weights
    np.testing.assert_allclose(posterior.probabilities, expected / expected.sum(), rtol=1e-9)
    for bad in (lambda a: np.full(len(a), -np.inf), lambda a: np.full(len(a), np.nan)):
        with pytest.raises(InputError, match="log_prior must return"):
            infer_action(discrete, state, frames, draws=1, log_prior=bad)


def test_sets_and_samples_by_hand() -> None:
    """Three cells of a line: densities 0.2, 0.3 and 0.1 a unit."""
    space = spaces.Box(0.0, 5.0, (1,), np.float32)
    actions, widths = np.array([[1.0], [2.5], [4.0]], np.float32), np.array([[2.0], [1.0], [2.0]])
    p = np.array([0.4, 0.3, 0.3])
    p[2] = 1 - p[:2].sum()
    posterior = ActionPosterior(space, actions, p, np.zeros(3), widths[:, 0], widths)
    assert posterior.map.tolist() == [2.5]
    assert posterior.mean[0] == pytest.approx(0.4 + 0.75 + 1.2)
    assert posterior.credible_set(0.3).tolist() == [False, True, False]
    assert posterior.credible_set(0.5).tolist() == [True, True, False]
    assert posterior.credible_set(1.0).all()
    assert posterior.contains([0.5], 0.5) and not posterior.contains([4.9], 0.5)
    drawn = posterior.sample(4000, np.random.default_rng(0))[:, 0]
    assert drawn.dtype == np.float32
    np.testing.assert_allclose(np.histogram(drawn, [0, 2, 3, 5])[0] / 4000, p, atol=0.03)
    with pytest.raises(InputError, match="level is 0"):
        posterior.credible_set(0)


def test_a_video_is_labelled(discrete: WorldModel) -> None:
    state, _ = discrete.reset([0])
    clip = discrete.starts["frames"][1]
    labels, posteriors = label_video(discrete, state, clip, draws=1)
    first = infer_action(discrete, state, clip[0], draws=1)
    assert labels[0] == first.map
    after, _ = discrete.observe(state, clip[:1], labels[:1])
    np.testing.assert_array_equal(
        posteriors[1].probabilities, infer_action(discrete, after, clip[1], draws=1).probabilities
    )
    assert labels.shape == (2,) and np.issubdtype(labels.dtype, np.integer)


def test_what_cannot_be_inferred(world: WorldModel) -> None:
    state, _ = world.reset([0, 1])
    with pytest.raises(InputError, match="holds 2 sessions"):
        infer_action(world, state, world.starts["frames"][0, 0])
    with pytest.raises(InputError, match="frames have shape"):
        infer_action(world, state.select([0]), world.starts["frames"][0, 0, :2])
    with pytest.raises(InputError, match="at most 4096"):
        enumerate_actions(spaces.MultiDiscrete([100, 100]))
    with pytest.raises(InputError, match="cannot infer"):
        enumerate_actions(spaces.Text(3))


def test_the_temperature_makes_credible_sets_cover_what_they_say() -> None:
    """Posteriors twice as wide as the actions are spread cover too much; a quarter of the temperature puts that right."""
    rng, space = np.random.default_rng(0), spaces.Discrete(81)
    cells, ones = np.arange(81), np.ones(81)
    posteriors, actions = [], []
    for centre in rng.uniform(30, 50, 400):
        nats = -np.square(cells - centre) / (2 * 8.0**2)
        p = np.exp(nats) / np.exp(nats).sum()
        posteriors.append(ActionPosterior(space, cells, p, nats, ones))
        actions.append(round(rng.normal(centre, 4.0)))
    assert np.mean([p.contains(a) for p, a in zip(posteriors, actions, strict=True)]) > 0.97
    temperature = fit_temperature(
        [p.contains_tempered(a) for p, a in zip(posteriors[:200], actions, strict=False)]
    )
    assert 0.25 <= temperature < 0.4
    fresh = [
        p.tempered(temperature).contains(a) for p, a in zip(posteriors[200:], actions[200:], strict=True)
    ]
    assert 0.84 < np.mean(fresh) < 0.96
    with pytest.raises(InputError, match="no posteriors"):
        fit_temperature([])


def test_a_tempered_posterior_is_wider(world: WorldModel) -> None:
    """At temperature 1 it is the posterior itself; warmer it has more entropy and the same favourite."""
    state, _ = world.reset([0])
    posterior = infer_action(world, state, world.starts["frames"][1, 0], draws=1, refinements=0)
    np.testing.assert_allclose(posterior.tempered(1.0).probabilities, posterior.probabilities, rtol=1e-9)
    warm = posterior.tempered(5.0)
    assert entropy(warm) > entropy(posterior)
    assert warm.map == posterior.map
    with pytest.raises(InputError, match="temperature"):
        posterior.tempered(0.0)


def entropy(posterior: ActionPosterior) -> float:
    p = posterior.probabilities
    return float(-(p * np.log(p + 1e-300)).sum())


def test_proposals_lead_to_the_goal(discrete: WorldModel) -> None:
    """The first proposal begins with the most probable action towards the goal; all are actions of the space."""
    state, _ = discrete.reset([0])
    goal = discrete.starts["frames"][1, 0]
    proposals = propose_actions(discrete, state, goal, 5, 3, np.random.default_rng(0))
    assert proposals.shape == (5, 3)
    assert all(discrete.spec.action_space.contains(a) for a in proposals.ravel())
    assert proposals[0, 0] == infer_action(discrete, state, goal, draws=1).map
