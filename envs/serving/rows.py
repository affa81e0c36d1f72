"""What the sessions of a world are on its server, and what a job asks of a forward pass: one row of it, or a row of
each of many.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from envs.options import EnvOptions, batch_of_one
from envs.serving.actions import decode_action
from envs.serving.batches import Slot, first_row, kinds
from envs.serving.protocol import IMAGINED, MAX_IMAGINE, MAX_MESSAGE, ServingError
from envs.serving.worker import Job, Outcome
from envs.snapshot import Snapshot
from envs.turn import Start, Turn
from worldmodel import Chunk, WorldModel
from worldmodel.chunk import actions_at
from worldmodel.condition.spaces import pack_actions, prompts_of
from worldmodel.inputs import chunks_given


@dataclass(frozen=True)
class Session:
    """An environment: its options, where its state is, its current chunk and its random stream.

    chunk: the chunk (B = 1) with its maps and latents, sharing no memory with those of other sessions.
    """

    world: WorldModel
    options: EnvOptions
    max_chunks: int | None
    slot: Slot
    turn: Turn
    chunk: Chunk
    rng: np.random.Generator

    def snapshot(self) -> Snapshot:
        """As `WorldModelEnv.snapshot`."""
        return Snapshot(
            self.slot.state(),
            self.turn,
            self.chunk,
            dict(copy.deepcopy(self.rng.bit_generator.state)),
            self.world.fingerprint,
        )


@dataclass(eq=False)
class Row:
    """What one job asks of a forward pass; ``key`` says who may share it."""

    job: Job
    key: tuple[Any, ...]
    session: Session
    action: Any = None
    frames: np.ndarray | None = None
    start: Start | None = None
    seed: int = 0
    draws: int = 1
    plan: Imagination | None = None


@dataclass(eq=False)
class Imagination:
    """A job that takes as many rounds as it has chunks; ``chunks`` (B = 1) are those done."""

    job: Job
    session: Session
    slot: Slot
    actions: Any
    horizon: int
    chunks: list[Chunk] = field(default_factory=list)

    @classmethod
    def of(cls, job: Job, session: Session) -> Imagination:
        """What a request asks for.

        Raises:
            InputError: no sequence of actions of the world's space. ServingError: ``too_large``.
        """
        request, world = job.request, session.world
        lifted = batch_of_one(
            world.spec.action_space, decode_action(request.arrays, request.args.get("text", {}))
        )
        horizon = chunks_given(lifted)
        sizes = {
            "frames": math.prod(world.frames_shape),
            "latent": 4 * math.prod(world.latent_shape),
            "noise": 4 * math.prod(world.latent_shape),
            "log_prob_map": 4 * math.prod(world.latent_shape[1:]),
        }
        each = sum(sizes[name] for name in {"frames", *request.args.get("want", ())})
        most = min(MAX_IMAGINE, (MAX_MESSAGE - (64 << 10)) // each)
        if horizon > most:
            raise ServingError("too_large", f"{horizon} chunks at once, at most {most}; imagine fewer")
        if world.actions is not None:
            pack_actions(world.spec.action_space, first_row(lifted), horizon)
        prompts_of(world.spec.action_space, first_row(lifted), horizon)
        return cls(job, session, session.slot, lifted, horizon)

    def row(self) -> Row:
        """Its next chunk."""
        action = actions_at(self.actions, len(self.chunks))
        key = ("step", self.session.world.spec.sampling, kinds(action))
        return Row(self.job, key, replace(self.session, slot=self.slot), action, plan=self)

    def took(self, slot: Slot, chunk: Chunk) -> Outcome | None:
        """Go on from there; the outcome with the last chunk."""
        self.slot = slot
        self.chunks.append(chunk)
        if len(self.chunks) < self.horizon:
            return None

        def stack(name: str) -> np.ndarray:
            return np.concatenate([getattr(c, name).cpu().numpy() for c in self.chunks])

        arrays = {
            "frames": stack("frames"),
            "scalars": np.stack([stack(name).astype(np.float64) for name in IMAGINED], axis=1),
        }
        arrays |= {n: stack(n) for n in self.job.request.args.get("want", ()) if n != "frames"}
        return Outcome({"horizon": self.horizon}, arrays)
