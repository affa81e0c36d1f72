from collections.abc import Iterator

import pytest

from envs.serving import server as front
from envs.serving.server import WorldServer
from envs.serving.world_backend import WorldBackend
from tests.envs.serving.machines import Clock
from worldmodel import WorldModel


@pytest.fixture(scope="session")
def toy_server(toy: WorldModel) -> Iterator[WorldServer]:
    """A server of the toy world in this process, without keys, on a free port."""
    with WorldServer(WorldBackend(toy), "tcp://127.0.0.1:*") as server:
        yield server


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that leases and deadlines of servers go by from here on."""
    clock = Clock()
    monkeypatch.setattr(front, "time", clock)
    return clock
