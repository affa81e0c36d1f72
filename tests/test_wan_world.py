"""Worlds whose first chunk is one picture: shapes, sessions, and the codec's caches in the state."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from agents import AnomalyMonitor, Clip, LatentDistance, MPCAgent, Planner, SurprisePenalty
from agents.evaluation.trial import Walk
from envs import WorldModelEnv
from tests.sessions import actions, same_chunk, walk
from tests.toy import write_wan_toy
from worldmodel.errors import InputError
from worldmodel.heads import Heads, HeadsConfig
from worldmodel.state import WorldState
from worldmodel.world import WorldModel

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> WorldModel:
    return WorldModel.load(write_wan_toy(tmp_path_factory.mktemp("wan") / "world"))


def picture(rows: int, seed: int = 0, frames: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, frames, 32, 32, 3), dtype=np.uint8)


def begun(world: WorldModel, rows: int = 1) -> WorldState:
    return world.observe(world.initial_state(list(range(rows))), picture(rows))[0]


def test_the_first_chunk_is_a_picture_and_the_others_are_four_frames(world: WorldModel) -> None:
    assert (world.first_frames, world.frames_shape) == (1, (4, 32, 32, 3))
    state = world.initial_state([0, 1])
    assert world.next_frames(state) == 1
    state, chunk = world.observe(state, picture(2))
    assert chunk.frames.shape == (2, 1, 32, 32, 3) and world.next_frames(state) == 4
    state, chunk = world.step(state, np.zeros((2, 1), np.float32))
    assert chunk.frames.shape == (2, 4, 32, 32, 3) and not chunk.reward.any()
    _, chunk = world.step(world.initial_state([0]), np.zeros((1, 1), np.float32))
    assert chunk.frames.shape == (1, 1, 32, 32, 3)
    with pytest.raises(InputError, match=r"expected \(2, 4, 32, 32, 3\)"):
        world.observe(state, picture(2))


def test_a_clip_is_observed_whole(world: WorldModel) -> None:
    clip = picture(2, frames=9)
    after, chunks = world.observe_clip(world.initial_state([0, 1]), clip, None)
    assert [c.frames.shape[1] for c in chunks] == [1, 4, 4] and after.steps.tolist() == [3, 3]
    with pytest.raises(InputError, match=r"8 frames, expected 1 \+ 4 k"):
        world.observe_clip(world.initial_state([0, 1]), clip[:, :8], None)


def test_what_was_observed_is_behind_what_is_decoded(world: WorldModel) -> None:
    """The decoder has seen the latents of observed chunks, the encoder the frames of imagined ones."""
    clip = picture(1, frames=5)
    state, observed = world.observe_clip(world.initial_state([3]), clip, None)
    state, imagined = world.step(state, np.ones((1, 1), np.float32))
    latents = torch.stack([c.latent for c in (*observed, imagined)], dim=1)
    whole, _ = world.codec.decode(latents, world.codec.initial_state(1))
    assert (imagined.frames.int() - whole[:, 5:].int()).abs().max() <= 1
    later = picture(1, seed=9, frames=4)
    _, last = world.observe(state, later)
    everything = torch.cat((torch.from_numpy(clip), imagined.frames, torch.from_numpy(later)), dim=1)
    expected, _ = world.codec.encode(everything, world.codec.initial_state(1))
    torch.testing.assert_close(last.latent, expected[:, -1], rtol=0, atol=1e-5)


def test_fork_select_concat_save_and_load_go_on_bit_for_bit(world: WorldModel, tmp_path: Path) -> None:
    state, a = begun(world), actions(1, 4)
    state, _, _ = walk(world, state, a[:, :2])
    _, expected, _ = walk(world, state, a[:, 2:])
    world.save_state(state, tmp_path / "state.safetensors")
    for other in (
        world.load_state(tmp_path / "state.safetensors"),
        WorldState.concat([state.fork(2), state]).select([0]),
        state.fork(3).select([0]),
    ):
        _, mine, _ = walk(world, other, a[:, 2:])
        assert all(same_chunk(x, y) for x, y in zip(mine, expected, strict=True))


def test_interleaved_sessions_do_not_know_each_other(world: WorldModel) -> None:
    a = actions(3, 3)
    alone = [walk(world, world.initial_state([s]), a[s : s + 1])[1] for s in range(3)]
    states = [world.initial_state([s]) for s in range(3)]
    for t in range(3):
        for s in range(3):
            states[s], chunk = world.step(states[s], a[s : s + 1, t])
            assert same_chunk(chunk, alone[s][t])


def test_sessions_before_and_after_their_first_frame_join_but_do_not_step_together(world: WorldModel) -> None:
    new, old = world.initial_state([7]), begun(world)
    joined = WorldState.concat([new, old])
    for call in (
        lambda: world.step(joined, np.zeros((2, 1), np.float32)),
        lambda: world.observe(joined, picture(2)),
    ):
        with pytest.raises(InputError, match=r"before their first chunk \(1 frames\).*select\(\) them apart"):
            call()
    action = np.zeros((1, 1), np.float32)
    for row, state in ((0, new), (1, old)):
        assert same_chunk(world.step(joined.select([row]), action)[1], world.step(state, action)[1])
    first, _ = world.observe(joined.select([0]), picture(1))
    together = WorldState.concat([first, joined.select([1])])
    assert world.step(together, np.zeros((2, 1), np.float32))[1].frames.shape[1] == 4


def test_the_bank_may_hold_clips_that_begin_with_a_picture(world: WorldModel) -> None:
    bank = {"frames": picture(3, frames=5), "actions": np.zeros((3, 2, 1), np.float32)}
    banked = WorldModel(
        replace(world.spec, bank=True), world.flow, world.codec, world.actions, None, bank, world.fingerprint
    )
    assert banked.start_chunks == 2
    state, chunks = banked.reset([0, 1])
    assert [c.frames.shape[1] for c in chunks] == [1, 4] and state.steps.tolist() == [2, 2]
    with pytest.raises(InputError, match="no bank"):
        world.reset([0])


def test_an_environment_begins_from_a_picture(world: WorldModel) -> None:
    env = WorldModelEnv(world, step_mode="chunk")
    image = picture(1)[0, 0]
    observation, info = env.reset(seed=1, options={"image": image})
    assert observation.shape == (4, 32, 32, 3) and (observation == image).all() and info["chunk"] == 0
    observation, *_ = env.step(np.zeros(1, np.float32))
    assert env.observation_space.contains(observation)
    env.reset(seed=1, options={"clip": picture(1, frames=7)[0]})
    with pytest.raises(InputError, match="no bank"):
        env.reset(seed=1)


def test_agents_say_that_they_need_a_bank(world: WorldModel) -> None:
    pytest.importorskip("stable_baselines3")
    from agents.imagination import ImaginedVecEnv

    with pytest.raises(InputError, match="world wan-toy has no bank of clips; pass"):
        SurprisePenalty.calibrated(world, 1.0)
    with pytest.raises(InputError, match="world wan-toy predicts no reward"):
        ImaginedVecEnv(world)
    judging = copy.copy(world)
    judging.heads = Heads(HeadsConfig(world.latent_shape[0] * 4, 1, 8))
    with pytest.raises(InputError, match="world wan-toy has no bank of whole chunks"):
        ImaginedVecEnv(judging)


def test_agents_see_the_last_of_a_first_chunk(world: WorldModel) -> None:
    """A real environment shows whole chunks from the start, and a monitor is given such."""
    shown, push = picture(1, 3, 4)[0], np.zeros((1, 1), dtype=np.float32)
    state, first = world.observe(world.initial_state([0]), shown[None, -1:])
    goal = LatentDistance(first.latent[0])
    agents = [MPCAgent(world, Planner.preset("fast", candidates=6, horizon=1), goal) for _ in range(2)]
    for agent, frames in zip(agents, (shown, shown[-1]), strict=True):
        agent.reset(frames)
        assert agent.state is not None and torch.equal(agent.state.log_prob, state.log_prob)
    np.testing.assert_array_equal(agents[0].act(), agents[1].act())
    walked = Walk(0, shown, shown[None], [push[0]], np.zeros((1, 3)), False)
    assert torch.equal(walked.before_last(world).log_prob, state.log_prob)
    normal = [Clip(picture(3, seed, 4), np.zeros((3, 1), np.float32)) for seed in range(100)]
    monitor = AnomalyMonitor(world)
    monitor.calibrate(normal, 0.05, progress=False)
    records = monitor.score_episode(*normal[0])
    assert [monitor.step(*chunk).evidence for chunk in zip(*normal[0], strict=True)] == pytest.approx(
        [record.evidence for record in records], rel=1e-3
    )
    with pytest.raises(InputError, match=r"\(1, 3, 32, 32, 3\)"):
        monitor.reset()
        monitor.step(shown[:3], push[0])
