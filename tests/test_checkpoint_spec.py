"""`read_spec` reads world.json alone."""

import json
from pathlib import Path

import pytest

from tests.toy import write_toy
from worldmodel import ConfigError, checkpoint
from worldmodel.checkpoint import find_world, read_spec, read_world
from worldmodel.errors import CheckpointError


def test_spec_needs_no_weights(tmp_path: Path) -> None:
    world = write_toy(tmp_path / "toy")
    expected = read_world(world).spec
    for file in world.glob("*.safetensors"):
        file.unlink()
    assert read_spec(world) == expected


@pytest.mark.parametrize("content", ["[]", json.dumps({"format": 99}), "3"])
def test_not_a_spec(tmp_path: Path, content: str) -> None:
    (tmp_path / "world.json").write_text(content)
    with pytest.raises(ConfigError):
        read_spec(tmp_path)


def test_a_package_without_worlds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHIPPED", tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no such directory"):
        find_world("pendulum")
