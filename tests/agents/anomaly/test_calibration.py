"""From values to verdicts, on values whose law is known."""

from __future__ import annotations

import numpy as np
import pytest

from agents.anomaly.calibration import Calibration, MonitorConfig, Tracked
from agents.anomaly.channels import Channel
from worldmodel import ConfigError, InputError

BANK = (Channel("a", True), Channel("b", False))


def episodes(count: int, rng: np.random.Generator, chunks: int = 40) -> list[np.ndarray]:
    """Normal values (T, 2) that depend on those before them, as chunks of an episode do."""
    made = []
    for _ in range(count):
        values = rng.standard_normal((chunks, 2)) + 0.7 * rng.standard_normal((1, 2))
        values[1:] += 0.5 * values[:-1]
        made.append(values)
    return made


@pytest.fixture(scope="module")
def fitted() -> Calibration:
    return Calibration.fit(MonitorConfig(), BANK, episodes(400, np.random.default_rng(0)), 0.05)


def test_false_alarms_an_episode_are_what_was_asked(fitted: Calibration) -> None:
    fresh = episodes(1000, np.random.default_rng(1))
    verdicts = [fitted.judge(Tracked(), values)[1] for values in fresh]
    rang = np.mean([(v.instant | v.drifting).any() for v in verdicts])
    assert rang == pytest.approx(0.05, abs=0.03)
    assert np.mean([v.instant.any() for v in verdicts]) > 0
    assert np.mean([v.drifting.any() for v in verdicts]) > 0


def test_p_values_of_normal_chunks_are_uniform(fitted: Calibration) -> None:
    fresh = episodes(200, np.random.default_rng(2))
    p = np.concatenate([fitted.judge(Tracked(), values)[1].p_value[2:] for values in fresh])
    for level in (0.02, 0.1, 0.5):
        assert (p <= level).mean() == pytest.approx(level, rel=0.4)


def test_piece_by_piece_is_all_at_once(fitted: Calibration) -> None:
    values = episodes(1, np.random.default_rng(3))[0]
    _, whole = fitted.judge(Tracked(), values)
    tracked, parts = Tracked(), []
    for run in np.split(values, [1, 2, 3, 20]):
        tracked, verdict = fitted.judge(tracked, run)
        parts.append(verdict)
    for got, expected in zip(zip(*parts, strict=True), whole, strict=True):
        np.testing.assert_allclose(np.concatenate(got), expected, rtol=1e-12)
    assert tracked.chunk == 40


def test_one_strange_chunk_rings_at_once(fitted: Calibration) -> None:
    values = np.zeros((20, 2))
    values[12] = 30.0
    _, verdict = fitted.judge(Tracked(), values)
    assert np.flatnonzero(verdict.instant).tolist() == [12]
    assert verdict.onset[12] == 12
    assert verdict.p_value[12] < 1e-3


def test_a_slow_drift_rings_though_no_chunk_does(fitted: Calibration) -> None:
    values = np.zeros((60, 2))
    values[20:] = 3.2
    _, verdict = fitted.judge(Tracked(), values)
    assert not verdict.instant.any()
    first = int(np.argmax(verdict.drifting))
    assert verdict.drifting.any()
    assert 20 < first < 40
    assert verdict.onset[first] == 20


def test_the_warm_up_is_not_judged(fitted: Calibration) -> None:
    values = np.full((3, 2), 30.0)
    _, verdict = fitted.judge(Tracked(), values)
    np.testing.assert_array_equal(verdict.p_value[:2], 1.0)
    assert verdict.instant.tolist() == [False, False, True]


def test_episodes_that_end_early_count_as_quiet() -> None:
    normal = episodes(150, np.random.default_rng(6))
    short = Calibration.fit(
        MonitorConfig(), BANK, [v[:2] if i % 2 else v for i, v in enumerate(normal)], 0.05
    )
    whole = Calibration.fit(MonitorConfig(), BANK, normal, 0.05)
    assert short.evidence_limit < whole.evidence_limit


def test_only_the_named_channels_count() -> None:
    normal = episodes(100, np.random.default_rng(4))
    only_a = Calibration.fit(MonitorConfig(channels=("a",)), BANK, normal, 0.05)
    values = np.zeros((10, 2))
    values[5, 1] = 100.0
    assert not only_a.judge(Tracked(), values)[1].instant.any()


def test_bad_input() -> None:
    normal = episodes(100, np.random.default_rng(5), 5)
    with pytest.raises(
        InputError, match=r"alpha 0\.001 needs at least 999; collect 899 more or ask for a larger"
    ):
        Calibration.fit(MonitorConfig(), BANK, normal, 0.001)
    with pytest.raises(InputError, match="alpha 0.5 needs at least 100; collect 1 more$"):
        Calibration.fit(MonitorConfig(), BANK, normal[:99], 0.5)
    with pytest.raises(InputError, match="no normal episode has more than 2 chunks"):
        Calibration.fit(MonitorConfig(), BANK, [v[:2] for v in normal], 0.05)
    with pytest.raises(InputError, match="no channel c"):
        Calibration.fit(MonitorConfig(channels=("c",)), BANK, normal, 0.05)
    with pytest.raises(ConfigError, match="sideways"):
        MonitorConfig(combination="sideways")
    with pytest.raises(ConfigError, match="span 0"):
        MonitorConfig(span=0)
