"""STARFlow-V as a world you can step: a causal normalizing-flow video model with exact likelihoods."""

from worldmodel.errors import CheckpointError, ConfigError, DataError, InputError, WorldModelError
from worldmodel.sampling import Sampling
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
