"""The table of anomalies, small: what it holds, and that it can be drawn."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from agents.anomaly.channels import Channel
from agents.anomaly.conformal import COMBINATIONS
from agents.anomaly.perturbations import PERTURBATIONS
from agents.evaluation import anomalies
from agents.evaluation.anomalies import AnomalyEvaluation, evaluate_anomalies
from agents.evaluation.anomaly_table import plot_anomalies
from tests.toy import toy_world
from worldmodel import InputError, WorldModel
from worldmodel.files import config_to_dict
from worldmodel.training.collect import CollectConfig

pytest.importorskip("pygame")
TINY = AnomalyEvaluation(calibration=100, fresh=10, perturbed=2, validation=1, chunks=20, bootstrap=50)


def test_only_the_pendulum_has_a_table(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"world toy is not of Pendulum-v1"):
        evaluate_anomalies(toy_world(tmp_path / "toy"))


def test_rows_of_the_same_episodes_are_resampled_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are equal say no more together than one of them does."""
    rng = np.random.default_rng(0)
    config = AnomalyEvaluation(perturbed=12, fresh=20, chunks=20, bootstrap=200)
    columns = 3  # one channel, chunk alone, combined
    episodes = anomalies.Episodes(
        [rng.normal(rng.normal(), 1, (20, columns)) for _ in range(12)],
        [(np.arange(20) >= 12).astype(np.int64)] * 12,
        [12] * 12,
        [np.zeros((0, 2))] * 12,
    )
    calm = anomalies.Judged(
        [rng.normal(size=(20, columns)) for _ in range(20)], [np.zeros(20, dtype=bool)] * 20
    )
    monkeypatch.setattr(
        anomalies, "_judge", lambda _, e: anomalies.Judged(e.values, [v[:, 0] > 2 for v in e.values])
    )
    monitor: Any = SimpleNamespace(calibration=SimpleNamespace(channels=(Channel("nll", True),)))
    table = anomalies._table(monitor, calm, dict.fromkeys("abcd", episodes), config)
    for row in table["perturbations"].values():
        assert row["auroc"]["combined"] == pytest.approx(table["mean_auroc"]["combined"])
    assert table["mean_auroc"]["combined"]["n"] == 12


def test_episodes_are_kept_by_their_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[CollectConfig, Path]] = []
    monkeypatch.setenv("WORLDMODEL_CACHE", str(tmp_path))
    monkeypatch.setattr(anomalies, "collect", lambda made, folder: asked.append((made, folder)))
    nothing: Any = SimpleNamespace(open=lambda _: SimpleNamespace(episode=lambda i: i))
    monkeypatch.setattr(anomalies, "EpisodeDataset", nothing)
    for held, chunks in ((2, 20), (4, 20), (2, 21), (2, 20)):
        made = config_to_dict(CollectConfig(frame_skip=held))
        world: Any = SimpleNamespace(
            spec=SimpleNamespace(environment=made, frame_size=(8, 8)), chunk_frames=held
        )
        anomalies._perturbed(world, PERTURBATIONS["mass x2"], 1, 0, chunks)
    assert [made.env_kwargs["chunk_steps"] for made, _ in asked] == [2, 4, 2, 2]
    folders = [folder for _, folder in asked]
    assert folders[0] == folders[3]
    assert len(set(folders)) == 3
    assert {folder.parent for folder in folders} == {tmp_path / "anomalies"}


@pytest.mark.slow
def test_a_small_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setenv("WORLDMODEL_CACHE", str(tmp_path))
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
    figure, axes = pyplot.subplots()
    plot_anomalies(axes, numbers)
    figure.savefig(tmp_path / "page.png")
    pyplot.close(figure)
    kept = sorted((tmp_path / "anomalies").glob("*/episodes/*.npz"))
    assert kept
    written = [f.stat().st_mtime_ns for f in kept]
    again = evaluate_anomalies(WorldModel.load("pendulum"), TINY, progress=False)
    assert again == numbers
    assert [f.stat().st_mtime_ns for f in kept] == written
