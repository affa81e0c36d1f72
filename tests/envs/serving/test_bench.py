"""The benchmark and the soak say what they measured; their figures are not asserted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.serving import report, round_trips
from benchmarks.soak import faults, levels_off, trends


@pytest.mark.parametrize("curve", [False, True])
def test_round_trips(curve: bool) -> None:
    measured = round_trips(49152, curve, 0.05)
    for row in measured.values():
        assert row["ratio"] == pytest.approx(row["server_us"] / row["bare_us"])
        assert row["trips"] >= 20 and row["bare_us"] > 0
    text = report({"world": "toy", "round_trips": {"plain": {"49 KB": measured}}, "steps": []})
    assert "step" in text and "observe" in text


def sample(**changes: float) -> dict[str, float]:
    return {"rss": 2.0**28, "descriptors": 20.0, "sessions": 3.0, "snapshots": 0.0, "steps": 9.0, **changes}


def test_the_soak_finds_what_grows_and_what_is_left() -> None:
    def result(samples: list[dict[str, float]], **changes: Any) -> list[str]:
        good = {"mismatches": 0, "failed": 0, "server_exit_status": 0}
        return faults({**good, **trends(samples), **changes})

    end = sample(sessions=0.0)
    assert result([sample()] * 20 + [end]) == []
    assert result([sample()] * 10 + [sample(rss=2.0**29)] * 10 + [end]) == ["memory grows"]
    assert result([sample()] * 10 + [sample(descriptors=90.0)] * 10 + [end]) == ["descriptors grow"]
    assert result([sample()] * 20 + [sample()]) == ["sessions are left over"]
    assert result([sample()] * 20 + [sample(sessions=0.0, snapshots=2.0)]) == ["snapshots are left over"]
    assert result([sample()] * 3 + [end], mismatches=1, failed=1, server_exit_status=1) == [
        "frames differ",
        "clients failed",
        "the server did not end well",
    ]


def test_levels_off() -> None:
    frames = np.zeros((2, 4, 4, 3), np.uint8)
    other = frames.copy()
    other[1, 2, 2, 0] = 200
    assert levels_off(frames, other) == [0, 200]
