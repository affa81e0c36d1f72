"""AUROC by episodes."""

from __future__ import annotations

import numpy as np
import pytest

from agents.anomaly.detection import Wins, interval, localisation, resamples, share_interval


def test_auroc_is_the_share_of_pairs_won() -> None:
    rng = np.random.default_rng(0)
    positives = [rng.integers(0, 9, n).astype(float) for n in (3, 0, 5)]
    negatives = [rng.integers(0, 7, n).astype(float) for n in (4, 2)]
    p, n = np.concatenate(positives), np.concatenate(negatives)
    brute = np.mean([(a > b) + 0.5 * (a == b) for a in p for b in n])
    assert float(Wins(positives, negatives).auroc()) == pytest.approx(brute)


def test_weights_repeat_episodes() -> None:
    rng = np.random.default_rng(1)
    positives, negatives = [rng.random(4) for _ in range(3)], [rng.random(5) for _ in range(2)]
    weighted = Wins(positives, negatives).auroc(np.array([[2.0, 0.0, 1.0]]), np.array([[1.0, 1.0]]))
    repeated = Wins([positives[0], positives[0], positives[2]], negatives).auroc()
    assert float(weighted[0]) == pytest.approx(float(repeated))


def test_intervals_cover() -> None:
    rng = np.random.default_rng(2)
    inside = 0
    for _ in range(200):
        hits = (rng.random(60) < 0.3).astype(float)
        got = share_interval(hits, 300, rng)
        inside += got["low"] <= 0.3 <= got["high"]
    assert inside > 175
    assert resamples(7, 10, rng).sum(1).tolist() == [7.0] * 10
    assert interval(1.0, np.ones(5), 3) == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 3}


def test_localisation() -> None:
    mask = np.zeros((6, 6), dtype=bool)
    mask[1:3, 1:3] = True
    assert localisation(mask.astype(float), mask) == (1.0, 1.0)
    assert localisation(1.0 - mask, mask) == (0.0, 0.0)
    assert localisation(np.zeros((6, 6)), mask)[0] == 0.5
