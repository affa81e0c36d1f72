from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from agents.evaluation.planning import pearson, pendulum_returns, play
from agents.evaluation.sections import SECTIONS, Section, evaluate_agents, plot_page, summary
from agents.evaluation.trial import (
    Progress,
    TrialConfig,
    auroc,
    camera,
    real_env,
    replay,
    resampled,
    walk,
)
from tests.toy import write_toy
from worldmodel import InputError, WorldModel
from worldmodel.files import config_to_dict, finite
from worldmodel.training.collect import CollectConfig, PolicyShare
from worldmodel.training.policies import lander_state

pytest.importorskip("pygame")

TINY = TrialConfig(starts=2, chunks=1, clips=2, policy_chunks=1024, bootstrap=20)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> WorldModel:
    """A toy that says it was learned from the real Pendulum-v1."""
    toy = WorldModel.load(write_toy(tmp_path_factory.mktemp("pendulum") / "toy"))
    policies = (PolicyShare("random"),)
    made = CollectConfig("Pendulum-v1", frame_size=(32, 32), hide=("last_u",), policies=policies)
    toy.spec = replace(toy.spec, environment=config_to_dict(made))
    return toy


def test_every_section_is_measured_kept_and_drawn(
    world: WorldModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("planning", "fidelity", "inference", "counterfactuals", "termination")
    first = evaluate_agents(world, tmp_path, TINY, names)
    assert json.loads((tmp_path / "agents.json").read_text()) == first
    assert (tmp_path / "agents.png").read_bytes()[:4] == b"\x89PNG"
    planning = first["planning"]
    assert len(planning["world"]["returns"]) == 2
    assert planning["true_dynamics"]["mean_return"]["value"] > planning["random"]["mean_return"]["value"]
    assert planning["frames"] == 4
    assert planning["world"]["plans_a_second"] * planning["world"]["seconds_a_plan"] == pytest.approx(1.0)
    assert np.shape(first["fidelity"]["real"]) == (2, 20)
    assert first["inference"]["range"] == [-2.0, 2.0]
    assert set(first["counterfactuals"]["errors"]) >= {"counterfactual", "fresh", "one_step"}
    assert first["termination"]["terminated"] == 0
    assert first["termination"]["auroc"]["value"] is None
    text = summary(first)
    for name in names[:4]:
        assert sum(line.startswith(name) for line in text.splitlines()) >= 2

    def never(*_: Any) -> Any:
        raise AssertionError("measured again")

    for name in names:
        monkeypatch.setitem(SECTIONS, name, replace(SECTIONS[name], run=never))
    assert evaluate_agents(world, tmp_path, TINY, names) == first
    evaluate_agents(world, tmp_path, replace(TINY, clips=3), ("planning",))  # not one of its dials
    with pytest.raises(AssertionError, match="measured again"):
        evaluate_agents(world, tmp_path, replace(TINY, starts=1), ("planning",))


def stand_in(section: Section, **numbers: Any) -> Section:
    return replace(section, run=lambda *_: numbers, plot=lambda *_: None)


def test_a_world_of_ones_own_has_the_sections_that_fit(
    world: WorldModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, section in SECTIONS.items():
        monkeypatch.setitem(SECTIONS, name, stand_in(section))
    expected = {"Pendulum-v1": "termination", "LunarLander-v3": "anomalies", "Own-v0": "anomalies"}
    for env, absent in expected.items():
        own = copy.copy(world)
        own.spec = replace(world.spec, environment={**world.spec.environment, "env": env})
        numbers = evaluate_agents(own, tmp_path / env, TINY)
        assert set(SECTIONS) - set(numbers) == {absent}


def test_what_was_measured_is_there_when_a_later_section_fails(
    world: WorldModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise InputError("it fails")

    monkeypatch.setitem(SECTIONS, "planning", stand_in(SECTIONS["planning"], found=1.5))
    monkeypatch.setitem(SECTIONS, "fidelity", replace(SECTIONS["fidelity"], run=fail))
    with pytest.raises(InputError, match="it fails"):
        evaluate_agents(world, tmp_path, TINY, ("planning", "fidelity"))
    assert json.loads((tmp_path / "agents.json").read_text())["planning"]["found"] == 1.5


def test_a_part_that_is_not_finite(tmp_path: Path) -> None:
    progress = Progress(tmp_path / "section.json", {})
    made = progress.each("part", range(2), lambda key: {"error": float("nan") if key else 0.5})
    assert made == [{"error": 0.5}, {"error": None}]
    assert Progress(tmp_path / "section.json", {}).kept["parts"]["part"]["1"] == {"error": None}


def test_figures_that_are_not_finite_are_drawn(tmp_path: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    none = {"value": None, "low": None, "high": None, "n": 2}
    numbers: dict[str, Any] = {
        "planning": {
            "world": {"returns": [1.0, None], "mean_return": none},
            "frames": 4,
            "preset": "fast",
        },
        "fidelity": {"imagined": [[1.0, None]], "real": [[1.0, 2.0]], "r": none, "horizon": 2},
        "inference": {"true": [1.0], "guess": [None], "level": 0.9, "coverage": none},
        "counterfactuals": {"errors": {"fresh": [1.0, None]}, "unit": "degrees"},
        "termination": {"auroc": none, "auroc_observed": none, "terminated": 0, "episodes": 2},
        "imagination": {"returns": [1.0, None], "mean_return": none},
    }
    plot_page({"world": "toy", "git_revision": "unknown", **numbers}, tmp_path / "page.png")
    assert pyplot.imread(tmp_path / "page.png").shape[2] == 4


def test_an_interrupted_section_continues(tmp_path: Path) -> None:
    asked: list[int] = []

    def compute(key: int) -> float:
        asked.append(key)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return key / 2

    path, key = tmp_path / "section.json", {"fingerprint": "a"}
    with pytest.raises(KeyboardInterrupt):
        Progress(path, key).each("part", range(4), compute)
    assert Progress(path, key).each("part", range(4), compute) == [0.0, 0.5, 1.0, 1.5]
    assert asked == [0, 1, 2, 2, 3]
    assert Progress(path, {"fingerprint": "b"}).kept["parts"] == {}
    path.write_text("{ not json")
    assert Progress(path, key).kept["parts"] == {}


def test_mistakes(world: WorldModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no section flying; choose from planning"):
        evaluate_agents(world, tmp_path, TINY, ("flying",))
    with pytest.raises(InputError, match="starts is 0"):
        TrialConfig(starts=0)
    nameless = WorldModel.load(write_toy(tmp_path / "toy"))
    with pytest.raises(InputError, match="names no environment"):
        evaluate_agents(nameless, tmp_path, TINY, ("planning",))
    assert not list(tmp_path.glob("agents.*"))


def test_a_walk_can_be_replayed(world: WorldModel) -> None:
    """The last action itself gives the last chunk again; another gives another."""
    env = real_env(world)
    made = camera(world)
    walked = walk(env, made, 5, 4)
    assert walked.frames.shape == (4, 4, 32, 32, 3)
    frames, observation = replay(env, walked, walked.actions[-1])
    np.testing.assert_array_equal(frames, walked.frames[-1])
    np.testing.assert_array_equal(observation, walked.observations[-1])
    assert not np.array_equal(replay(env, walked, -walked.actions[-1])[1], observation)
    again = walk(env, made, 5, 4)
    np.testing.assert_array_equal(again.frames, walked.frames)
    state = walked.before_last(world)
    assert int(state.steps[0]) == 4
    env.close()


def test_the_true_dynamics_are_the_simulator(world: WorldModel) -> None:
    env = real_env(world)
    env.reset(seed=3)
    state = np.array(env.unwrapped.state)  # type: ignore[attr-defined]
    torques = np.array([[[1.5], [-2.0], [0.3]]], dtype=np.float32)
    total = sum(float(env.step(torque)[1]) for torque in torques[0])
    assert pendulum_returns(state, torques, 4)[0] == pytest.approx(total, rel=1e-6)
    env.close()


def test_the_heuristic_sees_what_lunar_lander_says() -> None:
    env = gymnasium.make("LunarLander-v3")
    env.reset(seed=1)
    for action in (0, 2, 1, 3, 2):
        observation = env.step(action)[0]
    np.testing.assert_allclose(lander_state(env.unwrapped), observation, atol=1e-6)
    env.close()


def test_an_episode_ends_where_the_environment_says(world: WorldModel) -> None:
    env = real_env(world)
    zero = np.zeros(1, np.float32)
    assert play(env, 0, 3, lambda *_: zero)["chunks"] == 3
    env.close()


def test_auroc_by_hand() -> None:
    scores, positive = np.array([0.1, 0.4, 0.4, 0.9]), np.array([False, False, True, True])
    assert auroc(scores, positive) == pytest.approx((1 + 0.5 + 1 + 1) / 4)
    assert np.isnan(auroc(scores, np.ones(4, dtype=bool)))


def test_pearson_and_its_interval() -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((40, 3))
    b = a + 0.5 * rng.standard_normal((40, 3))
    assert pearson(a, b) == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1])
    assert np.isnan(pearson(a, np.ones_like(a)))
    found = resampled(lambda rows: pearson(a[rows], b[rows]), 40, TINY)
    assert found["low"] < found["value"] < found["high"]
    assert finite({"a": [np.nan, 1.0]}) == {"a": [None, 1.0]}
