"""What a client holds of a server's things: its world, and turns, chunks, scores and snapshots of a session there.

Names and axes are those of the local classes; arrays are NumPy's, and nothing here needs torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces

from envs.options import EnvOptions
from envs.serving.connection import Connection
from envs.serving.protocol import ServingError
from worldmodel.condition.spaces import space_from_json


@dataclass(frozen=True)
class RemoteWorld:
    """What a server says of its world.

    frame_size: (height, width) pixels; chunk_frames: F; latent_shape: (C, h, w).
    """

    name: str
    fingerprint: str
    frame_size: tuple[int, int]
    chunk_frames: int
    latent_shape: tuple[int, ...]
    fps: float
    action_space: spaces.Space[Any]

    @classmethod
    def ask(cls, connection: Connection) -> RemoteWorld:
        """Ask the server; the connection learns how long a lease is, and what it serves.

        Raises:
            ServingError: no answer, or one that is none.
        """
        reply = connection.ask("hello")
        said = reply.result
        try:
            space = space_from_json(json.loads(reply.arrays["action_space"].tobytes().decode()))
            height, width = said["frame_size"]
            connection.lease = float(said["lease"])
            connection.serves = bytes(said["epoch"]), str(said["fingerprint"])
            return cls(
                str(said["world"]),
                str(said["fingerprint"]),
                (int(height), int(width)),
                int(said["chunk_frames"]),
                tuple(int(n) for n in said["latent_shape"]),
                float(said["fps"]),
                space,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ServingError(
                "bad_frame", f"{connection.url}: not a world server's hello: {error!r}"
            ) from error

    def observation_space(self, options: EnvOptions) -> spaces.Box:
        """As that of a local environment with these options."""
        if options.observation == "latent":
            return spaces.Box(-np.inf, np.inf, self.latent_shape, np.float32)
        frames = (self.chunk_frames,) if options.step_mode == "chunk" else ()
        return spaces.Box(0, 255, (*frames, *self.frame_size, 3), np.uint8)


@dataclass(frozen=True)
class RemoteTurn:
    """A session's current turn: what `step` returns, read-only arrays, and those that were asked for beside."""

    observation: np.ndarray
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]
    arrays: Mapping[str, np.ndarray]

    def outcome(self) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """What `Env.step` returns; a copy."""
        return self.observation.copy(), self.reward, self.terminated, self.truncated, dict(self.info)


@dataclass(frozen=True)
class RemoteChunk:
    """As `worldmodel.Chunk` with B = 1, in NumPy arrays; reward and termination (a probability) are None where the
    server did not say.
    """

    frames: np.ndarray
    latent: np.ndarray
    log_prob: np.ndarray
    bits_per_dim: np.ndarray
    action_gain: np.ndarray
    log_prob_map: np.ndarray
    noise: np.ndarray
    sweeps: np.ndarray
    residual: np.ndarray
    context_frames: np.ndarray
    reward: np.ndarray | None = None
    termination: np.ndarray | None = None


@dataclass(frozen=True)
class RemoteScore:
    """As `worldmodel.Score` with B = 1, in NumPy arrays (1,) float64."""

    log_prob: np.ndarray
    rate: np.ndarray
    bits_per_dim: np.ndarray
    action_gain: np.ndarray
    noise_square: np.ndarray


@dataclass(frozen=True)
class RemoteSnapshot:
    """A moment that the server keeps, for any environment of the same key; discarded with the last reference to it.

    handle: 24 bytes. nbytes: what it holds on the server.
    """

    handle: bytes
    nbytes: int
