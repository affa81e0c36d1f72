"""The numbers of the public code: every golden vector is reproduced, and the checker itself can fail."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import golden_check

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.json"))
SMALL = "small_tc1_patch2"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A directory with the smaller golden model alone."""
    for path in GOLDEN.glob(f"{SMALL}.*"):
        shutil.copy(path, tmp_path)
    return tmp_path


def rewrite(directory: Path, key: str, value: torch.Tensor | None) -> None:
    path = directory / f"{SMALL}.vectors.safetensors"
    vectors = load_file(path)
    if value is None:
        del vectors[key]
    else:
        vectors[key] = value
    save_file(vectors, path)


@pytest.mark.parametrize("name", NAMES)
def test_every_vector_is_reproduced(name: str) -> None:
    found = golden_check.differences(GOLDEN, name)
    stored = set(load_file(GOLDEN / f"{name}.vectors.safetensors")) - golden_check.INPUTS
    assert set(found) == stored
    assert len(stored) >= 15
    assert all(math.isfinite(value) and value <= 1e-4 for value in found.values()), found


def test_exit_0_on_the_golden_vectors(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert golden_check.main([str(copy)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(SMALL in line for line in lines) == len(
        set(load_file(copy / f"{SMALL}.vectors.safetensors")) - golden_check.INPUTS
    )


def perturbations() -> dict[str, torch.Tensor]:
    vectors = load_file(GOLDEN / f"{SMALL}.vectors.safetensors")
    nudged = vectors["sample.i2v.cfg3.5"].clone()
    nudged[0, -1, 0, 0, 0] += 3e-4
    missing_frame = vectors["forward.z"][:, 1:].clone()
    broken = vectors["denoiser.output"].clone()
    broken[0, 0, 0, 0, 0] = math.nan
    return {
        "sample.i2v.cfg3.5": nudged,
        "forward.z": missing_frame,
        "denoiser.output": broken,
        "something.nobody.computes": torch.zeros(1),
    }


@pytest.mark.parametrize("key", sorted(perturbations()))
def test_exit_1_on_one_perturbed_vector(copy: Path, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(copy, key, perturbations()[key])
    assert golden_check.main([str(copy)]) == 1
    marked = [line for line in capsys.readouterr().out.splitlines() if "FAIL" in line]
    assert len(marked) == 1 and key in marked[0]


def test_exit_1_on_perturbed_weights(copy: Path) -> None:
    path = copy / f"{SMALL}.weights.safetensors"
    weights = load_file(path)
    weights["blocks.0.proj_out.bias"][0] += 0.1
    save_file(weights, path)
    assert golden_check.main([str(copy)]) == 1


def test_exit_2_where_there_is_nothing_to_check(tmp_path: Path, copy: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert golden_check.main([str(empty)]) == 2
    assert golden_check.main([str(tmp_path / "absent")]) == 2
    assert golden_check.main([]) == 2
    path = copy / f"{SMALL}.vectors.safetensors"
    save_file({k: v for k, v in load_file(path).items() if k in golden_check.INPUTS}, path)
    assert golden_check.main([str(copy)]) == 2


def test_the_command_of_the_readme(tmp_path: Path) -> None:
    script = Path(golden_check.__file__)
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1])}  # as if installed
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "no NAME.json" in done.stderr and "Traceback" not in done.stderr
