"""``worldmodel bench serving``: what the server adds to a bare socket, and what batching gains; ratios within one run.

Round trips: the whole way of a step of a null model (client, front, worker, and back), against a bare ROUTER that
answers a message of the same size with one of the same size, in alternating blocks, plain and with CURVE. ``step`` is
small up and N bytes down, as steps are; ``observe`` is N bytes both ways, an echo. Steps a second: as many clients
as slots, each a `RemoteEnv` in a thread of its own, against one local `WorldModelVectorEnv` and one `WorldModelEnv`.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import zmq
from tqdm import tqdm

import envs
from envs.serving.client import RemoteEnv
from envs.serving.connection import ClientKeys, Connection
from envs.serving.messages import encode_request
from envs.serving.protocol import Request, new_id
from envs.serving.security import KeyStore
from envs.serving.server import WorldServer
from envs.serving.worker import Finished, Job, Outcome

SIZES = {"100 B": 100, "49 KB": 64 * 64 * 3 * 4, "4.79 MB": 480 * 832 * 3 * 4}
CLIENTS = (1, 4, 16, 64)
WARM = 100  # steps of every client, in which the server finds its pace


class NullModel:
    """A backend that answers at once: every observation is the same array of ``size`` bytes."""

    facts: Mapping[str, Any] = {"world": "null", "frame_size": [16, 16], "chunk_frames": 4}
    action_space = b"{}"
    session_bytes = 1
    going_on = False

    def __init__(self, size: int) -> None:
        self._arrays = {"observation": np.zeros(size, np.uint8)}
        info = {
            "log_prob": -3.0,
            "bits_per_dim": 1.0,
            "action_gain": 0.5,
            "sweeps": 4,
            "residual": 1e-5,
            "context_frames": 6,
            "chunk": 9,
        }
        self._result = {"reward": 0.0, "terminated": False, "truncated": False, "info": info}

    def short(self, request: Request) -> bool:
        """Everything is."""
        return True

    def run(self, jobs: Sequence[Job]) -> list[Finished]:
        """All jobs, done."""
        return [(job, Outcome(self._result, self._arrays, self._arrays["observation"])) for job in jobs]


def _serve_null(size: int, keys: Path | None, pipe: Pipe) -> None:
    with WorldServer(
        NullModel(size), "tcp://127.0.0.1:*", keys=None if keys is None else KeyStore(keys)
    ) as server:
        pipe.send(server.url)
        pipe.recv()


def _serve_bare(size: int, keys: Path | None, pipe: Pipe) -> None:
    """A ROUTER with the server's socket options that echoes, or answers a small message with ``size`` bytes."""
    socket: zmq.Socket[bytes] = zmq.Context().socket(zmq.ROUTER)
    socket.linger, socket.sndhwm, socket.rcvhwm, socket.router_mandatory = 0, 8, 8, 1
    if keys is not None:
        pair = KeyStore(keys).server()
        socket.curve_server, socket.curve_publickey, socket.curve_secretkey = True, pair.public, pair.secret
    socket.bind("tcp://127.0.0.1:*")
    pipe.send(socket.getsockopt_string(zmq.LAST_ENDPOINT))
    payload = memoryview(bytearray(size))
    poller = zmq.Poller()
    poller.register(socket, zmq.POLLIN)
    while not pipe.poll():
        if poller.poll(100):
            who, magic, header, blob = (frame.buffer for frame in socket.recv_multipart(copy=False))
            socket.send_multipart([who, magic, header, blob if len(blob) == size else payload], copy=False)
    socket.close(0)


@contextmanager
def _process(target: Callable[..., None], *arguments: Any) -> Iterator[str]:
    """A server in a process of its own; its address."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=target, args=(*arguments, theirs), daemon=True
    )
    process.start()
    theirs.close()  # only the child's is left: where it fails, there is nothing to wait for
    try:
        yield ours.recv()
    except EOFError as error:
        raise RuntimeError("the server's process failed; its own error is above") from error
    finally:
        with suppress(OSError):
            ours.send(None)
        process.join(10.0)
        if process.is_alive():
            process.kill()


def _bare_trip(url: str, keys: ClientKeys | None, frames: Sequence[Any]) -> Callable[[], None]:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    socket.linger, socket.immediate = 0, True
    if keys is not None:
        socket.curve_serverkey, socket.curve_publickey, socket.curve_secretkey = (
            keys.server,
            keys.public,
            keys.secret,
        )
    socket.connect(url)

    def trip() -> None:
        socket.send_multipart(frames, copy=False)
        socket.recv_multipart(copy=False)

    return trip


def _null_trip(connection: Connection, op: str, array: np.ndarray) -> Callable[[], None]:
    made = connection.ask("create", args={"seed": 0})
    session, seq = made.result["session"], made.result["seq"]
    name = "action" if op == "step" else "frames"

    def trip() -> None:
        nonlocal seq
        seq += 1
        connection.ask(op, session=session, seq=seq, arrays={name: array})

    return trip


def _seconds(call: Callable[[], object], count: int) -> list[float]:
    times = []
    for _ in range(count):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return times


def round_trips(size: int, curve: bool, seconds: float) -> dict[str, dict[str, float]]:
    """p50 in microseconds of the null model server and of the bare socket, for ``step`` and ``observe``."""
    with TemporaryDirectory() as folder:
        keys = store = None
        if curve:
            store = Path(folder) / "keys"
            pair = KeyStore(store).new("client")
            KeyStore(store).allow("client", pair.public)
            keys = ClientKeys(KeyStore(store).server().public, pair.public, pair.secret)
        with (
            _process(_serve_null, size, store) as null_url,
            _process(_serve_bare, size, store) as bare_url,
        ):
            connection = Connection(null_url, keys)
            measured = {}
            for op in ("step", "observe"):
                array = np.zeros(1, np.float32) if op == "step" else np.zeros(size, np.uint8)
                named = {"action" if op == "step" else "frames": array}
                request = Request(op, new_id(), bytes(24), 1, 30.0, arrays=named)
                bare = _bare_trip(bare_url, keys, encode_request(request))
                null = _null_trip(connection, op, array)
                _seconds(bare, 20), _seconds(null, 20)
                times: dict[str, list[float]] = {"server": [], "bare": []}
                end = time.perf_counter() + seconds
                while time.perf_counter() < end:
                    times["bare"] += _seconds(bare, 20)
                    times["server"] += _seconds(null, 20)
                p50 = {k: 1e6 * float(np.median(v)) for k, v in times.items()}
                measured[op] = {
                    "server_us": p50["server"],
                    "bare_us": p50["bare"],
                    "ratio": p50["server"] / p50["bare"],
                    "added_us": p50["server"] - p50["bare"],
                    "trips": len(times["bare"]),
                }
            connection.close()
    return measured


def _serve_world(world: str, pipe: Pipe) -> None:
    import torch

    from envs.serving.world_backend import WorldBackend
    from worldmodel.world import WorldModel

    torch.set_num_threads(1)
    with WorldServer(WorldBackend(WorldModel.load(world)), "tcp://127.0.0.1:*") as server:
        pipe.send(server.url)
        pipe.recv()


def _remote_steps(clients: Sequence[RemoteEnv], each: int) -> float:
    """Seconds for ``each`` steps of every environment, all at once, one thread each."""
    start = threading.Barrier(len(clients) + 1)

    def client(env: RemoteEnv) -> None:
        action = env.action_space.sample()
        start.wait()
        for _ in range(each):
            env.step(action)

    threads = [threading.Thread(target=client, args=(env,)) for env in clients]
    for thread in threads:
        thread.start()
    start.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began


def throughput(url: str, world: str, clients: int, rounds: int, each: int) -> dict[str, float]:
    """Steps a second of ``clients`` remote environments, of one local batch of as many, and of one alone."""
    remote = [RemoteEnv(url, max_chunks=None, timeout=120.0) for _ in range(clients)]
    batch = envs.WorldModelVectorEnv(world, clients, max_chunks=None, termination_threshold=2.0)
    alone = envs.WorldModelEnv(world, max_chunks=None, termination_threshold=2.0)
    for i, env in enumerate(remote):
        env.reset(seed=i)
    batch.reset(seed=0)
    alone.reset(seed=0)
    actions, action = batch.action_space.sample(), alone.action_space.sample()
    _remote_steps(remote, WARM)
    times: dict[str, list[float]] = {"served": [], "batch": [], "alone": []}
    for _ in range(rounds):
        times["batch"] += [sum(_seconds(lambda: batch.step(actions), each)) / (each * clients)]
        times["served"] += [_remote_steps(remote, each) / (each * clients)]
        times["alone"] += [sum(_seconds(lambda: alone.step(action), each)) / each]
    for env in remote:
        env.close()
    rate = {k: 1.0 / float(np.median(v)) for k, v in times.items()}
    ratio = {k: float(np.median(np.array(times[k]) / np.array(times["served"]))) for k in ("batch", "alone")}
    return {
        "clients": clients,
        "steps_per_second": rate["served"],
        "local_batch_per_second": rate["batch"],
        "one_session_per_second": rate["alone"],
        "over_local_batch": ratio["batch"],
        "over_one_session": ratio["alone"],
    }


def serving(
    world: str = "pendulum", seconds: float = 4.0, rounds: int = 11, clients: Sequence[int] = CLIENTS
) -> dict[str, Any]:
    """All of it.

    ``seconds``: measured for each size, op and security. ``rounds``: alternations of served, batched and alone.
    """
    import torch

    torch.set_num_threads(1)
    trips: dict[str, Any] = {}
    cases = [(security, name) for security in ("plain", "curve") for name in SIZES]
    for security, name in tqdm(cases, desc="round trips", unit="case"):
        trips.setdefault(security, {})[name] = round_trips(SIZES[name], security == "curve", seconds)
    steps = []
    with _process(_serve_world, world) as url:
        for count in tqdm(clients, desc="steps a second", unit="size"):
            steps.append(throughput(url, world, count, rounds, max(24, 256 // count)))
    return {"world": world, "round_trips": trips, "steps": steps}


def report(result: dict[str, Any]) -> str:
    """The tables, for people."""
    lines = ["null model server against a bare DEALER/ROUTER, p50 of the round trip:"]
    lines.append(f"{'':24s}{'server us':>11}{'bare us':>11}{'ratio':>8}{'added us':>10}")
    for security, sizes in result["round_trips"].items():
        for size, ops in sizes.items():
            for op, row in ops.items():
                lines.append(
                    f"{security:6s} {size:8s} {op:8s}{row['server_us']:11.0f}{row['bare_us']:11.0f}"
                    f"{row['ratio']:8.2f}{row['added_us']:10.0f}"
                )
    lines += ["", f"{result['world']}, steps a second:"]
    lines.append(
        f"{'clients':>8}{'served':>10}{'local batch':>13}{'ratio':>8}{'one session':>13}{'ratio':>8}"
    )
    for row in result["steps"]:
        lines.append(
            f"{row['clients']:8d}{row['steps_per_second']:10.1f}{row['local_batch_per_second']:13.1f}"
            f"{row['over_local_batch']:8.2f}{row['one_session_per_second']:13.1f}{row['over_one_session']:8.2f}"
        )
    return "\n".join(lines)
