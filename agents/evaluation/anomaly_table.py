"""The table of anomalies that `evaluate_anomalies` measures, as text and as plots."""

from __future__ import annotations

from typing import Any

import numpy as np


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


def plot_delays(axes: Any, numbers: dict[str, Any]) -> None:
    """On matplotlib axes: the share of episodes with an alarm by chunks since the anomaly began."""
    asked, real = numbers["false_alarms"]["asked"], numbers["false_alarms"]["per_episode"]["value"]
    for k, (name, row) in enumerate(numbers["perturbations"].items()):
        delays = np.array(row["delays_chunks"])
        chunks = np.arange(0, 17)
        share = [float(((delays >= 0) & (delays <= c)).mean()) for c in chunks]
        axes.plot(chunks, share, color=f"C{k % 10}", ls="-" if k < 10 else "--", label=name)
    axes.set(
        xlabel="chunks since it began",
        ylim=(0, 1.02),
        title=f"episodes with an alarm (false: {100 * real:.1f} %, asked {100 * asked:g} %)",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def summary(numbers: dict[str, Any]) -> str:
    """The table as text."""
    columns = list(numbers["mean_auroc"])
    lines = ["AUROC a chunk".ljust(16) + " ".join(c[:11].rjust(11) for c in columns) + "    TPR@1%  delay"]
    for name, row in numbers["perturbations"].items():
        cells = " ".join(f"{row['auroc'][c]['value']:11.3f}" for c in columns)
        delay = "-" if row["median_delay_chunks"] is None else str(row["median_delay_chunks"])
        lines.append(f"{name:16s}{cells}    {row['tpr_at_1_percent_fpr']['value']:6.3f}  {delay:>5s}")
    lines.append("mean".ljust(16) + " ".join(f"{numbers['mean_auroc'][c]['value']:11.3f}" for c in columns))
    mean, false = numbers["mean_auroc"]["combined"], numbers["false_alarms"]["per_episode"]
    lines.append(
        f"mean, combined: {mean['value']:.3f} [{mean['low']:.3f}, {mean['high']:.3f}]; false alarms "
        f"{100 * false['value']:.1f} % [{100 * false['low']:.1f}, {100 * false['high']:.1f}] of {false['n']} fresh "
        f"episodes, asked {100 * numbers['false_alarms']['asked']:g} %"
    )
    return "\n".join(lines)
