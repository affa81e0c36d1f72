"""What a world was made from, as its ``world.json`` tells it: the episodes it was trained on, the code's revision."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from worldmodel.checkpoint import WorldSpec
from worldmodel.errors import ConfigError, DataError
from worldmodel.files import config_from_dict
from worldmodel.training.collect import CollectConfig
from worldmodel.training.episodes import EpisodeDataset, split_indices

PACKAGE = Path(__file__).resolve().parents[1]


def episodes_of(datasets: Iterable[EpisodeDataset]) -> list[dict[str, Any]]:
    """``provenance.trained_on``: env, env_kwargs, seed and number of episodes of each dataset."""
    return [
        {key: d.collected.get(key) for key in ("env", "env_kwargs", "seed")} | {"episodes": d.episodes}
        for d in datasets
    ]


def environment_of(dataset: EpisodeDataset) -> dict[str, Any]:
    """The settings with which more such episodes can be collected; empty where an environment made none of them."""
    try:
        config_from_dict(CollectConfig, dataset.collected, "collect")
    except ConfigError:
        return {}
    return dataset.collected if "env" in dataset.collected else {}


def trained_on(spec: WorldSpec) -> list[dict[str, Any]]:
    """What `episodes_of` gave for all that the world was trained on, the worlds that it began with included.

    Worlds that were written without it are known by their environment and their recipe's collections alone.

    Raises:
        DataError: ``world.json`` holds a recipe, or a list, from which that cannot be told.
    """
    told = spec.provenance.get("trained_on")
    if told is None:
        return [
            {"env": c.get("env"), "seed": c.get("seed"), "episodes": c.get("episodes")}
            for c in _collections(spec)
        ]
    if not isinstance(told, list) or not all(isinstance(each, dict) for each in told):
        raise DataError(f"world {spec.name}: provenance.trained_on of its world.json is no list of datasets")
    return told


def first_held_out(spec: WorldSpec, dataset: EpisodeDataset) -> int:
    """The first episode of the dataset that the world was not trained on; as many as there are episodes for none."""
    made = dataset.collected
    same = [
        each
        for each in trained_on(spec)
        if all(made.get(key) == value for key, value in each.items() if key != "episodes")
    ]
    counts = [int(each.get("episodes") or dataset.episodes) for each in same]
    return min(max((split_indices(n, "test").start for n in counts), default=0), dataset.episodes)


def _collections(spec: WorldSpec) -> list[dict[str, Any]]:
    recipe = spec.provenance.get("recipe", {})
    further = recipe.get("further", ()) if isinstance(recipe, dict) else ()
    rounds = [recipe, *further] if isinstance(further, (list, tuple)) else [further]
    if not all(isinstance(each, dict) and isinstance(each.get("collect") or {}, dict) for each in rounds):
        raise DataError(
            f"world {spec.name}: provenance.recipe of its world.json is no recipe, so what it was trained on is "
            "unknown; put back what `worldmodel train` wrote, or remove it"
        )
    made = [spec.environment, *(each.get("collect") for each in rounds)]
    return [collect for collect in made if collect]


def git_revision() -> str:
    """The revision of this project's checkout, with "+changes" if it is not clean, or "unknown" outside one."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, check=True, timeout=10
        )
        return done.stdout.strip()

    try:
        root = Path(git("rev-parse", "--show-toplevel"))
        if root != PACKAGE.parent or "name = worldmodel" not in (root / "setup.cfg").read_text("utf-8"):
            return "unknown"  # the repository of whoever installed the package
        return git("rev-parse", "--short", "HEAD") + (
            "+changes" if git("status", "--porcelain", "-uno") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
