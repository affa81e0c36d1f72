"""All that the future of an environment depends on, as one frozen record and one file without pickle."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from envs.options import EnvOptions
from envs.turn import TOLD, Turn, session_seed
from worldmodel import CheckpointError, Chunk, InputError, WorldModel, WorldState
from worldmodel.files import load_metadata, load_tensors, save_tensors

SNAPSHOT_FORMAT = 1
_ARRAYS = ("frames", "latent")


@dataclass(frozen=True)
class Snapshot:
    """A `WorldModelEnv` at one moment; give it to `WorldModelEnv.restore` or to `reset(options={"snapshot":
    ...})`.

    state: the session. turn: the current chunk and how much of it was shown. chunk: the same with its maps
    and latents. rng: state of the environment's ``np_random``. world: fingerprint of the world it belongs to.
    """

    state: WorldState
    turn: Turn
    chunk: Chunk
    rng: dict[str, Any]
    world: str

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically. It also loads as a bare state, with
        `WorldModel.load_state`.

        Raises:
            CheckpointError: the file cannot be written; an older one is untouched.
        """
        with TemporaryDirectory() as folder:
            state = Path(folder) / "state"
            self.state.save(state, self.world)
            tensors, metadata = load_tensors(state), load_metadata(state)
        for field in fields(self.chunk):
            value = getattr(self.chunk, field.name)
            if value is not None:
                tensors[f"chunk.{field.name}"] = value
        turn = {k: v for k, v in asdict(self.turn).items() if k not in _ARRAYS}
        header = {"format": SNAPSHOT_FORMAT, "turn": turn, "rng": self.rng, "world": self.world}
        save_tensors(Path(path), tensors, {**metadata, "worldmodel_snapshot": json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Snapshot:
        """Read what `save` wrote.

        Raises:
            CheckpointError: not a snapshot, corrupt, or of another format version.
        """
        metadata = load_metadata(Path(path))
        if "worldmodel_snapshot" not in metadata:
            raise CheckpointError(f"{path}: not a saved snapshot; write one with Snapshot.save")
        tensors = load_tensors(Path(path))
        try:
            header = json.loads(metadata["worldmodel_snapshot"])
            if header["format"] != SNAPSHOT_FORMAT:
                raise CheckpointError(
                    f"{path}: snapshot format {header['format']}, expected {SNAPSHOT_FORMAT}"
                )
            chunk = Chunk(**{f.name: tensors.get(f"chunk.{f.name}") for f in fields(Chunk)})  # type: ignore[arg-type]
            frames, latent = chunk.frames[0].numpy(), chunk.latent[0].numpy()
            turn = Turn(frames=frames, latent=latent, **header["turn"])
            state = WorldState.load(path, header["world"], device)
            _check_turn(turn)
            np.random.PCG64().state = header["rng"]
            return cls(state, turn, chunk, header["rng"], header["world"])
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CheckpointError(f"{path}: not a saved snapshot ({error!r:.80})") from error


def _check_turn(turn: Turn) -> None:
    """Raise ValueError unless the parts of a turn fit one another."""
    numbers = (turn.reward, *turn.info.values())
    if not all(isinstance(x, int | float) and math.isfinite(x) for x in numbers):
        raise ValueError("a number that is none")
    if turn.frames.ndim != 4 or turn.latent.ndim != 3 or set(turn.info) != {*TOLD, "chunk"}:
        raise ValueError("frames, a latent or info of another form")
    if not (isinstance(turn.shown, int) and 1 <= turn.shown <= len(turn.frames)):
        raise ValueError(f"{turn.shown} of {len(turn.frames)} frames shown")
    if not (isinstance(turn.terminated, bool) and isinstance(turn.truncated, bool)):
        raise ValueError("a flag that is none")


def check_snapshot(world: WorldModel, snapshot: Any, options: EnvOptions) -> None:
    """Raise InputError unless an environment of this world with these options can go on from the snapshot."""
    if not isinstance(snapshot, Snapshot):
        raise InputError(f"snapshot is a {type(snapshot).__name__}, expected what env.snapshot() returned")
    if snapshot.world != world.fingerprint:
        raise InputError("the snapshot belongs to another world; restore it in the world that made it")
    chunk, turn = snapshot.chunk, snapshot.turn
    parts = [value for field in fields(Chunk) if (value := getattr(chunk, field.name)) is not None]
    pixels, latent = tuple(turn.frames.shape[1:]), (1, *world.latent_shape)
    fits = pixels == (*world.spec.frame_size, 3) and all(len(part) == 1 for part in parts)
    fits = fits and tuple(chunk.latent.shape) == latent and chunk.frames[0].shape == turn.frames.shape
    if snapshot.state.rows != 1 or not fits or world.misfits(snapshot.state):
        raise InputError(
            "the snapshot is not of frames of this world's size; restore it in the world that made it"
        )
    if options.step_mode == "chunk" and not snapshot.turn.over:
        raise InputError('the snapshot was taken inside a chunk; restore it with step_mode="frame"')


def continue_snapshot(
    world: WorldModel, snapshot: Any, options: EnvOptions, rng: np.random.Generator | None
) -> tuple[WorldState, Turn, Chunk, np.random.Generator]:
    """A snapshot as the start of an episode: chunk count 0, all frames of its chunk shown.

    With ``rng`` the session's noise from here on is drawn from it; with None it is the snapshot's own.

    Raises:
        InputError: as `check_snapshot`.
    """
    check_snapshot(world, snapshot, options)
    state, turn = world.adopt(snapshot.state), snapshot.turn
    turn = replace(
        turn,
        reward=0.0,
        terminated=False,
        truncated=False,
        info={**turn.info, "chunk": 0},
        shown=len(turn.frames),
    )
    if rng is None:
        rng = np.random.Generator(np.random.PCG64())
        rng.bit_generator.state = copy.deepcopy(snapshot.rng)
    else:
        state = state.reseed([session_seed(rng)])
    return state, turn, snapshot.chunk, rng
