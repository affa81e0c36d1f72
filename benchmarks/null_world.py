"""A world without a model: sessions that count. For measuring a server, and for breaking it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence

import numpy as np

from envs.serving.protocol import Request, ServingError
from envs.serving.worker import Finished, Job, Outcome, internal_error

FAIL = 13.0
"""An action at which the null model raises."""


class NullBackend:
    """See `envs.serving.worker.Backend`. Actions are Box(1); ``info["chunk"]`` counts the steps since a reset.

    Args:
        stamped: the first 32 bytes of an observation are the session's name and the count (int64); else every
            observation is one array of zeros, which costs nothing to make.
        seconds: what a round takes.
    """

    def __init__(
        self,
        frame_size: tuple[int, int] = (16, 16),
        chunk_frames: int = 4,
        stamped: bool = True,
        seconds: float = 0.0,
        session_bytes: int = 1000,
    ) -> None:
        self.facts = {
            "world": "null",
            "fingerprint": "0" * 64,
            "frame_size": list(frame_size),
            "chunk_frames": chunk_frames,
            "latent_shape": [1, 1, 1],
            "fps": 20.0,
            "sampling": {"guidance": 0.0, "temperature": 1.0, "context": "reencode"},
        }
        bounds = {"low": ["-inf"], "high": ["inf"]}
        self.action_space = json.dumps({"kind": "Box", "shape": [1], "dtype": "float32", **bounds}).encode()
        self.session_bytes = session_bytes
        self.going_on = False
        self.counts: dict[bytes, int] = {}
        self.snapshots: dict[bytes, int] = {}
        self.steps = 0
        self._stamped = stamped
        self._seconds = seconds
        self._frames = np.zeros((chunk_frames, *frame_size, 3), np.uint8)

    def short(self, request: Request) -> bool:
        """Everything is."""
        return True

    def run(self, jobs: Sequence[Job]) -> list[Finished]:
        """One round."""
        if self._seconds:
            time.sleep(self._seconds)
        return [(job, job.begin(time.monotonic()) or self._one(job)) for job in jobs]

    def _one(self, job: Job) -> Outcome | ServingError:
        request, counts = job.request, self.counts
        name = request.session or b""
        if request.op == "create":
            name = job.made[0]
            counts[name] = 0
        elif request.op == "discard":
            self.snapshots.pop(request.args["snapshot"], None)
            return Outcome()
        elif name not in counts:
            return ServingError("no_session", "no such session")
        elif request.op == "close":
            del counts[name]
            return Outcome()
        elif request.op == "snapshot":
            self.snapshots[job.made[0]] = counts[name]
            return Outcome({"snapshot": job.made[0], "nbytes": 8})
        elif request.op == "fork":
            counts |= dict.fromkeys(job.made, counts[name])
        elif request.op == "reset":
            counts[name] = 0
        elif request.op == "restore":
            counts[name] = self.snapshots[request.args["snapshot"]]
        elif request.op == "step":
            if request.arrays["action"][0] == FAIL:
                return internal_error(RuntimeError("the null model was told to fail"))
            counts[name] += 1
            self.steps += 1
        elif request.op != "attach":
            return ServingError("unsupported", f"the null world does not {request.op}")
        return self._turn(name, {"sessions": list(job.made)} if request.op == "fork" else {}, request.arrays)

    def _turn(self, name: bytes, more: dict[str, object], arrays: Mapping[str, np.ndarray]) -> Outcome:
        frames, count = self._frames, self.counts[name]
        if self._stamped:
            frames = frames.copy()
            frames.reshape(-1)[:32] = np.frombuffer(name + count.to_bytes(8, "little"), np.uint8)
        info = {"log_prob": 0.0, "bits_per_dim": 0.0, "chunk": count}
        result = {"reward": 0.0, "terminated": False, "truncated": False, "info": info, **more}
        return Outcome(result, {"observation": frames}, frames, arrays.get("action"))
