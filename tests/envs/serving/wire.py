"""A client with no manners and no patience: raw messages to a server, and its replies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import zmq

from envs.serving.messages import decode_reply, encode_request
from envs.serving.protocol import Reply, Request, new_id
from envs.serving.security import KeyPair

STILL = {"action": np.zeros(1, np.float32)}


class Wire:
    """A DEALER. ``keys``: the client's pair; ``server``: the server's public key."""

    def __init__(
        self, url: str, keys: KeyPair | None = None, server: bytes | None = None, high_water: int = 2000
    ) -> None:
        self.context = zmq.Context.instance()
        self.keys, self.server, self.high_water = keys, server, high_water
        self.socket = self.fresh()
        self.socket.connect(url)

    def fresh(self) -> zmq.Socket[bytes]:
        """A socket with this client's keys, not connected yet."""
        socket = self.context.socket(zmq.DEALER)
        socket.linger = 0
        socket.sndhwm, socket.rcvhwm = 10_000, self.high_water
        socket.sndtimeo = 20_000  # without a connection there is nowhere to send to
        if self.keys is not None and self.server is not None:
            socket.curve_publickey, socket.curve_secretkey = self.keys.public, self.keys.secret
            socket.curve_serverkey = self.server
        return socket

    def send(self, op: str, **fields: Any) -> bytes:
        """Send a request; its id."""
        request = Request(op, **{"id": new_id(), **fields})
        self.raw(encode_request(request))
        return request.id

    def raw(self, frames: Sequence[Any]) -> None:
        self.socket.send_multipart(frames, copy=True)

    def frames(self, seconds: float = 60.0) -> list[bytes] | None:
        """The next message, or None."""
        return self.socket.recv_multipart() if self.socket.poll(int(1000 * seconds)) else None

    def reply(self, seconds: float = 60.0) -> Reply:
        frames = self.frames(seconds)
        assert frames is not None, f"no reply within {seconds} s"
        return decode_reply(frames)

    def ask(self, op: str, **fields: Any) -> Reply:
        """A request and its reply, whatever it is."""
        sent = self.send(op, **fields)
        reply = self.reply()
        assert reply.id == sent
        return reply

    def result(self, op: str, **fields: Any) -> dict[str, Any]:
        """The result of a request that must succeed."""
        reply = self.ask(op, **fields)
        assert reply.error is None, f"{reply.error.code}: {reply.error}"
        return dict(reply.result)

    def refused(self, op: str, **fields: Any) -> str:
        """The code of a request that must fail."""
        reply = self.ask(op, **fields)
        assert reply.error is not None
        return reply.error.code

    def create(self, **args: Any) -> bytes:
        session: bytes = self.result("create", args=args)["session"]
        return session

    def step(self, session: bytes, seq: int, action: float = 0.0, **fields: Any) -> Reply:
        arrays = {"action": np.array([action], np.float32)}
        return self.ask("step", session=session, seq=seq, arrays=arrays, **fields)

    def close(self) -> None:
        self.socket.close(0)

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
