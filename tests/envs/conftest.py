from pathlib import Path

import pytest

from tests.toy import write_toy
from worldmodel import WorldModel


@pytest.fixture(scope="session")
def toy_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy world directory with one torque, as Pendulum's."""
    return write_toy(tmp_path_factory.mktemp("worlds") / "toy")


@pytest.fixture(scope="session")
def toy(toy_path: Path) -> WorldModel:
    return WorldModel.load(toy_path)
