"""The server's front: one thread that reads, checks, answers from memory, or hands a job to the worker.

Nothing here waits for the model. What is proven to take less than a hand-over is run here, see `Worker.at_once`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import threading
import time
from collections import Counter
from typing import Any

import numpy as np
import zmq

from envs.serving import protocol
from envs.serving.health import HealthPages, MemoryWatch, resident_bytes
from envs.serving.mailbox import Calls
from envs.serving.messages import decode_request, encode_reply
from envs.serving.protocol import Reply, Request, ServingError
from envs.serving.security import KeyStore, ZapHandler, is_loopback
from envs.serving.sessions import (
    MAX_READS,
    Limits,
    Running,
    Session,
    SessionTable,
    Waiter,
)
from envs.serving.transport import Message, Transport
from envs.serving.viewers import Viewers
from envs.serving.worker import Backend, Finished, Job, Outcome, Worker, internal_error
from worldmodel import __version__
from worldmodel.errors import InputError

log = logging.getLogger(__name__)

TICK = 0.1  # seconds between looks at leases, memory and threads
DRAIN = 10.0  # seconds that a server that is to stop gives to what is under way
STRAGGLERS = 0.3  # seconds after that in which late requests are still told that it stops
SLACK = 1 << 30  # bytes above the sessions' memory at which connections are dropped


class WorldServer:
    """One backend's sessions behind one address.

    Args:
        url: ``tcp://address:port``; the port ``*`` is any free one, see ``url`` afterwards.
        keys: who may connect (CURVE); None, on the loopback only, for everybody.
        limits: what it gives out.
        window: seconds that a batch waits for those who were in the last one, at most 0.005.
        rows: the most sessions of a batch.
        health: port on the loopback for /healthz, /readyz and /metrics; 0 for any free one, None for none.

    Raises:
        InputError: an address that cannot be bound, or one beyond the loopback without keys.
    """

    def __init__(
        self,
        backend: Backend,
        url: str = "tcp://127.0.0.1:5555",
        *,
        keys: KeyStore | None = None,
        limits: Limits | None = None,
        window: float = 0.005,
        rows: int = 64,
        health: int | None = None,
    ) -> None:
        if re.fullmatch(r"tcp://.+:(\*|\d+)", url) is None:
            raise InputError(
                f"cannot serve on {url!r:.80}: expected tcp://address:port, as tcp://127.0.0.1:5555"
            )
        if keys is None and not is_loopback(url):
            raise InputError(
                f"{url} can be reached by others: serve it with keys (`worldmodel keys`), or on 127.0.0.1"
            )
        if not 0 <= window <= 0.005:
            raise InputError(f"window is {1000 * window:g} ms, expected 0 to 5 ms")
        self.limits = limits or Limits()
        self.counts: Counter[str] = Counter()
        self.table = SessionTable(self.limits, backend.session_bytes)
        self._backend = backend
        self._store = keys
        self._context: zmq.Context[Any] = zmq.Context(io_threads=1)
        self._context.set(zmq.MAX_SOCKETS, 16384)
        self._inbox = Calls()
        pair = None if keys is None else keys.server()
        self.public_key = None if pair is None else pair.public
        self.viewers = Viewers(self._context, pair, backend.facts, self._answer, self._inbox.ask)
        self.worker = Worker(backend, lambda done: self._inbox.ask(lambda: self._finish(done)), window, rows)
        self._running: dict[Job, Running] = {}
        self._handed: list[Job] = []  # for the worker, woken once for all when nothing is left to read
        self._queued_bytes = 0
        self._chunk_bytes = 3 * backend.facts["chunk_frames"] * math.prod(backend.facts["frame_size"])
        self._began = time.monotonic()
        self._beat = self._began
        self._next_tick = 0.0
        self._memory = MemoryWatch(self.limits.memory + SLACK)
        self._draining: float | None = None
        self._thread: threading.Thread | None = None
        self._up = threading.Event()
        self.zap = None if keys is None else ZapHandler(self._context, keys)
        self.health: HealthPages | None = None
        try:
            self.transport = Transport(self._context, url, pair)
            if health is not None:
                self.health = HealthPages(health, self.alive, self.ready, self.metrics)
        except InputError:
            self._shut()
            raise

    # ---- life ------------------------------------------------------------------------------------------------
    @property
    def url(self) -> str:
        """Where clients connect to."""
        return self.transport.url

    def run(self) -> None:
        """Serve until `drain` is called and what was under way is done."""
        self.worker.start()
        self._up.set()
        poller = zmq.Poller()
        poller.register(self._inbox.fileno(), zmq.POLLIN)
        registered = self.transport.socket
        poller.register(registered, zmq.POLLIN)
        try:
            while not self._done():
                if self.transport.socket is not registered:
                    poller.unregister(registered)
                    registered = self.transport.socket
                    poller.register(registered, zmq.POLLIN)
                waiting = self.transport.flush()
                self.worker.submit(self._handed)
                self._handed = []
                ready = dict(poller.poll(1 if waiting else int(1000 * TICK)))
                if self._inbox.fileno() in ready:
                    self._inbox.make()
                if registered in ready:
                    self._read()
                self._tick()
        finally:
            self._shut()

    def start(self) -> WorldServer:
        """`run` in a thread of its own."""
        self._thread = threading.Thread(target=self.run, name="worldmodel-front", daemon=True)
        self._thread.start()
        self._up.wait()
        return self

    def drain(self) -> None:
        """Take nothing new, finish what is under way within `DRAIN` seconds, then end `run`; from any thread."""
        if self._draining is None:
            self._draining = time.monotonic()

    def stop(self) -> None:
        """`drain`, and wait for the thread that `start` began."""
        self.drain()
        if self._thread is not None:
            self._thread.join(DRAIN + 5.0)

    def __enter__(self) -> WorldServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _done(self) -> bool:
        if self._draining is None:
            return False
        waited = time.monotonic() - self._draining
        return waited > DRAIN or (waited > STRAGGLERS and not self._running and not self.transport.flush())

    def _shut(self) -> None:
        """Close what there is: of a server that could not be made, some of it."""
        if self.worker.is_alive():
            self.worker.stop()
            self.worker.join(DRAIN)
        self.viewers.close()
        if hasattr(self, "transport"):
            self.transport.close(1.0)
        if self.health is not None:
            self.health.close()
        if self.zap is not None:
            self.zap.stop()
        self._inbox.close()
        self._context.term()

    # ---- how it is -------------------------------------------------------------------------------------------
    def alive(self) -> bool:
        """Whether the front goes round."""
        return time.monotonic() - self._beat < 5.0

    def ready(self) -> bool:
        """Whether new sessions have a chance: the front, the worker and the handshakes work, and it is not to stop."""
        zap = self.zap is None or self.zap.alive
        return self.alive() and self.worker.is_alive() and zap and self._draining is None

    def metrics(self) -> dict[str, float]:
        """Numbers by name, for `/metrics` and `stats`."""
        sent = {f"messages_{k}_total": float(v) for k, v in list(self.transport.counts.items())}
        return {
            "sessions": len(self.table.sessions),
            "snapshots": sum(len(p.snapshots) for p in list(self.table.principals.values())),
            "queued": len(self._running),
            "steps_total": self.counts["steps"],
            "batches_total": self.worker.rounds,
            "jobs_total": self.worker.jobs,
            "model_seconds_total": self.worker.seconds,
            "memory": resident_bytes(),
            "uptime": time.monotonic() - self._began,
            "handshakes_denied_total": 0 if self.zap is None else self.zap.denied,
            **{f"requests_{k}_total": self.counts[k] for k in protocol.OPS if self.counts[k]},
            **{f"errors_{k}_total": self.counts[k] for k in protocol.CODES if self.counts[k]},
            **sent,
        }

    # ---- a message in ----------------------------------------------------------------------------------------
    def _read(self) -> None:
        """Take what has arrived, and look up now and then."""
        for _ in range(64):
            message = self.transport.receive()
            if message is None:
                return
            self._take(message)

    def _take(self, message: Message) -> None:
        """Check a message, and answer it or see to it that it will be."""
        waiter = Waiter(message.address, protocol.NO_ID)
        try:
            if message.parts is None:
                raise ServingError("too_large", f"more than {protocol.MAX_BLOBS} blobs, or too many bytes")
            request = decode_request(message.parts)
            waiter = Waiter(message.address, request.id)
            owner = message.owner
            if self._store is not None and owner.encode() not in self._store.allowed():
                raise ServingError("unauthorized", "this key is not allowed any more")
            self.counts[request.op] += 1
            reply = self._handle(request, waiter, owner)
        except ServingError as error:
            reply = Reply(getattr(error, "request_id", waiter.request), error=error)
        except Exception as error:  # a bug of ours: one request's, not everybody's
            reply = Reply(waiter.request, error=internal_error(error))
        if reply is not None:
            self._answer(Waiter(message.address, reply.id), reply)

    def _handle(self, request: Request, waiter: Waiter, owner: str) -> Reply | None:
        now = time.monotonic()
        principal = self.table.principal(owner, now)
        op = protocol.OPS[request.op]
        if not (op.session or op.once):
            return self._at_once(request, owner, now)
        session = None
        if not op.seq:
            stored = self.table.once(principal, request, waiter)
            if stored is not None or request.id in principal.running:
                return stored
        if request.session is not None:
            session = self.table.find(request.session, owner, now)
        if request.op == "next" and session is not None:
            self.viewers.park(request, session, waiter, now)
            return None
        if request.op == "broadcast" and session is not None:
            return Reply(request.id, self.viewers.broadcast(request, session, self.url.rpartition(":")[0]))
        if op.seq and session is not None:
            stored = self.table.step(session, request, waiter)
            if stored is not None:
                return stored._replace(id=request.id)
            if session.running is not None:
                return None
        self._submit(request, waiter, owner, session, now)
        return None

    def _submit(
        self,
        request: Request,
        waiter: Waiter,
        owner: str,
        session: Session | None,
        now: float,
    ) -> None:
        """Give it to the worker, if there is room."""
        op = protocol.OPS[request.op]
        snapshot = request.args.get("snapshot")
        principal = self.table.principals[owner]
        nbytes = _nbytes(request, self._chunk_bytes)
        if snapshot is not None:
            self.table.lease_snapshot(snapshot, owner, now)
        if request.op not in ("close", "discard"):
            if self._draining is not None:
                raise ServingError("busy", "the server is about to stop", 1.0)
            full = self._queued_bytes + nbytes > self.limits.queue_bytes
            if full or len(self._running) >= self.limits.queue:
                raise ServingError("busy", f"{len(self._running)} requests are waiting for the model", 0.1)
        reading = session is not None and not op.seq
        if reading and session is not None and session.reads >= MAX_READS:
            raise ServingError("busy", f"{MAX_READS} requests of this session are under way", 0.05)
        count = {"create": 1, "snapshot": 1}.get(request.op, 0)
        if request.op == "fork":
            count = int(request.args.get("n", 1))
            if count < 1:
                raise ServingError("invalid", f"fork({count}): expected at least 1")
            if count > protocol.MAX_FORK:
                raise ServingError("too_large", f"fork({count}): at most {protocol.MAX_FORK} at a time")
        made = self.table.reserve(owner, count, request.op == "snapshot") if count else ()
        job = Job(request, made, now + request.deadline if request.deadline else float("inf"))
        running = Running(owner, job, nbytes, [waiter])
        self._running[job] = running
        self._queued_bytes += nbytes
        if op.seq and session is not None:
            session.running = running
        elif session is not None:
            session.reads += 1
        if not op.seq:
            principal.running[request.id] = running
        done = self.worker.at_once(job) if len(self._running) == 1 and not self._handed else None
        if done is None:
            self._handed.append(job)
        else:
            self._finish(done)

    def _at_once(self, request: Request, owner: str, now: float) -> Reply:
        """Requests that neither a session nor the model is needed for."""
        if request.op == "hello":
            return Reply(request.id, self._facts(), {"action_space": self._space()})
        if request.op == "renew":
            missing = []
            for kind, lease in (("sessions", self.table.find), ("snapshots", self.table.lease_snapshot)):
                for name in request.args.get(kind, []):
                    try:
                        lease(name, owner, now)
                    except ServingError:
                        missing.append(name)
            return Reply(request.id, {"lease": self.limits.lease, "missing": missing})
        if request.op == "sessions":
            return Reply(request.id, {"sessions": self.table.newest(owner, 256)})
        if request.op == "cancel":
            wanted = request.args.get("request")
            found = [r for r in self._running.values() if r.owner == owner and r.job.request.id == wanted]
            for running in found:
                running.job.cancel()
            return Reply(request.id, {"cancelled": any(running.job.cancelled for running in found)})
        return Reply(request.id, self.metrics())

    def _facts(self) -> dict[str, Any]:
        return {
            "server": f"worldmodel {__version__}",
            "protocol": protocol.VERSION,
            "epoch": self.table.epoch,
            "lease": self.limits.lease,
            "auth": "none" if self._store is None else "curve",
            "limits": {
                **protocol.LIMITS,
                "sessions": self.limits.sessions,
                "snapshots": self.limits.snapshots,
            },
            **self._backend.facts,
        }

    def _space(self) -> np.ndarray:
        return np.frombuffer(self._backend.action_space, np.uint8)

    # ---- a result back from the worker -----------------------------------------------------------------------
    def _finish(self, done: list[Finished]) -> None:
        """Commit what the worker has done, and answer all who wait for it."""
        for job, outcome in done:
            running = self._running.pop(job, None)
            if running is None:  # the front's own: what an expired session held
                continue
            self._queued_bytes -= running.nbytes
            try:
                self._conclude(running, self._committed(job, running, outcome))
            except Exception:  # a bug of ours: one request's, not that of those who shared its round
                log.exception("an answer to %s failed", job.request.op)

    def _conclude(self, running: Running, reply: Reply) -> None:
        try:
            for waiter in running.waiters:
                self._answer(waiter, reply._replace(id=waiter.request))
        finally:
            self._remember(running, reply)

    def _remember(self, running: Running, reply: Reply) -> None:
        """Keep a reply for retries; after it is on its way, since the digest of a large request takes a while."""
        if reply.error is not None:
            return
        request = running.job.request
        op, session = protocol.OPS[request.op], self.table.sessions.get(request.session or b"")
        if op.seq and session is not None:
            # frames that were observed are no more than a chunk, and compared only when they come again
            session.done = request if request.op == "observe" else running.digest
            session.reply = reply
        if op.once:
            now = time.monotonic()
            principal = self.table.principal(running.owner, now)
            self.table.keep(principal, request.id, running.digest, reply, now)

    def _committed(self, job: Job, running: Running, outcome: Outcome | ServingError) -> Reply:
        request, owner, now = job.request, running.owner, time.monotonic()
        op = protocol.OPS[request.op]
        principal = self.table.principal(owner, now)
        session = self.table.sessions.get(request.session or b"")
        if session is not None:
            session.expires = now + self.limits.lease
            session.running = None if session.running is running else session.running
            session.reads -= not op.seq
        if not op.seq:
            principal.running.pop(request.id, None)
        if isinstance(outcome, ServingError):
            if job.made:
                self.table.release(owner, job.made, request.op == "snapshot")
            return Reply(request.id, error=outcome)
        result = dict(outcome.result)
        if request.op in ("create", "fork"):
            options = dict(request.args) if session is None else session.options
            for name in job.made:
                child = self.table.add(name, owner, options, outcome, now)
            if request.op == "create":
                session, result["session"] = child, job.made[0]
        elif request.op == "close" and session is not None:
            self.table.remove(session)
            self.viewers.gone(session, ServingError("no_session", "the session was closed"))
        elif request.op == "snapshot":
            self.table.lease_snapshot(job.made[0], owner, now)
        elif request.op == "discard":
            self.table.release(owner, (request.args["snapshot"],), snapshots=True)
        if session is not None and "info" in result:
            if op.seq:
                self._moved(session, request, outcome)
            result |= {"seq": session.seq, "at": session.at, "lease": self.limits.lease}
            if request.op == "attach":
                result["options"] = session.options
        return Reply(request.id, result, outcome.arrays)

    def _moved(self, session: Session, request: Request, outcome: Outcome) -> None:
        session.seq += 1
        session.at += 1
        session.shown = Outcome(outcome.result, {}, outcome.frames, outcome.action)
        self.counts["steps"] += request.op == "step"
        self.viewers.changed(session)

    def _answer(self, waiter: Waiter, reply: Reply) -> None:
        try:
            parts = encode_reply(reply)
        except ServingError as error:
            reply = Reply(reply.id, error=error)
            parts = encode_reply(reply)
        if reply.error is not None:
            self.counts[reply.error.code] += 1
        self.transport.send(waiter.address, parts)

    # ---- now and then ----------------------------------------------------------------------------------------
    def _tick(self) -> None:
        now = self._beat = time.monotonic()
        self.viewers.tick(now)
        if now < self._next_tick:
            return
        self._next_tick = now + TICK
        for session in self.table.expire(now):
            self.viewers.gone(session, ServingError("expired", "its lease ran out; create one"))
            self._handed.append(Job(Request("close", session=session.name)))
        for name in self.table.expired_snapshots(now):
            self._handed.append(Job(Request("discard", args={"snapshot": name})))
        if self.zap is not None:
            self.zap.watch()
            if self.zap.revoked():
                self.viewers.rebind()
        if self._memory.exceeded(now):
            log.warning("memory is above its limit: all connections are dropped; clients will come back")
            self.viewers.rebind()
            with contextlib.suppress(InputError):
                self.transport.rebind()


def _nbytes(request: Request, chunk_bytes: int) -> int:
    """What a request holds until it is answered: its arrays and, chunk by chunk, the frames that it imagines."""
    held = sum(array.nbytes for array in request.arrays.values())
    if request.op == "imagine":
        texts = request.args.get("text", {}).values()
        horizon = max(map(len, (*texts, *(a for a in request.arrays.values() if a.ndim))), default=0)
        held += min(horizon * chunk_bytes, protocol.MAX_MESSAGE)  # the backend refuses more
    return held
