"""The protocol as pure functions: what is written can be read, and what was not written so is refused by its code."""

from __future__ import annotations

import random
import re
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from envs.serving import protocol
from envs.serving.actions import decode_action, encode_action
from envs.serving.messages import (
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
    join_frames,
    split_frame,
)
from envs.serving.protocol import (
    CODES,
    DTYPES,
    MAGIC,
    MAX_HEADER,
    MAX_MESSAGE,
    OPS,
    Reply,
    Request,
    ServingError,
    new_id,
)

ROOT = Path(__file__).parents[3]
SESSION = bytes(range(24))
VALUES: dict[str, Any] = {
    "int": 3,
    "float": 0.5,
    "bool": True,
    "text": "chunk",
    "texts": {"action/say": "left"},
    "sequences": {"action/say": ["left", "right"]},
    "names": ["frames", "noise"],
    "id": bytes(16),
    "handle": SESSION,
    "handles": [SESSION, SESSION],
}


def example(name: str) -> Request:
    """A request of each kind with every argument and array that it may have."""
    op = OPS[name]
    arrays = {key: np.arange(4, dtype=np.float32) for key in op.arrays}
    args = {key: VALUES[kind] for key, kind in op.args.items()}
    return Request(name, new_id(), SESSION if op.session else None, 7 if op.seq else None, 2.5, args, arrays)


def header(**changes: Any) -> dict[str, Any]:
    return {"v": 1, "op": "hello", "id": bytes(16), **changes}


def message(head: Any, *blobs: bytes) -> list[bytes]:
    return [MAGIC, head if isinstance(head, bytes) else msgpack.packb(head), *blobs]


def code(frames: list[Any]) -> str:
    with pytest.raises(ServingError) as caught:
        decode_request(frames)
    assert "\n" not in str(caught.value)
    assert caught.value.code in CODES
    return caught.value.code


@pytest.mark.parametrize("name", OPS)
def test_requests_come_back_as_they_went(name: str) -> None:
    sent = example(name)
    got = decode_request(encode_request(sent))
    assert (got.op, got.id, got.session, got.seq, got.deadline, got.args) == (
        sent.op,
        sent.id,
        sent.session,
        sent.seq,
        sent.deadline,
        sent.args,
    )
    assert {k: v.tolist() for k, v in got.arrays.items()} == {k: v.tolist() for k, v in sent.arrays.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3, 4), (1, 1, 1, 1, 1, 2)])
def test_arrays_of_every_kind(dtype: str, shape: tuple[int, ...]) -> None:
    array = (np.arange(int(np.prod(shape))) % 2).reshape(shape).astype(dtype)
    reply = decode_reply(encode_reply(Reply(new_id(), {"x": 1}, {"a": array})))
    assert reply.arrays["a"].dtype == array.dtype
    np.testing.assert_array_equal(reply.arrays["a"], array)
    assert not reply.arrays["a"].flags.writeable


def test_big_endian_and_strided_arrays_are_written_little_endian_and_contiguous() -> None:
    array = np.arange(12, dtype=">i4").reshape(3, 4)[:, ::2]
    got = decode_reply(encode_reply(Reply(new_id(), {}, {"a": array}))).arrays["a"]
    assert got.dtype.str == "<i4"
    np.testing.assert_array_equal(got, array)


def test_errors_come_back() -> None:
    error = decode_reply(encode_reply(Reply(new_id(), error=ServingError("busy", "full", 1.5, "abc")))).error
    assert error is not None
    assert (error.code, str(error), error.retry_after, error.correlation) == ("busy", "full", 1.5, "abc")


@pytest.mark.parametrize(
    "action",
    [
        np.float32([0.5]),
        3,
        "turn left",
        {"move": np.zeros((2, 3)), "a/b": {"~c": np.int64(1)}, "say": "go"},
    ],
)
def test_actions_come_back(action: Any) -> None:
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return value if isinstance(value, str) else np.asarray(value).tolist()

    assert plain(decode_action(*encode_action(action))) == plain(action)


@pytest.mark.parametrize(
    ("arrays", "texts"),
    [
        ({"action": 1, "action/x": 1}, {}),
        ({"action/x": 1, "action/x/y": 1}, {}),
        ({"action/x/y": 1, "action/x": 1}, {}),
        ({"action": 1}, {"action": "left"}),
        ({"action": 1}, {"elsewhere": "left"}),
        ({"action/1/2/3/4/5": 1}, {}),
    ],
)
def test_names_that_make_no_action(arrays: dict[str, int], texts: dict[str, str]) -> None:
    with pytest.raises(ServingError) as caught:
        decode_action({k: np.asarray(v) for k, v in arrays.items()}, texts)
    assert caught.value.code == "bad_frame"


def test_no_action_is_none() -> None:
    assert decode_action({"frames": np.zeros(1)}, {}) is None


def test_one_frame_holds_a_message() -> None:
    frames = encode_reply(Reply(new_id(), {"at": 1}, {"jpeg": np.arange(5, dtype=np.uint8)}))
    joined = join_frames(frames)
    assert decode_reply(split_frame(joined)).arrays["jpeg"].tolist() == [0, 1, 2, 3, 4]
    for cut in range(1, len(joined)):
        with pytest.raises(ServingError):
            decode_reply(split_frame(joined[:cut]))


# ---- what must be refused -------------------------------------------------------------------------------
@pytest.mark.parametrize("name", OPS)
def test_every_truncation_of_every_header(name: str) -> None:
    magic, head, *blobs = encode_request(example(name))
    for length in range(len(head)):
        assert code([magic, head[:length], *blobs]) == "bad_frame"


@pytest.mark.parametrize("name", OPS)
def test_every_missing_extra_or_shortened_part(name: str) -> None:
    frames = [bytes(f) for f in encode_request(example(name))]
    for i in range(len(frames)):
        assert code(frames[:i] + frames[i + 1 :]) == "bad_frame"
        assert code(frames[:i] + [frames[i][:-1]] + frames[i + 1 :]) == "bad_frame"
    assert code([*frames, b""]) == "bad_frame"
    assert code([*frames, *[b""] * 9]) == "too_large"


def mutations(count: int, seed: int) -> Any:
    """Valid messages with a few bytes changed, cut, doubled or put in."""
    rng = random.Random(seed)
    valid = [[bytes(f) for f in encode_request(example(name))] for name in OPS]
    for _ in range(count):
        frames = list(rng.choice(valid))
        for _ in range(rng.randint(1, 4)):
            i = min(rng.randrange(len(frames) + 1), len(frames) - 1)
            part, at = bytearray(frames[i]), rng.randrange(len(frames[i]) + 1)
            kind = rng.randrange(5)
            if kind == 0 and part:
                part[at % len(part)] = rng.randrange(256)
            elif kind == 1:
                del part[at:]
            elif kind == 2:
                part[at:at] = rng.randbytes(rng.randint(1, 9))
            elif kind == 3 and part:
                part[at % len(part)] ^= 1 << rng.randrange(8)
            else:
                frames.insert(i, bytes(part))
            frames[i] = bytes(part)
        yield frames


def decode_mutations(count: int, seed: int) -> int:
    refused = 0
    for frames in mutations(count, seed):
        try:
            decode_request(frames)
        except ServingError as error:
            assert error.code in ("bad_frame", "bad_version", "too_large", "unsupported")
            refused += 1
    return refused


def test_mutated_messages_are_refused_or_understood() -> None:
    assert decode_mutations(10_000, 0) > 8_000


@pytest.mark.slow
def test_a_hundred_thousand_mutated_messages() -> None:
    assert decode_mutations(100_000, 1) > 80_000


@pytest.mark.parametrize("length", [2**30, 2**31 - 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("kind", [0xC6, 0xC9, 0xDB, 0xDD, 0xDF], ids=["bin", "ext", "str", "array", "map"])
def test_huge_lengths_allocate_nothing(kind: int, length: int) -> None:
    tracemalloc.start()
    try:
        assert code(message(bytes([kind]) + struct.pack(">I", length) + b"\x00" * 100)) == "bad_frame"
        inside = b"\x81\xa4args" + bytes([kind]) + struct.pack(">I", length) + b"\x00" * 100
        assert code(message(inside)) == "bad_frame"
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", [2**30, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("rest", [[], [0], [2**32, 2**32], [2**64 - 1] * 5, [0, *[1 << 24] * 4]])
def test_huge_shapes(size: int, rest: list[int]) -> None:
    head = header(op="step", session=SESSION, seq=1, arrays=[["action", "<f4", [size, *rest]]])
    assert code(message(head, b"")) == "bad_frame"


def test_huge_integers_elsewhere() -> None:
    for value in (2**63, 2**64 - 1, -(2**63)):
        assert code(message(header(op="step", session=SESSION, seq=value))) == "bad_frame"
        assert code(message(header(op="fork", session=SESSION, args={"n": value}))) == "bad_frame"


def test_depth() -> None:
    for byte, close in ((b"\x91", b"\xc0"), (b"\x81\xa1a", b"\xc0")):
        for depth in (5, 100, 600, 1000, 3000):
            assert code(message(byte * depth + close)) == "bad_frame"
        assert code(message(byte * 100_000 + close)) == "too_large"
    assert code(message(header(args={"a": {"b": {"c": {}}}}))) == "bad_frame"
    assert "deeper" in _message(message(header(args={"a": {"b": {"c": {}}}})))


def _message(frames: list[Any]) -> str:
    with pytest.raises(ServingError) as caught:
        decode_request(frames)
    return str(caught.value)


def test_a_mebibyte_of_empty_maps_is_not_unpacked() -> None:
    frames = message(b"\x80" * (1 << 20))
    tracemalloc.start()
    try:
        assert code(frames) == "too_large"
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()


def test_duplicate_and_integer_keys() -> None:
    packed = msgpack.packb(header())
    twice = bytes([packed[0] + 1]) + packed[1:] + b"\xa2op\xa5hello"
    assert "once" in _message(message(twice))
    args = b"\xa4args\x82\xa1a\x01\xa1a\x02"
    assert "once" in _message(message(bytes([packed[0] + 1]) + packed[1:] + args))
    for key in (1, b"op", None, 1.5, True):
        assert code(message(msgpack.packb({**header(), key: 1}))) == "bad_frame"


@pytest.mark.parametrize("value", [msgpack.ExtType(1, b""), msgpack.ExtType(5, b"abc"), msgpack.Timestamp(1)])
def test_extension_types(value: Any) -> None:
    assert code(message(header(args={"x": value}))) == "bad_frame"


BAD_DTYPES = [
    "|O",
    "O",
    "|S4",
    "<U4",
    "<M8[s]",
    "|V8",
    ">f4",
    "f4",
    "float32",
    "<c8",
    "<f16",
    "<u2",
    "",
    "|b",
    "u1,u1",
]


@pytest.mark.parametrize("dtype", [*BAD_DTYPES, 1, None, b"<f4", ["<f4"]])
def test_every_bad_dtype(dtype: Any) -> None:
    head = header(op="step", session=SESSION, seq=1, arrays=[["action", dtype, [1]]])
    assert code(message(head, b"\x00" * 4)) == "bad_frame"


@pytest.mark.parametrize(
    "shape",
    [[2], [], [0], [-1], [1, -1, -1], [1.0], [True], ["1"], None, 1, {"a": 1}, [1] * 7, [1, None], [[1]]],
)
def test_every_bad_shape(shape: Any) -> None:
    head = header(op="step", session=SESSION, seq=1, arrays=[["action", "<f4", shape]])
    assert code(message(head, b"\x00" * (4 if shape != [] else 8))) == "bad_frame"


@pytest.mark.parametrize("name", ["", "x" * 129, "frames", "action2", "/action", "image/x", 3, None])
def test_every_bad_name_of_an_array(name: Any) -> None:
    head = header(op="step", session=SESSION, seq=1, arrays=[[name, "<f4", [1]]])
    assert code(message(head, b"\x00" * 4)) == "bad_frame"


def test_bools_are_zero_or_one() -> None:
    head = header(op="step", session=SESSION, seq=1, arrays=[["action", "|b1", [2]]])
    assert code(message(head, b"\x01\x02")) == "bad_frame"
    assert decode_request(message(head, b"\x01\x00")).arrays["action"].tolist() == [True, False]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"v": 2}, "bad_version"),
        ({"v": 0}, "bad_version"),
        ({"v": True}, "bad_version"),
        ({"v": "1"}, "bad_version"),
        ({"op": "shutdown"}, "unsupported"),
        ({"op": 3}, "bad_frame"),
        ({"op": ["hello"]}, "bad_frame"),
        ({"id": b"short"}, "bad_frame"),
        ({"id": "0123456789abcdef"}, "bad_frame"),
        ({"id": None}, "bad_frame"),
        ({"session": SESSION}, "bad_frame"),
        ({"seq": 1}, "bad_frame"),
        ({"op": "step"}, "bad_frame"),
        ({"op": "step", "session": SESSION}, "bad_frame"),
        ({"op": "step", "session": SESSION[:-1], "seq": 1}, "bad_frame"),
        ({"op": "step", "session": SESSION, "seq": 0}, "bad_frame"),
        ({"op": "step", "session": SESSION, "seq": 1.0}, "bad_frame"),
        ({"op": "step", "session": SESSION, "seq": True}, "bad_frame"),
        ({"deadline": 0}, "bad_frame"),
        ({"deadline": -1.0}, "bad_frame"),
        ({"deadline": float("nan")}, "bad_frame"),
        ({"deadline": float("inf")}, "bad_frame"),
        ({"deadline": "soon"}, "bad_frame"),
        ({"args": []}, "bad_frame"),
        ({"args": {"seed": 1}}, "bad_frame"),
        ({"op": "create", "args": {"seed": 1.5}}, "bad_frame"),
        ({"op": "create", "args": {"sed": 1}}, "bad_frame"),
        ({"op": "create", "args": {"guidance": float("nan")}}, "bad_frame"),
        ({"op": "create", "args": {"want": ["state"]}}, "bad_frame"),
        ({"op": "imagine", "session": SESSION, "args": {"text": {"action": "left"}}}, "bad_frame"),
        ({"op": "imagine", "session": SESSION, "args": {"text": {"action": ["left", 1]}}}, "bad_frame"),
        ({"op": "create", "args": {"snapshot": b"x"}}, "bad_frame"),
        ({"extra": 1}, "bad_frame"),
        ({"arrays": {}}, "bad_frame"),
        ({"arrays": [["action", "<f4", [1]]]}, "bad_frame"),
    ],
    ids=str,
)
def test_every_bad_field(changes: dict[str, Any], expected: str) -> None:
    assert code(message(header(**changes))) == expected


def test_other_protocols() -> None:
    assert code([]) == "bad_frame"
    assert code([MAGIC]) == "bad_frame"
    assert code([b"GET / HTTP/1.1", msgpack.packb(header())]) == "bad_frame"
    assert code([b"WMv1x", msgpack.packb(header())]) == "bad_frame"
    for head in (b"", b"\xc0", b"\x01", b"\x90", msgpack.packb([header()]), msgpack.packb("hello")):
        assert code(message(head)) == "bad_frame"


def test_too_large() -> None:
    head = header(op="step", session=SESSION, seq=1, arrays=[["action", "|u1", [MAX_MESSAGE + 1]]])
    assert code(message(head, bytes(MAX_MESSAGE + 1))) == "too_large"
    assert code(message(b"\x00" * (MAX_HEADER + 1))) == "too_large"
    with pytest.raises(ServingError) as caught:
        encode_reply(Reply(new_id(), {}, {"a": np.zeros(MAX_MESSAGE + 1, np.uint8)}))
    assert caught.value.code == "too_large"


@pytest.mark.parametrize(
    ("op", "args"),
    [("reset", {"prompt": "x" * 4097}), ("imagine", {"text": {"action": ["x"] * 513}})],
    ids=["text", "list"],
)
def test_what_no_server_could_read_is_refused_here(op: str, args: dict[str, Any]) -> None:
    """Its refusal would name no request, and who sent it would wait for an answer in vain."""
    with pytest.raises(ServingError, match=f"of {op} is too long .* give a shorter one") as caught:
        encode_request(Request(op, new_id(), SESSION, 1 if op == "reset" else None, args=args))
    assert caught.value.code == "too_large"


@pytest.mark.parametrize(
    "head",
    [
        {"v": 1, "id": bytes(16), "ok": True},
        {"v": 1, "id": bytes(16), "ok": 1, "result": {}},
        {"v": 1, "id": bytes(16), "ok": False, "code": "nonsense", "message": "x"},
        {"v": 1, "id": bytes(16), "ok": False, "code": "busy"},
        {"v": 1, "id": bytes(16), "ok": False, "code": "busy", "message": "x", "retry_after": float("nan")},
        {"v": 1, "id": bytes(16), "ok": False, "code": "busy", "message": "x", "correlation": 3},
        {"v": 1, "id": bytes(16), "ok": True, "result": {}, "more": 1},
        {"v": 9, "id": bytes(16), "ok": True, "result": {}},
    ],
)
def test_replies_that_are_none(head: dict[str, Any]) -> None:
    with pytest.raises(ServingError):
        decode_reply(message(head))


# ---- the page ------------------------------------------------------------------------------------------------
def test_the_page_names_every_op_argument_code_and_dtype() -> None:
    page = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
    rows = {m[1]: m[0] for m in re.finditer(r"^\| `(\w+)` \|.*$", page, re.MULTILINE)}
    for name, op in OPS.items():
        for word in [*op.args, *op.arrays]:
            known = word in ("want", "text") or word in protocol._START or word in ("image", "clip")
            assert known or word in rows[name], f"{name}: {word} is not in its row"
    for word in [*CODES, *DTYPES, *protocol.WANTED, MAGIC.decode()]:
        assert word in page


def test_the_protocol_needs_no_torch() -> None:
    script = "import sys, envs.serving.protocol; print('torch' in sys.modules, 'zmq' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]
