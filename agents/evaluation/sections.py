"""`worldmodel evaluate agents`: planning, fidelity, inference, counterfactuals and the rest, proven in reality.

Each section is kept on disk with its finished parts; what was measured of the same world with the same dials is read
back instead of measured again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agents.evaluation.anomaly_table import plot_anomalies
from agents.evaluation.inference import (
    evaluate_counterfactuals,
    evaluate_inference,
    evaluate_termination,
    plot_counterfactuals,
    plot_inference,
    plot_termination,
)
from agents.evaluation.planning import (
    evaluate_fidelity,
    evaluate_planning,
    plot_fidelity,
    plot_planning,
    plot_returns,
)
from agents.evaluation.trial import Numbers, Progress, TrialConfig, with_nan
from worldmodel import InputError, WorldModel
from worldmodel.errors import ConfigError
from worldmodel.files import finite, write_atomic, write_json
from worldmodel.training.evaluate import check_report, git_revision
from worldmodel.training.plots import pyplot


@dataclass(frozen=True)
class Section:
    """One part of the evaluation.

    dials: the fields of `TrialConfig` that its figures depend on. headlines: those figures, by the path of their keys.
    environments: those that it is for, () for all. without: those that it says nothing about.
    """

    run: Callable[[WorldModel, TrialConfig, Progress], Numbers]
    plot: Callable[[Any, Numbers], None]
    dials: tuple[str, ...]
    headlines: tuple[str, ...]
    environments: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def fits(self, environment: str | None) -> bool:
        """It says something about that environment."""
        return environment not in self.without and (not self.environments or environment in self.environments)


def _evaluate_imagination(world: WorldModel, config: TrialConfig, progress: Progress) -> Numbers:
    try:
        from agents.imagination import evaluate_imagination
    except ImportError as error:
        raise ConfigError('learning needs stable-baselines3; pip install "worldmodel[rl]"') from error
    return evaluate_imagination(world, config, progress)


def _evaluate_anomalies(world: WorldModel, config: TrialConfig, progress: Progress) -> Numbers:
    from agents.evaluation.anomalies import AnomalyEvaluation, evaluate_anomalies

    return evaluate_anomalies(world, AnomalyEvaluation(bootstrap=config.bootstrap))


SECTIONS: dict[str, Section] = {
    "planning": Section(
        evaluate_planning,
        plot_planning,
        ("starts", "chunks", "preset", "seed"),
        (
            "world/mean_return",
            "true_dynamics/mean_return",
            "heuristic/mean_return",
            "prior/mean_return",
            "random/mean_return",
            "share_of_the_lead",
            "world/seconds_a_plan",
            "world/plans_a_second",
        ),
    ),
    "fidelity": Section(
        evaluate_fidelity, plot_fidelity, ("starts", "preset", "seed"), ("r", "r_within", "best_of_5")
    ),
    "inference": Section(
        evaluate_inference,
        plot_inference,
        ("clips", "seed"),
        ("mean_absolute_error", "accuracy", "coverage", "temperature", "coverage_calibrated"),
    ),
    "counterfactuals": Section(
        evaluate_counterfactuals,
        plot_counterfactuals,
        ("clips", "seed"),
        (
            "counterfactual",
            "one_step",
            "one_step_at_temperature_1",
            "fresh",
            "fresh_at_temperature_1",
            "ratio_to_one_step",
            "ratio_to_fresh",
            "ratio_to_fresh_at_temperature_1",
        ),
    ),
    "termination": Section(
        evaluate_termination,
        plot_termination,
        ("starts", "chunks", "seed"),
        ("auroc", "auroc_observed"),
        without=("Pendulum-v1",),
    ),
    "imagination": Section(
        _evaluate_imagination,
        plot_returns,
        ("starts", "chunks", "policy_chunks", "seed"),
        ("imagined_chunks", "mean_return"),
    ),
    "anomalies": Section(
        _evaluate_anomalies,
        plot_anomalies,
        (),
        ("mean_auroc/combined", "mean_auroc/chunk alone", "false_alarms/per_episode"),
        environments=("Pendulum-v1",),
    ),
}


def evaluate_agents(
    world: WorldModel, out: str | Path, config: TrialConfig | None = None, only: Sequence[str] = ()
) -> Numbers:
    """Measure the sections named, all by default; writes ``agents.json``, ``agents.png`` and ``sections/`` into ``out``.

    ``agents.json`` is written after every section.

    Raises:
        InputError: no section of that name, or a world that names no environment. ConfigError: ``out`` holds the figures of
            another world.
    """
    config = config or TrialConfig()
    if unknown := [name for name in only if name not in SECTIONS]:
        raise InputError(f"no section {', '.join(unknown)}; choose from {', '.join(SECTIONS)}")
    folder, revision = Path(out), git_revision()
    check_report(folder / "agents.json", world)
    numbers: Numbers = {
        "world": world.spec.name,
        "fingerprint": world.fingerprint,
        "git_revision": revision,
        "config": asdict(config),
    }
    environment = world.spec.environment.get("env")
    for name in only or [n for n, section in SECTIONS.items() if section.fits(environment)]:
        section = SECTIONS[name]
        dials = {dial: getattr(config, dial) for dial in (*section.dials, "bootstrap")}
        progress = Progress(folder / "sections" / f"{name}.json", {"fingerprint": world.fingerprint, **dials})
        if progress.kept["numbers"] is None:
            measured = section.run(world, config, progress)
            progress.finish(finite({**measured, "git_revision": revision}))
        numbers[name] = progress.kept["numbers"]
        write_json(folder / "agents.json", numbers)
    plot_page(numbers, folder / "agents.png")
    return numbers


def plot_page(numbers: Numbers, path: Path) -> None:
    """A plot for each section that was measured, on one page.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    shown = [name for name in SECTIONS if name in numbers]
    plt = pyplot()
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(5 * columns, 4 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.ravel()[len(shown) :]:
        axis.set_axis_off()
    for name, axis in zip(shown, axes.ravel(), strict=False):
        SECTIONS[name].plot(axis, with_nan(numbers[name]))
    figure.suptitle(f"agents in the world {numbers['world']}, revision {numbers['git_revision']}")
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
    plt.close(figure)


def summary(numbers: Numbers) -> str:
    """The figures that sections are judged by, as a short text."""
    lines = [f"world {numbers['world']}, revision {numbers['git_revision']}"]
    for name, section in SECTIONS.items():
        for path in section.headlines if name in numbers else ():
            value: Any = numbers[name]
            for key in path.split("/"):
                value = value.get(key) if isinstance(value, dict) else None
            if value is not None:
                lines.append(f"{name:16s} {path:28s} {_shown(value)}")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return f"{_shown(value['value'])} [{_shown(value['low'])}, {_shown(value['high'])}] (n {value['n']})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
