"""Requests and replies on the wire: ``[magic, header, blob x <= 8]``, checked before anything of it is used.

The header is msgpack, at most `MAX_HEADER` bytes, strict and shallow; arrays travel as raw blobs that the header
describes. Nothing here needs torch.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgpack
import numpy as np

from envs.serving.protocol import (
    CODES,
    DTYPES,
    ID_BYTES,
    MAGIC,
    MAX_BLOBS,
    MAX_DEPTH,
    MAX_HEADER,
    MAX_MESSAGE,
    MAX_NAME,
    MAX_NDIM,
    MAX_SEQ,
    NO_ID,
    OPS,
    SESSION_BYTES,
    VERSION,
    WANTED,
    Reply,
    Request,
    ServingError,
)

_NAMES = {kind: name for name, kind in DTYPES.items()}
_LIMITS = {
    "strict_map_key": True,
    "max_str_len": 4096,
    "max_bin_len": 256,
    "max_array_len": 512,
    "max_map_len": 64,
    "max_ext_len": 0,
    "raw": False,
}
_KEYS = "keys of a map must be strings, each one once"
_REQUEST_KEYS = frozenset({"v", "op", "id", "session", "seq", "deadline", "args", "arrays"})
_REPLY_KEYS = frozenset(
    {"v", "id", "ok", "result", "arrays", "code", "message", "retry_after", "correlation"}
)


# ---- writing ------------------------------------------------------------------------------------------------------
def encode_request(request: Request) -> list[bytes | memoryview]:
    """The message frames of a request; blobs are views of its arrays, not copies.

    Raises:
        ServingError: an array of another dtype (``bad_frame``), a message, text or list over the limits (``too_large``),
            or an integer of more than 64 bits (``invalid``).
    """
    header: dict[str, Any] = {"v": VERSION, "op": request.op, "id": request.id}
    if request.session is not None:
        header["session"] = request.session
    if request.seq is not None:
        header["seq"] = request.seq
    if request.deadline is not None:
        header["deadline"] = request.deadline
    if request.args:
        header["args"] = dict(request.args)
    frames = _frames(header, request.arrays)
    try:
        msgpack.unpackb(frames[1], **_LIMITS)
    except ValueError as error:  # a server could not even read which request this is
        raise ServingError(
            "too_large", f"a text or a list of {request.op} is too long ({error}); give a shorter one"
        ) from error
    return frames


def encode_reply(reply: Reply) -> list[bytes | memoryview]:
    """The message frames of a reply; raises as `encode_request`."""
    header: dict[str, Any] = {"v": VERSION, "id": reply.id, "ok": reply.error is None}
    if reply.error is None:
        header["result"] = dict(reply.result)
        return _frames(header, reply.arrays)
    header |= {"code": reply.error.code, "message": str(reply.error)[:500]}
    for name in ("retry_after", "correlation"):
        if getattr(reply.error, name) is not None:
            header[name] = getattr(reply.error, name)
    return _frames(header, {})


def _frames(header: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> list[bytes | memoryview]:
    blobs = []
    described = []
    for name, value in arrays.items():
        array = value if value.flags.c_contiguous else np.ascontiguousarray(value)
        dtype = _NAMES.get(array.dtype)
        if dtype is None:
            dtype = array.dtype.newbyteorder("<").str if array.dtype.kind in "iufb" else str(array.dtype)
            if dtype not in DTYPES:
                raise ServingError(
                    "bad_frame", f"{name} has dtype {array.dtype}; expected one of {[*DTYPES]}"
                )
            array = array.astype(DTYPES[dtype])
        described.append((name, dtype, array.shape))
        blobs.append(array.reshape(-1).view(np.uint8).data if array.size else memoryview(b""))
    if described:
        header["arrays"] = described
    try:
        packed: bytes = msgpack.packb(header, use_bin_type=True)
    except OverflowError as error:
        raise ServingError("invalid", "an integer of more than 64 bits; give a smaller one") from error
    size = sum(blob.nbytes for blob in blobs)
    if len(packed) > MAX_HEADER or len(blobs) > MAX_BLOBS or size > MAX_MESSAGE:
        raise ServingError(
            "too_large",
            f"a message of {len(packed)} header bytes and {len(blobs)} arrays of {size} bytes together; at most "
            f"{MAX_HEADER}, {MAX_BLOBS} and {MAX_MESSAGE}; ask for less at a time",
        )
    return [MAGIC, packed, *blobs]


# ---- reading ------------------------------------------------------------------------------------------------------
def decode_request(frames: Sequence[Any]) -> Request:
    """A request from its message frames (bytes-like), every field checked before it is used.

    Raises:
        ServingError: ``bad_frame``, ``bad_version``, ``too_large`` or ``unsupported``; nothing was allocated but the
            header. Its attribute ``request_id`` is the request's, where that could be read.
    """
    header = _header(frames)
    request_id = _id_of(header)
    try:
        return _request(header, frames[2:])
    except ServingError as error:
        error.request_id = request_id  # type: ignore[attr-defined]
        raise


def decode_reply(frames: Sequence[Any]) -> Reply:
    """A reply from its message frames; raises as `decode_request`."""
    header = _header(frames)
    _version(header)
    if extra := set(header) - _REPLY_KEYS:
        raise _bad(f"unknown keys in the header: {sorted(extra)}")
    if header.get("ok") is True:
        result = header.get("result")
        if not isinstance(result, dict):
            raise _bad("a reply without a result")
        return Reply(_id_of(header), result, _arrays(header, frames[2:]))
    code, message = header.get("code"), header.get("message")
    if header.get("ok") is not False or code not in CODES or not isinstance(message, str) or len(frames) != 2:
        raise _bad("neither a result nor an error")
    retry, correlation = header.get("retry_after"), header.get("correlation")
    if not (retry is None or _is_float(retry)) or not (correlation is None or isinstance(correlation, str)):
        raise _bad("an error with malformed details")
    return Reply(_id_of(header), error=ServingError(code, message, retry, correlation))


def _bad(message: str) -> ServingError:
    return ServingError("bad_frame", message)


def _header(frames: Sequence[Any]) -> dict[str, Any]:
    if len(frames) < 2 or frames[0] != MAGIC:
        raise _bad(f"expected [{MAGIC!r}, header, blobs]; is this a worldmodel client?")
    if len(frames) > 2 + MAX_BLOBS:
        raise ServingError("too_large", f"{len(frames) - 2} blobs, at most {MAX_BLOBS}")
    if len(frames[1]) > MAX_HEADER:
        raise ServingError("too_large", f"a header of {len(frames[1])} bytes, at most {MAX_HEADER}")
    if sum(map(len, frames[2:])) > MAX_MESSAGE:
        raise ServingError("too_large", f"over {MAX_MESSAGE} bytes in one message")
    try:
        header = msgpack.unpackb(frames[1], **_LIMITS)
        if not isinstance(header, dict):
            raise _bad("the header is no map")
        _check_tree(header, MAX_DEPTH)
        if msgpack.packb(header) != frames[1]:  # not in its shortest form, or a key that is there twice
            msgpack.unpackb(frames[1], object_pairs_hook=_pairs, **_LIMITS)
    except ServingError:
        raise
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise _bad(f"the header is not what it should be ({' '.join(str(error).split())[:80]})") from None
    return header


def _pairs(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise _bad(_KEYS)
    return result


def _check_tree(value: dict[Any, Any] | list[Any], depth: int) -> None:
    """Keys are strings, and nothing is nested too deep."""
    if not depth:
        raise _bad(f"the header is nested deeper than {MAX_DEPTH}")
    if type(value) is dict:
        for key in value:
            if type(key) is not str:
                raise _bad(_KEYS)
        value = value.values()  # type: ignore[assignment]
    for item in value:
        if type(item) is dict or type(item) is list:
            _check_tree(item, depth - 1)


def _version(header: Mapping[str, Any]) -> None:
    if not _is_int(header.get("v")) or header["v"] != VERSION:
        raise ServingError("bad_version", f"protocol {header.get('v')!r:.20}; this side speaks {VERSION}")


def _id_of(header: Mapping[str, Any]) -> bytes:
    value = header.get("id")
    return value if isinstance(value, bytes) and len(value) == ID_BYTES else NO_ID


def _request(header: Mapping[str, Any], blobs: Sequence[Any]) -> Request:
    _version(header)
    if extra := set(header) - _REQUEST_KEYS:
        raise _bad(f"unknown keys in the header: {sorted(extra)}")
    if not _KINDS["id"](header.get("id")):
        raise _bad(f"id must be {ID_BYTES} bytes")
    name = header.get("op")
    if not isinstance(name, str):
        raise _bad("op must be a string")
    if name not in OPS:
        raise ServingError("unsupported", f"unknown op {name:.40}; known: {', '.join(OPS)}")
    op = OPS[name]
    session, seq, deadline = header.get("session"), header.get("seq"), header.get("deadline")
    if op.session != (session is not None) or (op.session and not _is_handle(session)):
        raise _bad(f"{name} takes {'a session of 24 bytes' if op.session else 'no session'}")
    if op.seq != (seq is not None) or (seq is not None and not (_is_int(seq) and 1 <= seq <= MAX_SEQ)):
        raise _bad(f"{name} takes {'a seq, an integer from 1' if op.seq else 'no seq'}")
    if deadline is not None and not (_is_float(deadline) and deadline > 0):
        raise _bad("deadline must be seconds above 0")
    args = header.get("args", {})
    if not isinstance(args, dict):
        raise _bad("args must be a map")
    for key, value in args.items():
        if key not in op.args:
            raise _bad(f"{name} takes no argument {key:.40}; known: {', '.join(op.args) or 'none'}")
        if value is not None and not _KINDS[op.args[key]](value):
            raise _bad(f"{name}: {key} must be of kind {op.args[key]}")
    for key in op.needs:
        if args.get(key) is None:
            raise _bad(f"{name} needs the argument {key}")
    arrays = _arrays(header, blobs)
    for key in arrays:
        if key.split("/")[0] not in op.arrays or ("/" in key and not key.startswith("action/")):
            raise _bad(f"{name} takes no array {key:.40}; known: {', '.join(op.arrays) or 'none'}")
    given = {k: v for k, v in args.items() if v is not None}
    return Request(
        name, header["id"], session, seq, None if deadline is None else float(deadline), given, arrays
    )


def _arrays(header: Mapping[str, Any], blobs: Sequence[Any]) -> dict[str, np.ndarray]:
    described = header.get("arrays", [])
    if not isinstance(described, list) or len(described) != len(blobs):
        raise _bad(f"{len(blobs)} blobs, another number of descriptions")
    arrays: dict[str, np.ndarray] = {}
    for item, blob in zip(described, blobs, strict=True):
        if not isinstance(item, list) or len(item) != 3:
            raise _bad("an array is described by [name, dtype, shape]")
        name, dtype, shape = item
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or name in arrays:
            raise _bad("names of arrays are short strings, each one once")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise _bad(f"{name}: dtype {dtype!r:.20} is not one of {', '.join(DTYPES)}")
        if not isinstance(shape, list) or len(shape) > MAX_NDIM or not all(map(_is_size, shape)):
            raise _bad(f"{name}: shape must have at most {MAX_NDIM} sizes from 0")
        kind = DTYPES[dtype]
        widest = math.prod(max(1, size) for size in shape)  # numpy counts so, where a size is 0
        if math.prod(shape) * kind.itemsize != len(blob) or widest > MAX_MESSAGE:
            raise _bad(f"{name}: {len(blob)} bytes for shape {shape} of {dtype}")
        array = np.frombuffer(blob, dtype=np.uint8)
        if kind == np.bool_ and (array > 1).any():
            raise _bad(f"{name}: a bool other than 0 and 1")
        arrays[name] = array.view(kind).reshape(shape)
        arrays[name].flags.writeable = False
    return arrays


def _is_handle(value: Any) -> bool:
    return isinstance(value, bytes) and len(value) == SESSION_BYTES


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return _is_int(value) and 0 <= value <= MAX_MESSAGE


def _is_float(value: Any) -> bool:
    return (isinstance(value, float) and math.isfinite(value)) or (_is_int(value) and abs(value) <= MAX_SEQ)


_KINDS: dict[str, Callable[[Any], bool]] = {
    "int": lambda v: _is_int(v) and abs(v) <= MAX_SEQ,
    "float": _is_float,
    "bool": lambda v: isinstance(v, bool),
    "text": lambda v: isinstance(v, str),
    "texts": lambda v: isinstance(v, dict) and all(isinstance(t, str) for t in v.values()),
    "sequences": lambda v: (
        isinstance(v, dict)
        and all(isinstance(s, list) and all(isinstance(t, str) for t in s) for s in v.values())
    ),
    "names": lambda v: isinstance(v, list) and all(isinstance(n, str) and n in WANTED for n in v),
    "id": lambda v: isinstance(v, bytes) and len(v) == ID_BYTES,
    "handle": _is_handle,
    "handles": lambda v: isinstance(v, list) and all(map(_is_handle, v)),
}
"""Argument kinds. handle: 24 bytes, a session or a snapshot. names: a list of `WANTED`. texts: a map of strings,
sequences: of lists of them.
"""


# ---- broadcasts: a whole message in one frame, so that a subscriber can keep only the newest --------------------------
def join_frames(frames: Sequence[bytes | memoryview]) -> bytes:
    """A message as one frame: for each of its frames, the length (uint32, little-endian) and the bytes."""
    return b"".join(part for frame in frames for part in (struct.pack("<I", len(frame)), frame))


def split_frame(data: Any) -> list[memoryview]:
    """The frames that `join_frames` joined.

    Raises:
        ServingError: ``bad_frame``: lengths that do not add up. ``too_large``: too many frames.
    """
    view, at = memoryview(data), 0
    frames: list[memoryview] = []
    while at < len(view):
        if len(frames) > 2 + MAX_BLOBS:
            raise ServingError("too_large", f"over {MAX_BLOBS} blobs in one message")
        end = at + 4 + int.from_bytes(view[at : at + 4], "little")
        if at + 4 > len(view) or end > len(view):
            raise _bad("a broadcast whose lengths do not add up")
        frames.append(view[at + 4 : end])
        at = end
    return frames
