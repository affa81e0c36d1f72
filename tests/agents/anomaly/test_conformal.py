"""p-values, tails, combinations, thresholds."""

from __future__ import annotations

import numpy as np
import pytest

from agents.anomaly.conformal import COMBINATIONS, Sides, Tail, episode_threshold, episodes_needed
from worldmodel import InputError


def test_p_values_of_normal_values_are_uniform() -> None:
    rng = np.random.default_rng(0)
    tail = Tail.fit(rng.standard_normal(4000))
    p = tail.survival(rng.standard_normal(4000))
    for level in (0.01, 0.05, 0.2, 0.5, 0.9):
        assert (p <= level).mean() == pytest.approx(level, abs=3 * np.sqrt(level * (1 - level) / 4000) + 0.01)


def test_the_tail_goes_on_beyond_what_was_seen() -> None:
    """An exponential law: ten times rarer for every 2.3; the empirical p-value alone would stop at 1 / 2001."""
    tail = Tail.fit(np.random.default_rng(1).exponential(size=2000))
    far = tail.survival(np.array([9.0, 12.0]))
    assert 1e-6 < far[0] < 2e-3
    assert far[1] < far[0] / 3
    assert tail.survival(np.array([1e9]))[0] >= 1e-12


def test_survival_never_rises() -> None:
    for values in (np.random.default_rng(2).gamma(2.0, size=300), np.zeros(50), np.arange(5.0)):
        p = Tail.fit(values).survival(np.linspace(-5, 50, 1000))
        assert (np.diff(p) <= 1e-12).all()
        assert p[0] == 1.0
        assert ((p > 0) & (p <= 1)).all()


def test_both_sides_or_one() -> None:
    values = np.random.default_rng(3).standard_normal(2000)
    both, one = Sides.fit(values, True), Sides.fit(values, False)
    far = np.array([-6.0, 6.0])
    assert (both.p_value(far) < 1e-3).all()
    assert one.p_value(far)[0] == 1.0
    assert one.p_value(far)[1] < 1e-3
    assert both.p_value(np.array([0.0]))[0] > 0.9


@pytest.mark.parametrize("name", COMBINATIONS)
def test_combinations_rise_where_any_p_value_falls(name: str) -> None:
    p = np.random.default_rng(4).uniform(0.01, 1, (50, 4))
    lower = p.copy()
    lower[:, 2] /= 10
    assert (COMBINATIONS[name](lower) > COMBINATIONS[name](p)).all()


def test_a_fresh_episode_exceeds_the_threshold_as_often_as_asked() -> None:
    rng, rang = np.random.default_rng(5), []
    for _ in range(400):
        maxima = rng.gumbel(size=101)
        rang.append(maxima[100] > episode_threshold(maxima[:100], 0.1))
    assert np.mean(rang) == pytest.approx(0.1, abs=0.045)


def test_how_many_episodes_are_needed() -> None:
    assert episodes_needed(0.05) == 100
    assert episodes_needed(0.001) == 999
    assert episode_threshold(np.arange(999.0), 0.001) == 998.0
    for alpha in (0.0, 1.0, -1.0):
        with pytest.raises(InputError, match="alpha"):
            episodes_needed(alpha)
