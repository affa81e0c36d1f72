"""The table of anomalies that `evaluate_anomalies` measures, as a plot."""

from __future__ import annotations

from typing import Any


def plot_anomalies(axes: Any, numbers: dict[str, Any]) -> None:
    """On matplotlib axes: AUROC by perturbation, of every channel (grey), of a chunk alone and of the monitor's score."""
    names = list(numbers["perturbations"])
    for row, name in enumerate(names):
        values = numbers["perturbations"][name]["auroc"]
        single = [v["value"] for c, v in values.items() if c not in ("chunk alone", "combined")]
        axes.plot(
            single, [row] * len(single), "|", color="0.6", ms=9, label=None if row else "single channels"
        )
        for column, colour, shift in (("chunk alone", "C1", 0.12), ("combined", "C0", -0.12)):
            v = values[column]
            axes.errorbar(
                v["value"],
                row + shift,
                xerr=[[max(v["value"] - v["low"], 0)], [max(v["high"] - v["value"], 0)]],
                fmt="o",
                ms=4,
                color=colour,
                label=None if row else column,
            )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlim=(0.4, 1.01), title="AUROC a chunk")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower left")
