"""A served world is the local one, whoever shares its batches; what a batch holds, and what one row's failure does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import envs
from envs.serving.actions import encode_action
from envs.serving.batches import Batch, held_bytes, together
from envs.serving.protocol import Reply
from envs.serving.server import WorldServer
from envs.serving.world_backend import SCORED, WorldBackend
from tests.envs.serving.wire import Wire
from worldmodel import WorldModel


@pytest.fixture()
def served(toy: WorldModel) -> Iterator[Wire]:
    with WorldServer(WorldBackend(toy), "tcp://127.0.0.1:*") as server, Wire(server.url) as wire:
        yield wire


def same(reply: Reply, outcome: tuple[Any, ...]) -> None:
    """A reply against what a local environment returned, bit for bit."""
    assert reply.error is None, f"{reply.error.code}: {reply.error}" if reply.error else ""
    np.testing.assert_array_equal(reply.arrays["observation"], outcome[0])
    assert reply.result["info"] == outcome[-1]
    if len(outcome) == 5:
        assert (reply.result["reward"], reply.result["terminated"], reply.result["truncated"]) == outcome[1:4]


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


@pytest.mark.parametrize(
    "wrong", [np.zeros(10_000, np.float32), np.float32([9.0]), np.float32([np.nan])], ids=len
)
def test_a_wrong_action_inside_a_chunk_is_refused(served: Wire, wrong: np.ndarray) -> None:
    session = served.create(step_mode="frame")
    assert served.step(session, 1).error is None
    assert served.refused("step", session=session, seq=2, arrays={"action": wrong}) == "invalid"
    assert served.refused("step", session=session, seq=2) == "invalid"
    assert served.ask("next", session=session).result["action"] == "[0.0]"
    assert served.step(session, 2).error is None


def test_sessions_that_stay_together_are_not_copied(toy: WorldModel) -> None:
    state = toy.reset([0, 1, 2, 3])[0]
    slots = Batch(state).slots()
    joined, place = together([slots[2], slots[0], slots[3], slots[1]])
    assert joined is state and place == [2, 0, 3, 1]
    fewer, place = together([slots[3], slots[1]])
    assert fewer.rows == 2
    assert fewer.seeds[place].tolist() == [3, 1]
    assert len(fewer.context.cache.cohorts) == 1


def test_rows_that_nobody_needs_are_let_go(toy: WorldModel) -> None:
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


def test_an_imagination_is_cancelled_on_its_way(served: Wire) -> None:
    session = served.create()
    sent = served.send("imagine", session=session, arrays={"action": np.zeros((500, 1), np.float32)})
    other = served.create()
    assert served.step(other, 1).error is None  # while it goes on
    assert served.result("cancel", args={"request": sent}) == {"cancelled": True}
    reply = served.reply()
    assert reply.id == sent
    assert reply.error is not None and reply.error.code == "cancelled"
