from collections.abc import Iterator

import pytest

from envs.serving.server import WorldServer
from envs.serving.world_backend import WorldBackend
from worldmodel import WorldModel


@pytest.fixture(scope="session")
def toy_server(toy: WorldModel) -> Iterator[WorldServer]:
    """A server of the toy world in this process, without keys, on a free port."""
    with WorldServer(WorldBackend(toy), "tcp://127.0.0.1:*") as server:
        yield server
