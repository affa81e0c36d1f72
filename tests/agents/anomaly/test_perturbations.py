"""What goes wrong with the pendulum does, when it should, and only then."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest

from agents.anomaly.perturbations import ENV_ID, EVERY, ONSET, PERTURBATIONS, perturb_pictures
from worldmodel import InputError
from worldmodel.training.episodes import Episode

SIMULATED = [name for name, p in PERTURBATIONS.items() if p.picture is None]
FILMED = [name for name, p in PERTURBATIONS.items() if p.picture is not None]


def walk(env: gymnasium.Env, seed: int, chunks: int) -> np.ndarray:
    """Observations (chunks, 4, 3) under constant torque."""
    env.reset(seed=seed)
    return np.array([[env.step(np.array([1.0], np.float32))[0] for _ in range(4)] for _ in range(chunks)])


@pytest.mark.parametrize("name", SIMULATED)
def test_the_simulator_goes_wrong_at_its_chunk_and_recovers_at_reset(name: str) -> None:
    pytest.importorskip("pygame")
    begins = PERTURBATIONS[name].begins(30, 5)
    right = walk(gymnasium.make("Pendulum-v1", max_episode_steps=None), 5, 20)
    env = gymnasium.make(ENV_ID, perturbation=name)
    for _ in range(2):
        wrong = walk(env, 5, 20)
        np.testing.assert_array_equal(wrong[: begins[0]], right[: begins[0]])
        assert (wrong[begins[0]] != right[begins[0]]).any()


@pytest.mark.parametrize("name", FILMED)
def test_the_camera_goes_wrong_at_its_chunk(name: str) -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (1 + 4 * 30, 64, 64, 3), dtype=np.uint8)
    episode = Episode(frames, *(np.zeros(30) for _ in range(5)), {"seed": 3})
    perturbation = PERTURBATIONS[name]
    wrong, mask = perturb_pictures(episode, perturbation, 4)
    labels = perturbation.labels(30, 3)
    chunks = (wrong.frames[1:] != frames[1:]).reshape(30, 4, 64, 64, 3)
    np.testing.assert_array_equal(chunks.any((1, 2, 3, 4)), labels == 1)
    assert not chunks.any((0, 1, 4))[~mask].any()
    assert mask.all() == (name != "patch")
    again, _ = perturb_pictures(episode, perturbation, 4)
    np.testing.assert_array_equal(again.frames, wrong.frames)


def test_labels() -> None:
    lasting, event = PERTURBATIONS["mass x2"], PERTURBATIONS["teleport"]
    first = int(lasting.begins(40, 1)[0])
    assert ONSET[0] <= first < ONSET[1]
    assert lasting.labels(40, 1).tolist() == [0] * first + [1] * (40 - first)
    labels = event.labels(40, 1)
    assert np.flatnonzero(labels == 1).tolist() == list(range(first, 40, EVERY))
    assert (labels[:first] == 0).all()
    assert set(labels[first:]) == {1, -1}
    assert len({int(lasting.begins(40, seed)[0]) for seed in range(50)}) == ONSET[1] - ONSET[0]


def test_names_that_are_refused() -> None:
    with pytest.raises(InputError, match="no perturbation 'tint'"):
        gymnasium.make(ENV_ID, perturbation="tint")
    episode = Episode(np.zeros((5, 8, 8, 3), np.uint8), *(np.zeros(1) for _ in range(5)), {"seed": 3})
    with pytest.raises(InputError, match="of the simulator"):
        perturb_pictures(episode, PERTURBATIONS["teleport"], 4)
