"""What a picture of a monitor shows, and what it leaves clear."""

from __future__ import annotations

import numpy as np
import pytest

from agents.anomaly.drawing import CLEAR, overlay, plot_records
from agents.anomaly.monitor import AnomalyRecord
from worldmodel.training.plots import pyplot

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("background", [0.0, CLEAR, 0.7])
def test_heat_leaves_all_clear_but_the_spot(background: float) -> None:
    frames = np.full((2, 16, 16, 3), 200, np.uint8)
    heat = np.full((16, 16), background, np.float32)
    heat[4:8, 4:8] = 0.9
    changed = (overlay(frames, heat, scale=1) != 200).any((0, 3))
    assert changed[5:7, 5:7].all()
    changed[3:9, 3:9] = False
    assert not changed.any()


@pytest.mark.parametrize(("highest", "ticks"), [(0.3, "0 0.5 1 2"), (30.0, "0 0.5 1 2 5 10 20")])
def test_the_axis_counts_in_limits(highest: float, ticks: str) -> None:
    record = AnomalyRecord(0, 0.0, 1.0, {}, highest, 0.0, False, False, None, np.zeros((2, 2)))
    plt = pyplot()
    figure, axes = plt.subplots()
    plot_records(axes, [record], (1.0, 0.0))
    assert " ".join(label.get_text() for label in axes.get_yticklabels()) == ticks
    assert axes.get_ylim()[1] > highest
    plt.close(figure)
