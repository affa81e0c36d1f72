"""The second world that ships: its actions are choices, its episodes end, and what it knows carries over to fresh ones."""

from __future__ import annotations

import math
from typing import NamedTuple

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from agents.evaluation.planning import at_random, play, with_the_prior
from agents.evaluation.trial import auroc, camera, real_env, walk
from worldmodel.checkpoint import find_world
from worldmodel.world import WorldModel

SEED = 3_000_000  # no training episode has one of this size, and no evaluation begins here


@pytest.fixture(scope="module")
def world() -> WorldModel:
    return WorldModel.load("lunarlander")


class Watched(NamedTuple):
    """One fresh real episode of T chunks: the frames, the codec's, what the memory told and what was true (T, 8), how
    probable the end was, and whether it came.
    """

    real: np.ndarray
    decoded: np.ndarray
    told: np.ndarray
    true: np.ndarray
    ending: np.ndarray
    ended: np.ndarray


@pytest.fixture(scope="module")
def watched(world: WorldModel) -> list[Watched]:
    env, heads, episodes = real_env(world), world.heads, []
    assert heads is not None
    for seed in range(SEED, SEED + 8):
        walked = walk(env, camera(world), seed, 100)
        state, _ = world.observe(world.initial_state([seed]), walked.first[None])
        told, ending, decoded = [], [], []
        for frames, action in zip(walked.frames, walked.actions, strict=True):
            state, chunk = world.observe(state, frames[None], np.array([action]))
            told.append(heads.observation(state.seen)[0])
            ending.append(float(chunk.termination))
            decoded.append(world.codec.decode(state.latent[:, None], {})[0][0].numpy())
        ended = np.arange(len(ending)) == len(ending) - 1
        parts = np.stack(decoded), np.stack(told), walked.observations, np.array(ending)
        episodes.append(Watched(walked.frames, *parts, ended & walked.terminated))
    env.close()
    return episodes


def test_fits_in_sixteen_megabytes() -> None:
    assert sum(f.stat().st_size for f in find_world("lunarlander").rglob("*") if f.is_file()) < 16e6


def test_is_a_gymnasium_environment_whose_episodes_end() -> None:
    env = gymnasium.make("worldmodel/Lunarlander-v0", step_mode="chunk")
    check_env(env.unwrapped, skip_render_check=True)
    env.reset(seed=0)
    steps = 0
    while not env.step(0)[2]:  # the engines are off: it falls, and the ground ends the episode
        steps += 1
        assert steps < 100
    env.close()


def test_codec_keeps_real_chunks_to_34_dB(watched: list[Watched]) -> None:
    each = [np.square(episode.decoded.astype(float) - episode.real).mean() for episode in watched]
    assert 10 * math.log10(255**2 / np.mean(each)) > 34


def test_the_memory_tells_what_the_simulator_knows(watched: list[Watched]) -> None:
    """Place, speed, tilt, spin and legs, from pixels alone, while it flies upright."""
    told, true = (np.concatenate([getattr(e, name)[4:] for e in watched]) for name in ("told", "true"))
    told, true = (x[np.abs(true[:, 4]) < 1] for x in (told, true))
    r = [np.corrcoef(told[:, k], true[:, k])[0, 1] for k in range(8)]
    assert (np.array(r) > (0.9, 0.95, 0.75, 0.9, 0.7, 0.5, 0.7, 0.7)).all(), r


def test_the_end_is_told(watched: list[Watched]) -> None:
    scores, ends = (np.concatenate([getattr(e, name) for e in watched]) for name in ("ending", "ended"))
    assert ends.sum() >= 4 and auroc(scores, ends) > 0.95


def test_its_prior_flies_better_than_chance(world: WorldModel) -> None:
    """Without planning, in the real simulator, from pixels alone: about 100 against -260 over many starts."""
    env = real_env(world)
    seeds = range(SEED + 100, SEED + 106)
    own = np.mean([play(env, seed, 120, with_the_prior(world, seed))["return"] for seed in seeds])
    chance = np.mean([play(env, seed, 120, at_random(seed))["return"] for seed in seeds])
    env.close()
    assert own > chance + 100
