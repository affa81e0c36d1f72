"""Recipes: those that ship, those of files, and one for whatever was collected."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import envs
from worldmodel.errors import ConfigError, DataError
from worldmodel.files import config_to_dict
from worldmodel.training.collect import CollectConfig, PolicyShare, collect
from worldmodel.training.episodes import EpisodeDataset
from worldmodel.training.export import train_world
from worldmodel.training.loop import LoopConfig
from worldmodel.training.recipes import RECIPES, Recipe, load_recipe, within


def test_recipes_round_trip_and_refuse_unknown_keys(tmp_path: Path) -> None:
    for name in RECIPES:
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(config_to_dict(load_recipe(name))))
        assert load_recipe(str(file)) == load_recipe(name)
    file.write_text(json.dumps({**config_to_dict(load_recipe("pendulum")), "epochs": 3}))
    with pytest.raises(ConfigError, match="epochs"):
        load_recipe(str(file))
    with pytest.raises(ConfigError, match="pendulum"):
        load_recipe("nothing")


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short episodes of unequal lengths, of an environment that no recipe is for."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    folder = tmp_path_factory.mktemp("cart poles")
    policies = (PolicyShare("random_held"),)
    collect(
        CollectConfig("CartPole-v1", episodes=30, frame_size=(48, 64), policies=policies, workers=1), folder
    )
    return folder


def test_a_world_of_whatever_was_collected(collected: Path, tmp_path: Path) -> None:
    """Shapes come from the episodes; a few steps of it make a world that is an environment."""
    recipe = load_recipe(str(collected))
    lengths = EpisodeDataset.open(collected).split("train").lengths
    window = recipe.flow.length
    assert 2 <= window == recipe.flow.model.window <= 16 and (lengths >= window).mean() >= 0.75
    assert recipe.codec.model.latent_shape == (16, 3, 4) and recipe.flow.model.patch_size == 1
    assert " " not in recipe.name and recipe.collect.env == "CartPole-v1"

    few = LoopConfig(steps=2, warmup=1)
    flow = replace(recipe.flow, loop=few, compiled=False)
    small = replace(
        recipe,
        codec=replace(recipe.codec, loop=few, batch=8),
        flow=flow,
        further=(replace(recipe.further[0], flow=flow),),
        heads=replace(recipe.heads, loop=few, batch=8),
        starts=2,
        start_chunks=1,
    )
    train_world(small, collected, tmp_path / "run", tmp_path / "world")
    env = envs.WorldModelEnv(tmp_path / "world")
    frames, _ = env.reset(seed=0)
    assert frames.shape == (4, 48, 64, 3)
    assert np.isfinite(env.step(1)[4]["log_prob"])


def test_collected_episodes_that_do_not_tell_their_environment(collected: Path, tmp_path: Path) -> None:
    described = json.loads((collected / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps({**described, "episodes": 0, "collect": {}}))
    with pytest.raises(DataError, match="does not tell the environment; give a recipe"):
        load_recipe(str(tmp_path))
    with pytest.raises(DataError, match="is not a dataset"):
        load_recipe(str(tmp_path / ".."))


def test_minutes_are_shared_out_as_the_recipe_has_them(collected: Path) -> None:
    def minutes(recipe: Recipe) -> list[float]:
        stages = [s for each in recipe.rounds for s in (each.codec, each.flow) if s is not None]
        return [stage.loop.minutes or 0.0 for stage in stages]

    for name in (*RECIPES, str(collected)):
        whole = load_recipe(name)
        part = within(whole, 30.0)
        assert sum(minutes(part)) == pytest.approx(30.0)
        assert np.divide(minutes(part), minutes(whole)) == pytest.approx(30.0 / sum(minutes(whole)))
        assert within(part, sum(minutes(whole))).flow.loop.minutes == pytest.approx(whole.flow.loop.minutes)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="expected a number above 0"):
            within(whole, wrong)
    timeless = replace(whole, further=(), codec=replace(whole.codec, loop=LoopConfig()))
    timeless = replace(timeless, flow=replace(whole.flow, loop=LoopConfig()))
    with pytest.raises(ConfigError, match="no stage of this recipe ends by the clock"):
        within(timeless, 30.0)
