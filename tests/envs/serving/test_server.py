"""A served world is the local one; a step happens at most once; what cannot be done is refused by its code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import envs
from benchmarks.null_world import FAIL, NullBackend
from envs.serving.protocol import Reply, encode_action
from envs.serving.server import WorldServer
from envs.serving.sessions import Limits
from envs.serving.worker import Finished, Job
from envs.serving.world_backend import SCORED, WorldBackend, held_bytes, together
from tests.envs.serving.machines import PATIENCE, Clock, eventually
from tests.envs.serving.wire import STILL, Wire
from worldmodel import WorldModel

ROOT = Path(__file__).parents[3]


@pytest.fixture()
def served(toy: WorldModel) -> Iterator[Wire]:
    with WorldServer(WorldBackend(toy), "tcp://127.0.0.1:*") as server, Wire(server.url) as wire:
        yield wire


@pytest.fixture()
def null() -> Iterator[Wire]:
    with WorldServer(NullBackend(), "tcp://127.0.0.1:*") as server, Wire(server.url) as wire:
        yield wire


class Held(NullBackend):
    """A null model whose rounds wait until its gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()

    def run(self, jobs: Sequence[Job]) -> list[Finished]:
        assert self.gate.wait(PATIENCE)
        return super().run(jobs)


def same(reply: Reply, outcome: tuple[Any, ...]) -> None:
    """A reply against what a local environment returned, bit for bit."""
    assert reply.error is None, f"{reply.error.code}: {reply.error}" if reply.error else ""
    np.testing.assert_array_equal(reply.arrays["observation"], outcome[0])
    assert reply.result["info"] == outcome[-1]
    if len(outcome) == 5:
        assert (reply.result["reward"], reply.result["terminated"], reply.result["truncated"]) == outcome[1:4]


# ---- as the local environment ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [
        {"step_mode": "chunk", "max_chunks": 5},
        {"step_mode": "frame", "max_chunks": 2, "termination_threshold": 0.4},
        {"observation": "latent"},
        {"guidance": 1.0, "temperature": 0.7, "context": "rolling"},
    ],
    ids=str,
)
def test_every_verb_is_the_local_one(served: Wire, toy: WorldModel, options: dict[str, Any]) -> None:
    env = envs.WorldModelEnv(toy, **{"max_chunks": None, **options})
    env.action_space.seed(0)
    created = served.ask("create", args={**options, "seed": 3, "want": ["frames", "latent", "noise"]})
    same(created, env.reset(seed=3))
    session = created.result["session"]
    np.testing.assert_array_equal(created.arrays["frames"], np.asarray(env.last_chunk.frames[0]))
    np.testing.assert_array_equal(created.arrays["noise"], np.asarray(env.last_chunk.noise[0]))
    for seq in range(1, 9):
        action = env.action_space.sample()
        want = {"want": ["log_prob_map"]}
        arrays = encode_action(action)[0]
        reply = served.ask("step", session=session, seq=seq, arrays=arrays, args=want)
        same(reply, env.step(action))
        np.testing.assert_array_equal(
            reply.arrays["log_prob_map"], np.asarray(env.last_chunk.log_prob_map[0])
        )
        assert reply.result["seq"] == seq
    actions = np.stack([env.action_space.sample() for _ in range(3)])
    chunks = env.imagine(actions)
    imagined = served.ask("imagine", session=session, arrays={"action": actions}, args={"want": ["latent"]})
    for t, chunk in enumerate(chunks):
        np.testing.assert_array_equal(imagined.arrays["frames"][t], np.asarray(chunk.frames[0]))
        np.testing.assert_array_equal(imagined.arrays["latent"][t], np.asarray(chunk.latent[0]))
        assert imagined.arrays["scalars"][t, 0] == float(chunk.log_prob[0])
        assert imagined.arrays["scalars"][t, 7] == float(chunk.termination[0])
    frames = np.asarray(chunks[0].frames[0])
    local = env.score(frames, actions[0], draws=3)
    score = served.result(
        "score", session=session, arrays={"frames": frames, "action": actions[0]}, args={"draws": 3}
    )
    assert score == {name: float(getattr(local, name)[0]) for name in SCORED}
    snapshot, moment = env.snapshot(), served.result("snapshot", session=session)["snapshot"]
    seq = 9
    if env._current()[1].over:
        same(served.ask("observe", session=session, seq=seq, arrays={"frames": frames}), env.observe(frames))
        seq += 1
    same(served.ask("reset", session=session, seq=seq), env.reset())
    same(
        served.ask("reset", session=session, seq=seq + 1, args={"bank_index": 2}),
        env.reset(options={"bank_index": 2}),
    )
    env.restore(snapshot)
    restored = served.ask("restore", session=session, seq=seq + 2, args={"snapshot": moment})
    assert restored.result["info"] == snapshot.turn.info
    forked = served.result("fork", session=session, args={"n": 3})["sessions"]
    for child, there in zip(env.fork(3), forked, strict=True):
        action = env.action_space.sample()
        same(served.ask("step", session=there, seq=1, arrays={"action": action}), child.step(action))
        same(served.ask("reset", session=there, seq=2), child.reset())
    attached = served.result("attach", session=session)
    assert attached["seq"] == seq + 2
    assert {k: v for k, v in attached["options"].items() if k in options} == options
    if options.get("step_mode") != "frame":
        again = served.ask("reset", session=session, seq=seq + 3, args={"snapshot": moment, "seed": 5})
        same(again, env.reset(seed=5, options={"snapshot": snapshot}))
    same(
        served.ask("create", args={**options, "seed": 1}, arrays={"image": frames[0]}),
        env.reset(seed=1, options={"image": frames[0]}),
    )


def test_what_the_world_refuses_changes_nothing(served: Wire, toy: WorldModel) -> None:
    env = envs.WorldModelEnv(toy, max_chunks=None)
    env.reset(seed=0)
    session = served.create(seed=0)
    frames = {"frames": np.zeros((4, 32, 32, 3), np.uint8)}
    bad: list[tuple[str, dict[str, Any]]] = [
        ("step", {"arrays": {"action": np.float32([9.0])}}),
        ("step", {"arrays": {"action": np.float32([np.nan])}}),
        ("step", {"arrays": {"action": np.zeros((2, 2), np.float32)}}),
        ("step", {"arrays": {"action/x": np.zeros(1, np.float32)}}),
        ("step", {"args": {"text": {"action": "left"}}}),
        ("step", {}),
        ("observe", {"arrays": {"frames": frames["frames"][:3]}}),
        ("observe", {"arrays": {"frames": frames["frames"].astype(np.float32)}}),
        ("observe", {"arrays": {"action": np.zeros(1, np.float32)}}),
        ("reset", {"args": {"bank_index": 99}}),
        ("reset", {"args": {"seed": -1}}),
        ("reset", {"args": {"bank_index": 1}, "arrays": {"image": frames["frames"][0]}}),
        ("reset", {"args": {"prompt": "a pendulum"}}),
        ("reset", {"arrays": {"clip": frames["frames"][:2]}}),
    ]
    for op, fields in bad:
        assert served.refused(op, session=session, seq=1, **fields) == "invalid", (op, fields)
    for draws in (0, 65):
        fields = {"arrays": frames, "args": {"draws": draws}}
        assert served.refused("score", session=session, **fields) == "invalid"
    assert served.refused("imagine", session=session, arrays={"action": np.zeros(1)}) == "invalid"
    too_many = {"action": np.zeros((5000, 1), np.float32)}
    assert served.refused("imagine", session=session, arrays=too_many) == "too_large"
    for option in ({"step_mode": "x"}, {"max_chunks": 0}, {"temperature": -1.0}, {"context": "none"}):
        assert served.refused("create", args=option) == "invalid"
    assert served.refused("fork", session=session, args={"n": 0}) == "invalid"
    assert served.refused("fork", session=session, args={"n": 257}) == "too_large"
    same(served.step(session, 1, 0.5), env.step(np.float32([0.5])))


def test_a_batch_of_many_equals_many_batches_of_one(toy: WorldModel) -> None:
    """12 sessions begun at different times, stepping in whatever company the window gives them."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(-2, 2, (12, 8)).astype(np.float32)
    lengths = rng.integers(3, 9, 12)
    expected: list[list[tuple[Any, ...]]] = []
    for i in range(12):
        env = envs.WorldModelEnv(toy, max_chunks=None)
        env.reset(seed=i)
        expected.append([env.step(actions[i, t : t + 1]) for t in range(lengths[i])])
    got: dict[int, list[Reply]] = {}
    with WorldServer(WorldBackend(toy), "tcp://127.0.0.1:*") as server:

        def play(i: int) -> None:
            with Wire(server.url) as wire:
                session = wire.create(seed=i)
                got[i] = [wire.step(session, t + 1, actions[i, t]) for t in range(lengths[i])]

        threads = [threading.Thread(target=play, args=(i,)) for i in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert server.worker.rounds < 0.6 * (12 + lengths.sum())
    for i in range(12):
        for reply, local in zip(got[i], expected[i], strict=True):
            assert reply.error is None
            differs = np.abs(reply.arrays["observation"].astype(int) - local[0])
            assert differs.max() <= 1 and (differs > 0).mean() < 1e-3  # ties of rounding
            for key, value in local[4].items():
                assert reply.result["info"][key] == pytest.approx(value, rel=1e-4, abs=1e-4), key


def test_sessions_that_stay_together_are_not_copied(toy: WorldModel) -> None:
    state = toy.reset([0, 1, 2, 3])[0]
    from envs.serving.world_backend import Batch

    slots = Batch(state).slots()
    joined, place = together([slots[2], slots[0], slots[3], slots[1]])
    assert joined is state and place == [2, 0, 3, 1]
    fewer, place = together([slots[3], slots[1]])
    assert fewer.rows == 2
    assert fewer.seeds[place].tolist() == [3, 1]
    assert len(fewer.context.cache.cohorts) == 1


def test_rows_that_nobody_needs_are_let_go(toy: WorldModel) -> None:
    from envs.serving.world_backend import Batch

    state = toy.reset(list(range(16)))[0]
    one = held_bytes(toy.reset([0])[0].gathered())
    batch = Batch(state)
    slots = batch.slots()
    kept = slots[5]
    before = kept.state()
    del slots
    batch.thin(one)
    assert kept.batch is not batch
    assert kept.batch.state.rows == 1
    assert held_bytes(kept.batch.state) <= 2 * one
    assert torch.equal(kept.batch.state.noisy, before.noisy)
    after, again = (toy.step(s, np.zeros((1, 1), np.float32))[1] for s in (before, kept.batch.state))
    assert torch.equal(after.log_prob, again.log_prob)


# ---- at most once --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("times", [1, 2, 10])
@pytest.mark.parametrize("sockets", [1, 10])
def test_the_same_step_many_times_at_once(times: int, sockets: int) -> None:
    backend = NullBackend(seconds=0.02)
    with WorldServer(backend, "tcp://127.0.0.1:*") as server:
        wires = [Wire(server.url) for _ in range(sockets)]
        session = wires[0].create()
        request = os.urandom(16)
        for k in range(times):
            wires[k % sockets].send("step", id=request, session=session, seq=1, arrays=STILL)
        replies = [wires[k % sockets].frames() for k in range(times)]
        wires[0].send("step", id=request, session=session, seq=1, arrays=STILL)
        replies.append(wires[0].frames())
        assert replies[0] is not None
        assert len({tuple(frames or ()) for frames in replies}) == 1
        assert backend.counts[session] == backend.steps == 1
        assert wires[0].step(session, 2).result["info"]["chunk"] == 2
        for wire in wires:
            wire.close()


def test_sequence_numbers(null: Wire) -> None:
    session = null.create()
    assert null.step(session, 2).error.code == "gap"  # type: ignore[union-attr]
    first = null.step(session, 1, 0.25)
    again = null.step(session, 1, 0.25)
    assert replace(again, id=first.id).result == first.result
    np.testing.assert_array_equal(again.arrays["observation"], first.arrays["observation"])
    assert null.step(session, 1, 0.5).error.code == "conflict"  # type: ignore[union-attr]
    assert null.refused("reset", session=session, seq=1) == "conflict"
    null.step(session, 2)
    assert null.step(session, 1, 0.25).error.code == "stale"  # type: ignore[union-attr]
    assert null.step(session, 9).error.code == "gap"  # type: ignore[union-attr]
    assert null.result("attach", session=session)["seq"] == 2


def test_another_step_while_one_is_being_done() -> None:
    backend = Held()
    with WorldServer(backend, "tcp://127.0.0.1:*") as server, Wire(server.url) as wire:
        session = wire.create()
        backend.gate.clear()
        wire.send("step", session=session, seq=1, arrays=STILL)
        other = {"action": np.float32([1.0])}
        wire.send("step", session=session, seq=1, arrays=other)
        wire.send("step", session=session, seq=2, arrays=STILL)
        refused = [wire.reply().error for _ in range(2)]
        assert [error.code for error in refused if error] == ["conflict", "gap"]
        backend.gate.set()
        assert wire.reply().error is None


def test_create_fork_snapshot_and_close_happen_once(null: Wire) -> None:
    ids = {op: os.urandom(16) for op in ("create", "fork", "snapshot", "discard", "close")}
    created = [null.ask("create", id=ids["create"], args={"seed": 1}) for _ in range(3)]
    assert len({r.result["session"] for r in created}) == 1
    assert null.refused("create", id=ids["create"], args={"seed": 2}) == "conflict"
    session = created[0].result["session"]
    forks = [null.result("fork", id=ids["fork"], session=session, args={"n": 4}) for _ in range(3)]
    assert forks[0] == forks[1] == forks[2]
    shots = [null.result("snapshot", id=ids["snapshot"], session=session) for _ in range(3)]
    assert len({s["snapshot"] for s in shots}) == 1
    assert (null.result("stats")["sessions"], null.result("stats")["snapshots"]) == (5, 1)
    for _ in range(2):
        null.result("discard", id=ids["discard"], args={"snapshot": shots[0]["snapshot"]})
        null.result("close", id=ids["close"], session=session)
    assert (null.result("stats")["sessions"], null.result("stats")["snapshots"]) == (4, 0)
    assert null.refused("close", session=session) == "no_session"


def test_a_failing_model_is_internal_and_changes_nothing(null: Wire) -> None:
    session = null.create()
    null.step(session, 1)
    for _ in range(3):
        reply = null.step(session, 2, FAIL)
        assert reply.error is not None and reply.error.code == "internal"
        assert reply.error.correlation and "Traceback" not in str(reply.error)
    assert null.result("attach", session=session)["info"]["chunk"] == 1
    assert null.step(session, 2).result["info"]["chunk"] == 2


@pytest.mark.parametrize("fault", ["raises", "nan"])
def test_a_fault_in_one_row_is_that_rows_alone(
    toy: WorldModel, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Sessions in one batch; the model fails wherever the third action is in it."""
    step = WorldModel.step

    def faulty(self: WorldModel, state: Any, action: Any = None, *rest: Any) -> Any:
        hit = np.asarray(action)[:, 0] == np.float32(1.25)
        if hit.any() and fault == "raises":
            raise RuntimeError("a bad kernel")
        after, chunk = step(self, state, action, *rest)
        reward = chunk.reward.clone()
        reward[torch.from_numpy(hit)] = float("nan")
        return after, replace(chunk, reward=reward)

    env = envs.WorldModelEnv(toy, max_chunks=None)
    with WorldServer(WorldBackend(toy), "tcp://127.0.0.1:*") as server, Wire(server.url) as wire:
        sessions = [wire.create(seed=i) for i in range(4)]
        monkeypatch.setattr(WorldModel, "step", faulty)
        for session in sessions:
            wire.step(session, 1, 0.5)
        sent = {}
        for i, session in enumerate(sessions):
            arrays = {"action": np.float32([1.25 if i == 2 else 0.5])}
            sent[wire.send("step", session=session, seq=2, arrays=arrays)] = i
        replies = {sent[r.id]: r for r in (wire.reply() for _ in range(4))}
        error = replies[2].error
        assert error is not None and error.code == "internal"
        assert all(replies[i].error is None for i in (0, 1, 3))
        monkeypatch.undo()
        for i, session in enumerate(sessions):
            env.reset(seed=i)
            local = [env.step(np.float32([0.5])) for _ in range(2)]
            reply = wire.step(session, 2, 0.5)  # stored, or for the third one done now
            assert reply.result["info"]["chunk"] == 2
            assert reply.result["info"]["log_prob"] == pytest.approx(local[1][4]["log_prob"], abs=1e-4)


# ---- limits ---------------------------------------------------------------------------------------------------
def test_leases(clock: Clock) -> None:
    backend = NullBackend()
    with WorldServer(backend, "tcp://127.0.0.1:*") as server, Wire(server.url) as wire:

        def left(sessions: int, snapshots: int) -> bool:
            said = wire.result("stats")
            return bool(said["sessions"] == sessions and said["snapshots"] == snapshots)

        session, other = wire.create(), wire.create()
        snapshot, forgotten = (wire.result("snapshot", session=other)["snapshot"] for _ in range(2))
        held = {"sessions": [session], "snapshots": [snapshot]}
        for _ in range(3):
            clock.ahead += 25.0
            assert wire.result("renew", args=held)["missing"] == []
        eventually(lambda: left(1, 1))  # the others' 60 s are over
        assert wire.step(session, 1).error is None
        assert wire.refused("attach", session=other) == "expired"
        assert wire.refused("restore", session=session, seq=2, args={"snapshot": forgotten}) == "no_session"
        clock.ahead += 50.0
        assert wire.ask("restore", session=session, seq=2, args={"snapshot": snapshot}).error is None
        clock.ahead += 50.0  # being restored renewed it
        assert left(1, 1)
        clock.ahead += 20.0
        eventually(lambda: left(0, 0))
        assert wire.refused("step", session=session, seq=3, arrays=STILL) == "expired"
        assert wire.refused("create", args={"snapshot": snapshot}) == "no_session"
        missing = wire.result("renew", args=held)["missing"]
        assert missing == [session, snapshot]
        eventually(lambda: not backend.counts and not backend.snapshots)


def test_a_snapshot_is_given_back_once() -> None:
    """However many requests discard it at the same time: the memory of others is not given away."""
    limits = Limits(memory=3000)
    with (
        WorldServer(NullBackend(seconds=0.1), "tcp://127.0.0.1:*", limits=limits) as server,
        Wire(server.url) as wire,
    ):
        session = wire.create()
        snapshot = wire.result("snapshot", session=session)["snapshot"]
        for _ in range(3):
            wire.send("discard", args={"snapshot": snapshot})
        for _ in range(3):
            wire.reply()
        wire.create()
        wire.create()
        assert wire.refused("create") == "busy"


def test_sessions_of_a_server_that_is_gone_are_lost(null: Wire) -> None:
    session = null.create()
    with WorldServer(NullBackend(), "tcp://127.0.0.1:*") as server, Wire(server.url) as wire:
        assert wire.refused("step", session=session, seq=1, arrays=STILL) == "session_lost"
        mine = wire.create()
        assert wire.refused("attach", session=mine[:8] + bytes(16)) == "no_session"


def test_memory_and_caps() -> None:
    limits = Limits(memory=5000, sessions=4, snapshots=3)
    with WorldServer(NullBackend(), "tcp://127.0.0.1:*", limits=limits) as server, Wire(server.url) as wire:
        sessions = [wire.create() for _ in range(4)]
        reply = wire.ask("create")
        assert reply.error is not None and reply.error.code == "busy" and reply.error.retry_after
        assert wire.refused("fork", session=sessions[0], args={"n": 2}) == "busy"
        snapshot = wire.result("snapshot", session=sessions[0])["snapshot"]
        assert wire.refused("snapshot", session=sessions[0]) == "busy"  # memory: 5 in all
        wire.result("discard", args={"snapshot": snapshot})
        wire.result("close", session=sessions[1])
        wire.create()
        assert wire.refused("create") == "busy"


def test_a_full_queue_and_deadlines_and_cancellation() -> None:
    backend = Held()
    server = WorldServer(backend, "tcp://127.0.0.1:*", limits=Limits(queue=4), rows=1)
    with server, Wire(server.url) as wire:
        sessions = [wire.create() for _ in range(6)]
        backend.gate.clear()
        sent = [wire.send("step", session=s, seq=1, arrays=STILL) for s in sessions[:2]]
        late = wire.send("step", session=sessions[2], seq=1, arrays=STILL, deadline=0.05)
        dropped = wire.send("step", session=sessions[3], seq=1, arrays=STILL)
        refused = wire.send("step", session=sessions[4], seq=1, arrays=STILL)
        cancel = wire.send("cancel", args={"request": dropped})
        unknown = wire.send("cancel", args={"request": os.urandom(16)})
        replies = {r.id: r for r in (wire.reply() for _ in range(3))}
        assert set(replies) == {refused, cancel, unknown}
        time.sleep(0.1)  # past the deadline of the late one
        backend.gate.set()
        replies |= {r.id: r for r in (wire.reply() for _ in range(4))}
        codes = {k: r.error.code if r.error else "ok" for k, r in replies.items()}
        assert [codes[i] for i in sent] == ["ok", "ok"]
        assert (codes[late], codes[dropped], codes[refused]) == ("deadline", "cancelled", "busy")
        assert replies[cancel].result == {"cancelled": True}
        assert replies[unknown].result == {"cancelled": False}
        for session in sessions[2:]:
            assert wire.step(session, 1).result["info"]["chunk"] == 1


def test_an_imagination_is_cancelled_on_its_way(served: Wire) -> None:
    session = served.create()
    sent = served.send("imagine", session=session, arrays={"action": np.zeros((500, 1), np.float32)})
    other = served.create()
    assert served.step(other, 1).error is None  # while it goes on
    assert served.result("cancel", args={"request": sent}) == {"cancelled": True}
    reply = served.reply()
    assert reply.id == sent
    assert reply.error is not None and reply.error.code == "cancelled"


# ---- eyes -----------------------------------------------------------------------------------------------------
def test_viewers_wait_for_changes(null: Wire) -> None:
    session = null.create()
    first = null.ask("next", session=session)
    assert (first.result["at"], first.arrays["frames"].shape) == (1, (4, 16, 16, 3))
    nothing = null.ask("next", session=session, args={"after": 1, "wait": 0.2})
    assert nothing.result["at"] == 1 and not nothing.arrays
    waiting = null.send("next", session=session, args={"after": 1, "jpeg": 90})
    stepped = null.send("step", session=session, seq=1, arrays={"action": np.float32([0.5])})
    replies = {r.id: r for r in (null.reply(), null.reply())}
    seen = replies[waiting]
    assert seen.result["at"] == replies[stepped].result["at"] == 2
    assert seen.result["action"] == "[0.5]"
    assert {"log_prob", "bits_per_dim", "chunk"} <= set(seen.result["info"])
    assert sum(seen.result["sizes"]) == len(seen.arrays["jpeg"])
    assert len(seen.result["sizes"]) == 4
    assert bytes(seen.arrays["jpeg"][:2]) == b"\xff\xd8"
    parked = null.send("next", session=session, args={"after": 2})
    closed = null.send("close", session=session)
    replies = {r.id: r for r in (null.reply(), null.reply())}
    assert replies[closed].error is None
    assert replies[parked].error is not None and replies[parked].error.code == "no_session"
    assert null.refused("next", session=session) == "no_session"


def test_a_broadcast_keeps_the_newest(null: Wire) -> None:
    import zmq

    from envs.serving.protocol import decode_reply, split_frame

    session = null.create()
    port = null.result("broadcast", session=session)["port"]
    assert null.result("broadcast", session=session)["port"] == port
    sub = null.context.socket(zmq.SUB)
    sub.linger, sub.conflate = 0, True
    sub.subscribe(b"")
    sub.connect(f"tcp://127.0.0.1:{port}")
    seq = 0
    while not sub.poll(50):  # until it is there
        seq += 1
        null.step(session, seq)
    for _ in range(20):
        seq += 1
        null.step(session, seq)
    time.sleep(0.3)
    looks = 0
    while sub.poll(20_000):
        looks += 1
        if decode_reply(split_frame(sub.recv())).result["at"] == seq + 1:
            break
    assert 1 <= looks < 20  # it did not look, so others took the place of most
    assert not sub.poll(200)
    null.result("broadcast", session=session, args={"on": False})
    null.step(session, seq + 1)
    assert not sub.poll(200)
    sub.close(0)


# ---- life ----------------------------------------------------------------------------------------------------------
def get(port: int, page: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{page}", timeout=PATIENCE) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_health_pages() -> None:
    with WorldServer(NullBackend(), "tcp://127.0.0.1:*", health=0) as server, Wire(server.url) as wire:
        assert server.health is not None
        port = server.health.port
        session = wire.create()
        wire.step(session, 1)
        assert get(port, "/healthz") == (200, "ok\n")
        assert get(port, "/readyz") == (200, "ok\n")
        assert get(port, "/secrets")[0] == 404
        status, text = get(port, "/metrics")
        assert status == 200
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        numbers = {name: float(value) for name, value in map(str.split, lines)}
        assert numbers["worldmodel_sessions"] == numbers["worldmodel_steps_total"] == 1
        assert numbers["worldmodel_memory"] > 1e7
        server.worker.stop()
        server.worker.join(PATIENCE)
        assert get(port, "/readyz")[0] == 503
        assert get(port, "/healthz")[0] == 200


SERVE = """
import signal, sys
from benchmarks.null_world import NullBackend
from envs.serving.server import WorldServer
server = WorldServer(NullBackend(seconds=0.5), "tcp://127.0.0.1:*", rows=8)
signal.signal(signal.SIGTERM, lambda *_: server.drain())
print(server.url, flush=True)
server.run()
"""


def test_sigterm_under_64_in_flight() -> None:
    """8 rounds of 0.5 s are under way: all 64 are answered, late ones are told, and the server leaves with 0."""
    process = subprocess.Popen([sys.executable, "-c", SERVE], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        with Wire(process.stdout.readline().strip()) as wire:
            parent = wire.create()
            sessions = [parent, *wire.result("fork", session=parent, args={"n": 63})["sessions"]]
            sent = {wire.send("step", session=s, seq=1, arrays=STILL) for s in sessions}
            assert wire.reply().error is None
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            late = wire.send("create")
            replies = [wire.reply() for _ in range(64)]
            assert {r.id for r in replies} - {late} < sent
            codes = [r.error.code if r.error else "ok" for r in replies]
            assert codes.count("ok") == 63 and codes.count("busy") == 1
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.stdout.close()


def test_the_command_serves_and_leaves(tmp_path: Path, toy_path: Path) -> None:
    command = [sys.executable, "-m", "worldmodel", "serve", str(toy_path), "--bind", "tcp://127.0.0.1:*"]
    process = subprocess.Popen([*command, "--health", "0"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        with Wire(line.split()[-1]) as wire:
            assert wire.result("hello")["world"] == "toy"
            assert wire.step(wire.create(), 1).error is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.stderr.close()


def test_large_requests_do_not_pile_up() -> None:
    backend, limits = Held(), Limits(queue_bytes=3000)
    with WorldServer(backend, "tcp://127.0.0.1:*", limits=limits, rows=1) as server, Wire(server.url) as wire:
        sessions = [wire.create() for _ in range(4)]
        large = {"action": np.zeros(250, np.float32)}
        backend.gate.clear()
        for session in sessions:
            wire.send("step", session=session, seq=1, arrays=large)
        error = wire.reply().error
        assert error is not None and error.code == "busy"
        backend.gate.set()
        assert [wire.reply().error for _ in range(3)] == [None] * 3
        assert wire.step(sessions[3], 1).error is None
