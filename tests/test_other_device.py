"""Worlds on a device that is not the CPU, and which device the commands choose."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import gymnasium
import pytest
import torch

import envs
from worldmodel.checkpoint import find_world, read_spec
from worldmodel.errors import ConfigError, InputError
from worldmodel.parallel import spread_by_torchrun
from worldmodel.plan import device_for
from worldmodel.training.parallel import Ranks
from worldmodel.world import WorldModel

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler to build a device with")
def test_another_device_does_what_the_cpu_does(tmp_path: Path) -> None:
    """What is left on the wrong side of a copy is refused there, as on a GPU."""
    command = [sys.executable, "-m", "tests.other_device", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT, env=environment)
    assert done.returncode == 0 and done.stdout.endswith("ok\n"), done.stderr[-3000:]


def test_where_a_world_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is wanted; else on a GPU if there is one, but short frames on the CPU, whose kernels are made for them."""
    small = read_spec(find_world("pendulum"))
    codec = replace(small.codec, height=256, width=256)
    large = replace(small, frame_size=(256, 256), codec=codec)
    for spec in (small, large):
        assert device_for(spec) == device_for(spec, "cpu") == torch.device("cpu")
        with pytest.raises(InputError, match="torch finds 0 GPUs here"):
            device_for(spec, "cuda")
        for wrong in ("gpu", "meta", "mps"):
            with pytest.raises(InputError, match="expected cpu, cuda or cuda:N"):
                device_for(spec, wrong)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_for(small) == torch.device("cpu")
    assert device_for(large) == torch.device("cuda:0")
    with pytest.raises(InputError, match="torch finds 2 GPUs"):
        device_for(large, "cuda:2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device_for(small) == device_for(large) == torch.device("cuda:1")  # where torchrun's process is
    assert device_for(small, "cpu") == torch.device("cpu")


def test_where_an_environment_is_made() -> None:
    """By its constructor, or Gymnasium's; a device that is not there is refused before anything is loaded."""
    assert envs.WorldModelEnv("pendulum", device="cpu").world.device == torch.device("cpu")
    for make in (
        envs.WorldModelEnv,
        envs.WorldModelVectorEnv,
        partial(gymnasium.make, "worldmodel/Pendulum-v0"),
        partial(
            gymnasium.make_vec, "worldmodel/Pendulum-v0", num_envs=2, vectorization_mode="vector_entry_point"
        ),
    ):
        with pytest.raises(InputError, match="torch finds 0 GPUs here"):
            make(device="cuda")
    with pytest.raises(InputError, match="this world is on cpu; give its name or folder, or no device"):
        envs.WorldModelEnv(WorldModel.load("pendulum"), device="cpu")


def test_a_world_that_is_not_where_the_processes_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "joined", lambda: nullcontext(Ranks(0, 1, torch.device("cuda", 0))))
    spread = spread_by_torchrun(WorldModel.load("pendulum"), False)
    with pytest.raises(ConfigError, match="on cpu and torchrun's processes use cuda; leave --device out"):
        spread.__enter__()
