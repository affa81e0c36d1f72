"""STARFlow-V as a world you can step: a causal normalizing-flow video model with exact likelihoods."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from worldmodel.errors import CheckpointError, ConfigError, DataError, InputError, WorldModelError
from worldmodel.sampling import Sampling

if TYPE_CHECKING:
    from worldmodel.state import WorldState
    from worldmodel.world import Chunk, Score, WorldModel

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "Chunk",
    "ConfigError",
    "DataError",
    "InputError",
    "Sampling",
    "Score",
    "WorldModel",
    "WorldModelError",
    "WorldState",
]

# Loaded at first use (PEP 562): the command line and the clients of a served world start without torch.
_HEAVY = {name: "worldmodel.world" for name in ("Chunk", "Score", "WorldModel")} | {
    "WorldState": "worldmodel.state"
}


def __getattr__(name: str) -> Any:
    if name not in _HEAVY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HEAVY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
