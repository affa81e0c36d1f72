"""The package's errors. Messages are one line: what was wrong, what was expected, what to do."""

from __future__ import annotations


class WorldModelError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(WorldModelError):
    """A configuration that cannot be used: an unknown or missing key, or a value out of range."""


class CheckpointError(WorldModelError):
    """A file of weights or state that is missing, corrupt, truncated or does not fit."""


class InputError(WorldModelError, ValueError):
    """An argument of the wrong shape, dtype or range."""


class DataError(WorldModelError):
    """A dataset that is missing, corrupt, or not what its description says."""


class TrainingError(WorldModelError):
    """A training that cannot go on: the loss or the gradient is not finite."""
