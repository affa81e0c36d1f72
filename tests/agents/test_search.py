from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from gymnasium import spaces

from agents.beliefs import Categorical, Gaussian, coloured_noise, first_belief
from agents.presets import PRESETS, Search, preset
from agents.search import Found, search_actions
from worldmodel import InputError

BOX = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 10.0], np.float32))
TARGET = np.array([[1.0, 2.0], [-1.5, 8.0], [0.5, 5.0]])
SCALE = np.array([4.0, 10.0])


def parabola(actions: np.ndarray) -> np.ndarray:
    """Returns (N,) with their maximum 0 at TARGET."""
    return -np.square((actions - TARGET) / SCALE).sum((1, 2))


def run(search: Search, seed: int = 0, space: spaces.Space = BOX, evaluate=parabola, **more) -> Found:
    belief = more.pop("belief", None) or first_belief(space, search)
    return search_actions(evaluate, belief, search, np.random.default_rng(seed), **more)


@pytest.mark.parametrize("method", ["cem", "mppi"])
def test_finds_a_known_optimum(method: str) -> None:
    search = Search(method=method, candidates=200, iterations=12, horizon=3, elites=20)
    found = run(search)
    assert np.abs((found.actions - TARGET) / SCALE).max() < 0.04
    assert found.actions.dtype == np.float32
    assert found.value == pytest.approx(0.0, abs=0.02)


def test_icem_finds_it_with_fewer_candidates() -> None:
    search = Search(
        method="cem", candidates=60, iterations=12, horizon=3, elites=10, colour=1.0, keep=0.3, shrink=1.05
    )
    assert np.abs((run(search).actions - TARGET) / SCALE).max() < 0.05


def test_shooting_returns_the_best_it_tried() -> None:
    seen: list[np.ndarray] = []

    def evaluate(actions: np.ndarray) -> np.ndarray:
        seen.append(parabola(actions))
        return seen[-1]

    found = run(Search(method="shooting", candidates=50, iterations=4, horizon=3), evaluate=evaluate)
    assert found.value == max(r.max() for r in seen)
    assert parabola(found.actions[None])[0] == pytest.approx(found.value, abs=1e-6)
    assert [len(r) for r in seen] == [50] * 4


@pytest.mark.parametrize("method", ["shooting", "cem", "mppi"])
@pytest.mark.parametrize(
    "space", [spaces.Discrete(4, start=-1), spaces.MultiDiscrete([2, 4, 3])], ids=["discrete", "multi"]
)
def test_discrete_spaces(method: str, space: spaces.Space) -> None:
    rng = np.random.default_rng(1)
    space.seed(1)
    target = np.stack([space.sample() for _ in range(3)])
    seen = []

    def evaluate(actions: np.ndarray) -> np.ndarray:
        seen.append(actions)
        return (actions == target).reshape(len(actions), -1).sum(1) + 1e-6 * rng.random(len(actions))

    elites = 10
    search = Search(method=method, candidates=100, iterations=15, horizon=3, elites=elites)
    found = run(search, space=space, evaluate=evaluate)
    assert all(space.contains(a) for sequences in seen for s in sequences for a in s)
    if method == "shooting":  # 24^3 sequences are too many for luck, 4^3 are not
        assert found.value >= target.size - 4
    else:
        np.testing.assert_array_equal(found.actions, target)


def test_the_centre_is_always_tried() -> None:
    firsts = []

    def evaluate(actions: np.ndarray) -> np.ndarray:
        firsts.append(actions[0])
        return parabola(actions)

    belief = Gaussian(BOX, np.linspace(-0.9, 0.9, 6).reshape(3, 2), np.full((3, 2), 0.5))
    for method in ("shooting", "cem", "mppi"):
        firsts.clear()
        found = run(Search(method=method, iterations=3, horizon=3), evaluate=evaluate, belief=belief)
        np.testing.assert_allclose(firsts[0], belief.actions(belief.centre), atol=1e-6)
        assert found.value >= parabola(firsts[0][None])[0] or method == "mppi"
    assert len(firsts) == 3


def test_warm_start_shifts_by_one_chunk() -> None:
    search = Search(method="cem", candidates=40, iterations=5, horizon=3, elites=8, keep=0.5)
    found = run(search)
    belief, tried = found.shift(search)
    mean = found.belief.centre
    np.testing.assert_array_equal(belief.centre, mean[[1, 2, 2]])
    np.testing.assert_array_equal(belief.std, search.initial_std)
    np.testing.assert_array_equal(tried, found.elites[:4][:, [1, 2, 2]])
    seen = []

    def evaluate(actions: np.ndarray) -> np.ndarray:
        seen.append(actions)
        return parabola(actions)

    run(replace(search, iterations=1), evaluate=evaluate, belief=belief, tried=tried)
    np.testing.assert_array_equal(seen[0][-4:], belief.actions(tried))
    assert len(seen[0]) == 40


def test_warm_start_of_choices_keeps_every_choice_alive() -> None:
    search = Search(method="cem", candidates=30, iterations=20, horizon=4)
    found = run(search, space=spaces.Discrete(3), evaluate=lambda a: -a.sum(1).astype(float))
    belief, _ = found.shift(search)
    assert isinstance(belief, Categorical)
    np.testing.assert_array_equal(belief.centre, 0)
    np.testing.assert_allclose(belief.probabilities.sum(-1), 1.0)
    assert belief.probabilities.min() > 0.15


@pytest.mark.parametrize(("deadline", "expected"), [(1.0, 1), (29.0, 2), (30.0, 3), (None, 6)])
def test_the_deadline_counts_whole_iterations(deadline: float | None, expected: int) -> None:
    """A clock that only evaluations move: each takes 10 seconds."""
    now = 0.0

    def evaluate(actions: np.ndarray) -> np.ndarray:
        nonlocal now
        now += 10.0
        return parabola(actions)

    search = Search(iterations=6, horizon=3, deadline=deadline)
    found = run(search, evaluate=evaluate, clock=lambda: now)
    assert (found.iterations, found.seconds) == (expected, 10.0 * expected)
    assert found.actions.shape == (3, 2)


def test_the_same_seed_gives_the_same_search() -> None:
    for method in ("shooting", "cem", "mppi"):
        a, b, c = (run(Search(method=method, horizon=3), seed=s) for s in (5, 5, 6))
        np.testing.assert_array_equal(a.actions, b.actions)
        np.testing.assert_array_equal(a.candidates, b.candidates)
        assert not np.array_equal(a.candidates, c.candidates)


def test_width_stays_in_its_range() -> None:
    search = Search(method="cem", candidates=50, iterations=30, horizon=3, elites=5)
    assert run(search).belief.std.min() == search.std_range[0]
    far = run(replace(search, iterations=1), evaluate=lambda a: np.zeros(len(a)))
    assert far.belief.std.max() <= 2.0


def test_mppi_weights() -> None:
    """Two sequences: standardised returns +1 and -1, temperature 0.5, so weights 1 and e^-4."""
    search = Search(candidates=2, elites=2, iterations=1, horizon=3)
    found = run(search, evaluate=lambda a: np.array([7.0, 3.0]))
    w = np.array([1.0, np.exp(-4.0)]) / (1.0 + np.exp(-4.0))
    assert found.value == pytest.approx(w @ [7.0, 3.0])
    np.testing.assert_allclose(
        found.actions, np.tensordot(w, found.candidates.astype(float), axes=1), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("horizon", [2, 5, 8])
@pytest.mark.parametrize("colour", [0.0, 1.0, 3.0])
def test_coloured_noise(horizon: int, colour: float) -> None:
    x = coloured_noise(np.random.default_rng(0), (20_000, horizon, 1), colour)[..., 0]
    np.testing.assert_allclose(x.std(0), 1.0, atol=0.03)
    neighbours = (x[:, 1:] * x[:, :-1]).mean()
    assert abs(neighbours) < 0.02 if colour == 0 else neighbours > 0.2


def test_integer_boxes_are_rounded() -> None:
    space = spaces.Box(0, 9, (1,), np.uint8)
    found = run(Search(horizon=3), space=space, evaluate=lambda a: -np.square(a - 7.0).sum((1, 2)))
    assert found.candidates.dtype == np.uint8
    assert found.candidates.max() <= 9


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "sgd"}, "method is 'sgd'"),
        ({"horizon": 0}, "horizon is 0"),
        ({"candidates": 3}, "candidates is 3"),
        ({"initial_std": 3.0}, "std_range"),
        ({"temperature": 0.0}, "temperature > 0"),
        ({"deadline": 0.0}, "deadline is 0.0"),
    ],
)
def test_bad_searches(changes: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        Search(**changes)
    assert "\n" not in str(caught.value)


def test_presets() -> None:
    sizes = {name: (s.candidates, s.iterations, s.horizon) for name, s in PRESETS.items()}
    assert sizes == {"fast": (32, 2, 5), "quality": (64, 3, 5), "paper": (300, 30, 5)}
    with pytest.raises(InputError, match="choose from fast, quality, paper"):
        preset("slow")


def test_unbounded_and_text_spaces_are_refused() -> None:
    for space in (spaces.Box(-np.inf, np.inf, (1,)), spaces.Text(5)):
        with pytest.raises(InputError, match="cannot search"):
            first_belief(space, Search())


@pytest.mark.parametrize(
    "space",
    [
        BOX,
        spaces.Discrete(4, start=-1),
        spaces.MultiDiscrete([2, 4, 3]),
        spaces.Dict({"push": BOX, "gear": spaces.Discrete(3, start=2)}),
    ],
    ids=["box", "discrete", "multi", "dict"],
)
def test_coordinates_invert_actions(space: spaces.Space) -> None:
    search = Search(candidates=20, horizon=3)
    belief = first_belief(space, search)
    x = belief.sample(np.random.default_rng(0), 20, search)
    np.testing.assert_allclose(belief.coordinates(belief.actions(x)), x, atol=1e-6)
    assert x.shape[:2] == (20, 3)


def test_a_dict_is_searched_as_its_parts() -> None:
    """Both parts reach their optimum; a shifted belief keeps the parts apart."""
    space = spaces.Dict({"push": BOX, "gear": spaces.MultiDiscrete([3, 4])})

    def evaluate(actions: dict[str, np.ndarray]) -> np.ndarray:
        return parabola(actions["push"]) - (actions["gear"] != np.array([2, 1])).sum((1, 2))

    search = Search(method="cem", candidates=150, iterations=10, horizon=3, elites=15)
    found = search_actions(evaluate, first_belief(space, search), search, np.random.default_rng(0))
    np.testing.assert_array_equal(found.actions["gear"], np.tile([2, 1], (3, 1)))
    assert np.abs((found.actions["push"] - TARGET) / SCALE).max() < 0.06
    later, _ = found.shift(search)
    centre = later.actions(later.centre)
    np.testing.assert_array_equal(centre["gear"], np.tile([2, 1], (3, 1)))
    np.testing.assert_allclose(
        centre["push"][:2], found.belief.actions(found.belief.centre)["push"][1:], atol=1e-5
    )
