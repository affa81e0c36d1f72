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

from agents.planning_evaluation import evaluate_fidelity, evaluate_planning, plot_fidelity, plot_planning
from agents.trial import Numbers, Progress, TrialConfig
from worldmodel import InputError, WorldModel
from worldmodel.files import write_json
from worldmodel.training.evaluate import git_revision


@dataclass(frozen=True)
class Section:
    """One part of the evaluation. dials: the fields of `TrialConfig` that its figures depend on."""

    run: Callable[[WorldModel, TrialConfig, Progress], Numbers]
    plot: Callable[[Any, Numbers], None]
    dials: tuple[str, ...]


SECTIONS: dict[str, Section] = {
    "planning": Section(evaluate_planning, plot_planning, ("starts", "chunks", "preset", "seed")),
    "fidelity": Section(evaluate_fidelity, plot_fidelity, ("starts", "preset", "seed")),
}


def evaluate_agents(
    world: WorldModel, out: str | Path, config: TrialConfig | None = None, only: Sequence[str] = ()
) -> Numbers:
    """Measure the sections named, all by default; writes ``agents.json``, ``agents.png`` and ``sections/`` into ``out``.

    Raises:
        InputError: no section of that name, or a world that names no environment.
    """
    config = config or TrialConfig()
    if unknown := [name for name in only if name not in SECTIONS]:
        raise InputError(f"no section {', '.join(unknown)}; choose from {', '.join(SECTIONS)}")
    folder, revision = Path(out), git_revision()
    numbers: Numbers = {
        "world": world.spec.name,
        "fingerprint": world.fingerprint,
        "git_revision": revision,
        "config": asdict(config),
    }
    for name in only or SECTIONS:
        section = SECTIONS[name]
        dials = {dial: getattr(config, dial) for dial in (*section.dials, "bootstrap")}
        progress = Progress(
            folder / "sections" / f"{name}.json", {"fingerprint": world.fingerprint, **dials}
        )
        if progress.kept["numbers"] is None:
            measured = section.run(world, config, progress)
            progress.finish(finite({**measured, "git_revision": revision}))
        numbers[name] = progress.kept["numbers"]
    write_json(folder / "agents.json", numbers)
    return numbers


def finite(value: Any) -> Any:
    """Numbers for JSON: None for what is not finite."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
