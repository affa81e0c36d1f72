"""Every example runs as a user would run it, on a toy world."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.toy import write_toy
from worldmodel.files import config_to_dict, read_json, write_json
from worldmodel.training.collect import CollectConfig

ROOT = Path(__file__).parents[2]


def run(script: str, folder: Path, *arguments: str) -> str:
    """Its output; it must exit with 0."""
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_toy(tmp_path_factory.mktemp("world") / "toy", frame=(64, 64)))


@pytest.fixture(scope="module")
def of_pendulum(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A toy that says it was learned from Pendulum-v1."""
    path = write_toy(tmp_path_factory.mktemp("pendulum") / "toy")
    made = CollectConfig("Pendulum-v1", frame_size=(32, 32), hide=("last_u",))
    write_json(path / "world.json", read_json(path / "world.json") | {"environment": config_to_dict(made)})
    return str(path)


def test_step_a_world(world: str, tmp_path: Path) -> None:
    output = run("step_a_world.py", tmp_path, "--world", world, "--chunks", "3")
    assert "bits/dim" in output
    assert (tmp_path / "step_a_world.webm").stat().st_size > 0


def test_fork_and_compare(world: str, tmp_path: Path) -> None:
    output = run("fork_and_compare.py", tmp_path, "--world", world, "--chunks", "2", "--out", "forks.gif")
    assert "branch 2" in output
    assert "continues identically: True" in output
    assert (tmp_path / "forks.gif").stat().st_size > 0


def test_vector_env(world: str, tmp_path: Path) -> None:
    output = run("vector_env.py", tmp_path, "--world", world, "--sizes", "1", "3", "--steps", "2")
    assert output.count("chunks/s") == 2


def test_ppo_stable_baselines3(world: str, tmp_path: Path) -> None:
    pytest.importorskip("stable_baselines3")
    arguments = ("--steps", "100", "--batch", "50", "--out", "policy.zip")
    output = run("ppo_stable_baselines3.py", tmp_path, "--world", world, *arguments)
    assert "after 100 steps" in output
    assert (tmp_path / "policy.zip").stat().st_size > 0


def test_ppo_in_imagination(of_pendulum: str, tmp_path: Path) -> None:
    pytest.importorskip("stable_baselines3")
    pytest.importorskip("pygame")
    arguments = ("--world", of_pendulum, "--steps", "1024", "--episodes", "2", "--chunks", "2")
    output = run("ppo_in_imagination.py", tmp_path, *arguments)
    assert "1024 imagined chunks, no real one: mean real return -" in output
    assert (tmp_path / "runs/ppo_in_imagination/policy.safetensors").stat().st_size > 0


def test_land_lunarlander(tmp_path: Path) -> None:
    output = run("land_lunarlander.py", tmp_path, "--chunks", "3")
    assert "after 3 chunks" in output
    assert (tmp_path / "land_lunarlander.mp4").stat().st_size > 0


def test_plan_pendulum(of_pendulum: str, tmp_path: Path) -> None:
    pytest.importorskip("pygame")
    output = run("plan_pendulum.py", tmp_path, "--world", of_pendulum, "--episodes", "1", "--chunks", "3")
    assert output.count("mean return") == 3
    assert (tmp_path / "plan_pendulum.png").stat().st_size > 0
