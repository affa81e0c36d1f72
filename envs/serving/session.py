"""A session on a world server as its client holds it: the next sequence number, the current turn, the requests.

Each verb comes in two halves, a `Call` that is put on its way and the acceptance of its reply, so that one
environment waits for one and a batch has many under way. Names and axes are those of the local classes; arrays are
NumPy's, and nothing here needs torch.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from gymnasium.error import ResetNeeded

from envs.options import EnvOptions, check_reset_options
from envs.serving.actions import encode_action
from envs.serving.connection import Call, Connection, Unanswered
from envs.serving.protocol import IMAGINED, MAX_SEQ, WANTED, Reply, ServingError
from envs.serving.remote import RemoteChunk, RemoteScore, RemoteSnapshot, RemoteTurn
from worldmodel.errors import InputError

LOST = ("no_session", "session_lost", "expired")
"""Codes after which a session is gone for good."""


class RemoteSession:
    """One session, or none yet. ``id`` is None before the first reset and after the session was lost."""

    def __init__(
        self, connection: Connection, options: EnvOptions, max_chunks: int | None, want: tuple[str, ...] = ()
    ) -> None:
        self.connection = connection
        self.options = options
        self.max_chunks = max_chunks
        self.want = list(want)
        self.id: bytes | None = None
        self.seq = 0
        self.turn: RemoteTurn | None = None
        self.unsettled = False  # whether the last request was run is not known
        self._release: weakref.finalize[Any, Any] | None = None

    def adopt(self, session: bytes, seq: int, turn: RemoteTurn | None) -> None:
        """Go on with a session that the server has; it is kept alive, and closed with the last reference to it."""
        self.leave()
        self.id, self.seq, self.turn, self.unsettled = session, seq, turn, False
        self.connection.hold(session)
        self._release = weakref.finalize(self, self.connection.drop, session, True)

    def leave(self) -> None:
        """Forget the session; the server keeps it for the rest of its lease."""
        if self._release is not None and self.id is not None:
            self._release.detach()
            self.connection.drop(self.id, False)
        self.id = self.turn = self._release = None
        self.unsettled = False

    def current(self) -> RemoteTurn:
        """The turn. Raises ResetNeeded before the first reset."""
        if self.turn is None:
            raise ResetNeeded("call env.reset() first")
        return self.turn

    # ---- what changes a session ---------------------------------------------------------------------------------
    def start_reset(self, seed: int | None, options: Mapping[str, Any] | None) -> Call:
        """A reset; it makes the session where there is none.

        Raises:
            InputError: an option that is unknown or cannot be sent.
        """
        args, arrays = _start(options)
        args |= {"seed": None if seed is None else _carried(seed, "seed"), "want": self.want}
        if self.unsettled:
            self._resettle()
        if self.id is not None:
            return self._change("reset", args, arrays)
        o = self.options
        horizon = None if self.max_chunks is None else _carried(self.max_chunks, "max_chunks")
        args |= {"step_mode": o.step_mode, "observation": o.observation, "max_chunks": horizon}
        args |= {"termination_threshold": float(o.termination_threshold), "context": o.context}
        args |= {"guidance": o.guidance, "temperature": o.temperature}
        return self._put("create", args=args, arrays=arrays)

    def start_step(self, action: Any) -> Call:
        """A step.

        Raises:
            InputError: an action that cannot be sent. ResetNeeded.
        """
        if action is None:
            raise InputError("action is None, expected one of the action space")
        arrays, texts = _sendable(action)
        return self._change("step", {"text": texts or None, "want": self.want}, arrays)

    def start_observe(self, frames: Any, action: Any) -> Call:
        """A real chunk; raises as `start_step`."""
        arrays, texts = _sendable(action) if action is not None else ({}, {})
        arrays = {"frames": _array(frames, "frames"), **arrays}
        return self._change("observe", {"text": texts or None, "want": self.want}, arrays)

    def start_restore(self, snapshot: Any) -> Call:
        """A return to a snapshot.

        Raises:
            InputError: no snapshot of a server. ResetNeeded.
        """
        return self._change("restore", {"snapshot": _handle(snapshot), "want": self.want}, {})

    def accept(self, call: Call) -> RemoteTurn:
        """Take in the reply to one of the above.

        Raises:
            InputError: the world refuses it. ServingError: any other failure. After `Unanswered` the request may or
            may not have been run, and `resume` tells.
        """
        assert call.reply is not None
        reply, op = call.reply, call.request.op
        if reply.error is None:
            turn = _turn(reply)
            if op == "create":
                self._check_world(reply.result["session"])
                self.adopt(reply.result["session"], int(reply.result["seq"]), turn)
            else:
                self.seq, self.turn, self.unsettled = int(reply.result["seq"]), turn, False
            return turn
        if not isinstance(reply.error, Unanswered):
            self.unsettled = False
            if reply.error.code in LOST and "snapshot" not in call.request.args:
                self.leave()  # else it may be the snapshot that is not there
        raise _as_local(reply.error)

    def _check_world(self, session: bytes) -> None:
        """Raise ServingError where a server that has begun anew serves another world than the one that was told of."""
        epoch, fingerprint = self.connection.serves
        if session.startswith(epoch):
            return
        said = self.connection.ask("hello").result
        if said["fingerprint"] != fingerprint:
            self.connection.drop(session, close=True)
            raise ServingError(
                "session_lost",
                f"{self.connection.url} serves another world now, {said['world']}; make another environment of it",
            )
        self.connection.serves = said["epoch"], fingerprint

    def resume(self) -> RemoteTurn:
        """Ask the server where the session stands, and go on from there.

        Raises:
            ResetNeeded: there is no session. ServingError: as `accept`.
        """
        self.turn = self._attached()
        self.unsettled = False
        return self.turn

    def _resettle(self) -> None:
        """Find the sequence number again before a reset; a session that is gone needs none."""
        try:
            self.resume()
        except ServingError:
            if self.id is not None:
                raise

    def _change(self, op: str, args: dict[str, Any], arrays: dict[str, np.ndarray]) -> Call:
        self.current()
        if self.unsettled:
            raise Unanswered(
                "conflict",
                "whether the last request was run is not known; call resume() to go on from where the session stands",
            )
        call = self._put(op, session=self.id, seq=self.seq + 1, args=args, arrays=arrays)
        self.unsettled = True
        return call

    def _put(self, op: str, **fields: Any) -> Call:
        try:
            return self.connection.start(op, **fields)
        except ServingError as error:
            raise _as_local(error) from error

    # ---- what leaves it as it is ----------------------------------------------------------------------------------
    def ask(self, op: str, args: dict[str, Any] | None = None, arrays: Any = None) -> Reply:
        """One request about this session.

        Raises:
            InputError: the world refuses it. ServingError: any other failure. ResetNeeded.
        """
        if self.id is None:
            raise ResetNeeded("call env.reset() first")
        try:
            return self.connection.ask(op, session=self.id, args=args or {}, arrays=arrays or {})
        except ServingError as error:
            if error.code in LOST and not isinstance(error, Unanswered):
                self.leave()
            raise _as_local(error) from error

    def _attached(self, *want: str) -> RemoteTurn:
        reply = self.ask("attach", {"want": [*self.want, *want]})
        self.seq = int(reply.result["seq"])
        return _turn(reply)

    def chunk(self) -> RemoteChunk:
        """The current chunk with all its arrays."""
        turn = self._attached(*(name for name in WANTED if name not in self.want))
        a = {name: turn.arrays[name][None] for name in WANTED}
        counts = {k: np.array([turn.info[k]]) for k in ("sweeps", "context_frames")}
        numbers = {
            k: np.array([turn.info[k]]) for k in ("log_prob", "bits_per_dim", "action_gain", "residual")
        }
        return RemoteChunk(**a, **counts, **numbers)

    def score(self, frames: Any, action: Any, draws: int) -> RemoteScore:
        """See `WorldModelEnv.score`."""
        arrays, texts = _sendable(action) if action is not None else ({}, {})
        said = self.ask(
            "score",
            {"text": texts or None, "draws": int(draws)},
            {"frames": _array(frames, "frames"), **arrays},
        ).result
        return RemoteScore(**{k: np.array([said[k]], np.float64) for k in RemoteScore.__dataclass_fields__})

    def imagine(self, actions: Any) -> list[RemoteChunk]:
        """See `WorldModelEnv.imagine`."""
        arrays, texts = _sendable(actions, sequence=True)
        got = self.ask("imagine", {"text": texts or None, "want": [*WANTED[1:]]}, arrays).arrays
        counts = ("sweeps", "context_frames")
        return [
            RemoteChunk(
                **{name: got[name][t : t + 1] for name in WANTED},
                **{
                    name: got["scalars"][t, i : i + 1].astype(np.int64 if name in counts else np.float64)
                    for i, name in enumerate(IMAGINED)
                },
            )
            for t in range(len(got["scalars"]))
        ]

    def snapshot(self) -> RemoteSnapshot:
        """See `WorldModelEnv.snapshot`."""
        said = self.ask("snapshot").result
        snapshot = RemoteSnapshot(bytes(said["snapshot"]), int(said["nbytes"]))
        self.connection.hold_snapshot(snapshot.handle)
        weakref.finalize(snapshot, self.connection.discard, snapshot.handle)
        return snapshot

    def fork(self, n: int) -> list[RemoteSession]:
        """See `WorldModelEnv.fork`."""
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise InputError(f"fork({n!r}): expected an integer of at least 1")
        self.current()
        reply = self.ask("fork", {"n": n})
        children = []
        for handle in reply.result["sessions"]:
            child = RemoteSession(self.connection, self.options, self.max_chunks, tuple(self.want))
            child.adopt(
                bytes(handle), 0, _turn(reply)
            )  # where it stands there, whatever was heard of it here
            children.append(child)
        return children

    def close(self) -> None:
        """See `close_all`."""
        close_all([self])


def settle(sessions: Sequence[RemoteSession], calls: Sequence[Call]) -> None:
    """Wait for one call of each session; all are under way at the same time, over whatever connections."""
    by_connection: dict[Connection, list[Call]] = {}
    for session, call in zip(sessions, calls, strict=True):
        by_connection.setdefault(session.connection, []).append(call)
    for connection, own in by_connection.items():
        connection.settle(own)


def exchange(sessions: Sequence[RemoteSession], starts: Sequence[Callable[[], Call]]) -> list[Call]:
    """One call of each session, settled. Where one cannot be started, those that were are taken in all the same.

    Raises:
        InputError, ServingError: as the one that cannot be started.
    """
    calls: list[Call] = []
    try:
        for start in starts:
            calls.append(start())
    except (InputError, ServingError):
        begun = sessions[: len(calls)]
        settle(begun, calls)
        with contextlib.suppress(InputError, ServingError):
            accept_all(begun, calls)
        raise
    settle(sessions, calls)
    return calls


def close_all(sessions: Sequence[RemoteSession]) -> None:
    """Close sessions on their servers too, where those are there and answer within 2 s."""
    there = [session for session in sessions if session.id is not None]
    calls = []
    for session in there:
        call = session.connection.start("close", 2.0, session=session.id)
        if not session.connection.connected:
            call.deadline = 0.0
        session.leave()
        calls.append(call)
    settle(there, calls)


def accept_all(sessions: Sequence[RemoteSession], calls: Sequence[Call]) -> list[RemoteTurn]:
    """Take in every reply, then raise for the first that failed; see `RemoteSession.accept`."""
    turns, failures = [], []
    for session, call in zip(sessions, calls, strict=True):
        try:
            turns.append(session.accept(call))
        except (InputError, ServingError) as error:
            failures.append(error)
    if failures:
        raise failures[0]
    return turns


def reset_all(
    sessions: Sequence[RemoteSession], seeds: Sequence[int | None], options: Mapping[str, Any] | None
) -> list[RemoteTurn]:
    """Reset sessions at the same time; where one was lost, a new one begins.

    Raises:
        InputError, ServingError: as `RemoteSession.start_reset` and `accept`.
    """
    starts = [partial(s.start_reset, seed, options) for s, seed in zip(sessions, seeds, strict=True)]
    calls = exchange(sessions, starts)
    gone = [i for i, call in enumerate(calls) if _gone(call)]
    for i in gone:
        sessions[i].leave()
    again = exchange([sessions[i] for i in gone], [starts[i] for i in gone])
    for i, call in zip(gone, again, strict=True):
        calls[i] = call
    return accept_all(sessions, calls)


def _gone(call: Call) -> bool:
    """Whether a reset found no session."""
    error = None if call.reply is None else call.reply.error
    if error is None or isinstance(error, Unanswered):
        return False
    return error.code in LOST and call.request.op == "reset" and "snapshot" not in call.request.args


def _carried(value: int, name: str) -> int:
    if abs(value) > MAX_SEQ:
        raise InputError(f"{name} is {value}, expected an integer below 2^63 for a served world")
    return value


def _turn(reply: Reply) -> RemoteTurn:
    said, arrays = reply.result, dict(reply.arrays)
    return RemoteTurn(
        arrays.pop("observation"),
        float(said["reward"]),
        bool(said["terminated"]),
        bool(said["truncated"]),
        dict(said["info"]),
        arrays,
    )


def _as_local(error: ServingError) -> Exception:
    """The error that a local environment would raise, where there is one."""
    return InputError(str(error)) if error.code == "invalid" else error


def _start(options: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Reset options as arguments and arrays of the protocol."""
    given = dict(options or {})
    if "episode" in given:
        raise InputError("a server reads no dataset that a client names; give the clip of the episode")
    given = check_reset_options(given)
    pictures: tuple[str, ...] = ("image", "clip")
    arrays = {name: _array(given.pop(name), name) for name in pictures if name in given}
    if "snapshot" in given:
        given["snapshot"] = _handle(given["snapshot"])
    index = given.get("bank_index")
    if "bank_index" in given and (isinstance(index, bool) or not isinstance(index, int | np.integer)):
        raise InputError(f"bank_index is {index!r}, expected an integer")
    return {k: _carried(int(v), k) if k == "bank_index" else v for k, v in given.items()}, arrays


def _handle(snapshot: Any) -> bytes:
    if not isinstance(snapshot, RemoteSnapshot):
        raise InputError(f"snapshot is a {type(snapshot).__name__}, expected what env.snapshot() returned")
    return snapshot.handle


def _array(value: Any, name: str) -> np.ndarray:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InputError(f"{name} is not an array: {error}") from error
    if array.dtype != np.uint8:
        raise InputError(f"{name} has shape {array.shape} and dtype {array.dtype}, expected uint8 pixels")
    return array


def _sendable(action: Any, sequence: bool = False) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    try:
        return encode_action(action, sequence=sequence)
    except (ServingError, ValueError, TypeError) as error:
        raise InputError(f"action of type {type(action).__name__} is not an array: {error}") from error
