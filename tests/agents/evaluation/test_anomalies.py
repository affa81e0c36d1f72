"""The table of anomalies, small: what it holds, and that it can be drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from agents.anomaly.conformal import COMBINATIONS
from agents.anomaly.perturbations import PERTURBATIONS
from agents.evaluation.anomalies import AnomalyEvaluation, evaluate_anomalies
from agents.evaluation.anomaly_table import plot_anomalies, plot_delays, summary
from tests.toy import toy_world
from worldmodel import InputError, WorldModel

pytest.importorskip("pygame")
TINY = AnomalyEvaluation(calibration=100, fresh=10, perturbed=2, validation=1, chunks=20, bootstrap=50)


def test_only_the_pendulum_has_a_table(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"world toy is not of Pendulum-v1"):
        evaluate_anomalies(toy_world(tmp_path / "toy"))


@pytest.mark.slow
def test_a_small_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    numbers = evaluate_anomalies(WorldModel.load("pendulum"), TINY, progress=False)
    json.dumps(numbers, allow_nan=False)
    assert set(numbers["perturbations"]) == set(PERTURBATIONS)
    assert set(numbers["combination"]["mean_auroc_on_validation"]) == set(COMBINATIONS)
    for row in numbers["perturbations"].values():
        combined = row["auroc"]["combined"]
        assert 0 <= combined["low"] <= combined["value"] <= combined["high"] <= 1
        assert len(row["delays_chunks"]) == 2
    assert numbers["perturbations"]["noise"]["auroc"]["combined"]["value"] > 0.99
    assert numbers["perturbations"]["patch"]["localisation"]["pixel_auroc"]["value"] > 0.9
    values = [row["auroc"]["combined"]["value"] for row in numbers["perturbations"].values()]
    assert numbers["mean_auroc"]["combined"]["value"] == pytest.approx(np.mean(values))
    figure, axes = pyplot.subplots(1, 2)
    plot_anomalies(axes[0], numbers)
    plot_delays(axes[1], numbers)
    figure.savefig(tmp_path / "page.png")
    pyplot.close(figure)
    assert "velocity flip" in summary(numbers)
    kept = sorted((tmp_path / "worldmodel" / "anomalies").glob("*/dataset.json"))
    written = [f.stat().st_mtime_ns for f in kept]
    again = evaluate_anomalies(WorldModel.load("pendulum"), TINY, progress=False)
    assert again == numbers
    assert [f.stat().st_mtime_ns for f in kept] == written
