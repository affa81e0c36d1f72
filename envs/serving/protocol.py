"""What a world server and its clients have to say to one another: requests by op, replies, errors, and their limits.

`envs.serving.messages` puts it on the wire; docs/protocol.md is both in words. Nothing here needs torch.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from worldmodel.errors import WorldModelError

MAGIC = b"WMv1"
VERSION = 1
MAX_HEADER = 16 << 10
MAX_MESSAGE = 16 << 20  # bytes of one blob, and of all blobs of a message together
MAX_BLOBS = 8
MAX_NDIM = 6
MAX_DEPTH = 4
MAX_NAME = 128  # characters of an array's name
ID_BYTES = 16
SESSION_BYTES = 24  # the server's epoch (8), then the session's own 16
EPOCH_BYTES = 8
MAX_SEQ = (1 << 63) - 1
MAX_FORK = 256  # sessions at a time; their names must fit the header
MAX_IMAGINE = 1024  # chunks
MAX_DRAWS = 64
LIMITS = {
    "message": MAX_MESSAGE,
    "header": MAX_HEADER,
    "arrays": MAX_BLOBS,
    "fork": MAX_FORK,
    "imagine": MAX_IMAGINE,
    "draws": MAX_DRAWS,
}
"""What `hello` says of them, beside those of the server."""
NO_ID = bytes(ID_BYTES)

DTYPES = {name: np.dtype(name) for name in ("|u1", "|i1", "|b1", "<i2", "<i4", "<i8", "<f2", "<f4", "<f8")}
CODES = (
    "bad_frame",
    "bad_version",
    "too_large",
    "unauthorized",
    "no_session",
    "session_lost",
    "expired",
    "busy",
    "deadline",
    "conflict",
    "gap",
    "stale",
    "cancelled",
    "unsupported",
    "invalid",
    "internal",
)
WANTED = ("frames", "latent", "log_prob_map", "noise")
"""Arrays that a request may ask for beside the observation, with ``want``."""
IMAGINED = (
    "log_prob",
    "bits_per_dim",
    "action_gain",
    "sweeps",
    "residual",
    "context_frames",
    "reward",
    "termination",
)
"""Columns of the array ``scalars`` (T, 8) that `imagine` returns."""


class ServingError(WorldModelError):
    """A refusal, as it travels: one of `CODES` and a line for people.

    retry_after: seconds after which asking again makes sense, or None. correlation: what to look for in the
    server's log, for ``internal``.
    """

    def __init__(
        self, code: str, message: str, retry_after: float | None = None, correlation: str | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after = retry_after
        self.correlation = correlation

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.code, str(self), self.retry_after, self.correlation)


@dataclass(frozen=True)
class Op:
    """What a request of one kind may hold.

    session: it names a session. seq: it changes the session, so it carries the next sequence number. once: repeated
    under the same request id it gets the same reply. args: name to kind, see `_KINDS`; needs: those that it cannot do
    without. arrays: names; "action" also stands for "action/KEY".
    """

    session: bool = False
    seq: bool = False
    once: bool = False
    args: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    arrays: tuple[str, ...] = ()


_START = {"start": "text", "bank_index": "int", "snapshot": "handle", "prompt": "text"}
_RESET = {"seed": "int", **_START, "want": "names"}
OPS: dict[str, Op] = {
    "hello": Op(),
    "create": Op(
        once=True,
        args={
            "step_mode": "text",
            "observation": "text",
            "max_chunks": "int",
            "termination_threshold": "float",
            "guidance": "float",
            "temperature": "float",
            "context": "text",
            **_RESET,
        },
        arrays=("image", "clip"),
    ),
    "attach": Op(session=True, args={"want": "names"}),
    "reset": Op(session=True, seq=True, args=_RESET, arrays=("image", "clip")),
    "step": Op(session=True, seq=True, args={"text": "texts", "want": "names"}, arrays=("action",)),
    "observe": Op(
        session=True, seq=True, args={"text": "texts", "want": "names"}, arrays=("frames", "action")
    ),
    "restore": Op(session=True, seq=True, args={"snapshot": "handle", "want": "names"}, needs=("snapshot",)),
    "score": Op(session=True, args={"text": "texts", "draws": "int"}, arrays=("frames", "action")),
    "imagine": Op(session=True, args={"text": "sequences", "want": "names"}, arrays=("action",)),
    "snapshot": Op(session=True, once=True),
    "discard": Op(once=True, args={"snapshot": "handle"}, needs=("snapshot",)),
    "fork": Op(session=True, once=True, args={"n": "int"}),
    "close": Op(session=True, once=True),
    "renew": Op(args={"sessions": "handles", "snapshots": "handles"}),
    "sessions": Op(),
    "next": Op(session=True, args={"after": "int", "wait": "float", "jpeg": "int"}),
    "broadcast": Op(session=True, args={"on": "bool", "jpeg": "int"}),
    "cancel": Op(args={"request": "id"}),
    "stats": Op(),
}

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Request(NamedTuple):
    """A request as it was understood.

    id: 16 bytes, the client's. session: 24 bytes or None. seq: for the ops that change a session. deadline: seconds
    from its arrival, or None. args, arrays: see `OPS`; arrays are read-only views of the blobs.
    """

    op: str
    id: bytes = NO_ID
    session: bytes | None = None
    seq: int | None = None
    deadline: float | None = None
    args: Mapping[str, Any] = _NOTHING
    arrays: Mapping[str, np.ndarray] = _NOTHING


class Reply(NamedTuple):
    """A reply: result and arrays, or an error."""

    id: bytes = NO_ID
    result: Mapping[str, Any] = _NOTHING
    arrays: Mapping[str, np.ndarray] = _NOTHING
    error: ServingError | None = None


def new_id() -> bytes:
    """A request id."""
    return secrets.token_bytes(ID_BYTES)
