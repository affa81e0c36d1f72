from __future__ import annotations

import pytest
from gymnasium import spaces

from tests.toy import BOX, toy_world
from worldmodel import WorldModel


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> WorldModel:
    """Box actions."""
    return toy_world(tmp_path_factory.mktemp("box") / "toy")


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> WorldModel:
    """A Dict of a Box and three choices."""
    return toy_world(
        tmp_path_factory.mktemp("mixed") / "toy", spaces.Dict({"push": BOX, "gear": spaces.Discrete(3)})
    )


@pytest.fixture(scope="session")
def discrete(tmp_path_factory: pytest.TempPathFactory) -> WorldModel:
    """Three choices, numbered from 1."""
    return toy_world(tmp_path_factory.mktemp("discrete") / "toy", spaces.Discrete(3, start=1))
