"""The monitor of a toy world, whose normal behaviour is its own imagination."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from agents import AnomalyMonitor, Clip, MonitorConfig
from agents.anomaly.drawing import plot_records
from agents.anomaly.monitor import HeatScale
from tests.toy import toy_world
from worldmodel import CheckpointError, InputError, WorldModel


def imagined(world: WorldModel, episodes: int, chunks: int, seed: int) -> list[Clip]:
    """Episodes that the world itself dreams: what it calls normal, if anything is."""
    rng = np.random.default_rng(seed)
    actions = rng.uniform(-2, 2, (episodes, chunks, 1)).astype(np.float32)
    state = world.initial_state([seed + i for i in range(episodes)])
    _, made = world.rollout(state, actions)
    frames = np.stack([np.asarray(chunk.frames) for chunk in made], axis=1)
    return [Clip(f, a) for f, a in zip(frames, actions, strict=True)]


@pytest.fixture(scope="module")
def normal(world: WorldModel) -> list[Clip]:
    return imagined(world, 100, 4, 0)


@pytest.fixture(scope="module")
def monitor(world: WorldModel, normal: list[Clip]) -> AnomalyMonitor:
    made = AnomalyMonitor(world)
    made.calibrate(normal, alpha=0.05, progress=False)
    return made


def numbers(record: object) -> dict[str, object]:
    return {k: v for k, v in vars(record).items() if k != "heatmap"}


def test_an_episode_chunk_by_chunk_or_at_once(monitor: AnomalyMonitor, normal: list[Clip]) -> None:
    clip = normal[7]
    at_once = monitor.score_episode(clip.frames, clip.actions)
    monitor.reset()
    for record, frames, action in zip(at_once, clip.frames, clip.actions, strict=True):
        live = monitor.step(frames, action)
        assert numbers(live) == numbers(record)
        np.testing.assert_array_equal(live.heatmap, record.heatmap)
    assert [r.chunk for r in at_once] == [0, 1, 2, 3]
    assert [r.p_value for r in at_once[:2]] == [1.0, 1.0]
    assert at_once[0].heatmap.shape == (32, 32)
    assert set(at_once[0].channels) > {"nll", "noise_norm", "reconstruction", "action_loss"}


def test_a_foreign_picture_rings(world: WorldModel, monitor: AnomalyMonitor) -> None:
    clip = imagined(world, 1, 5, 999)[0]
    frames = clip.frames.copy()
    frames[3] = np.random.default_rng(0).integers(0, 256, frames[3].shape)
    records = monitor.score_episode(frames, clip.actions)
    assert records[3].alarm
    assert records[3].onset == 3
    assert records[3].score > 2 > records[2].score
    assert not records[2].alarm


def test_scoring_episodes_leaves_the_session(monitor: AnomalyMonitor, normal: list[Clip]) -> None:
    monitor.reset()
    first = [numbers(monitor.step(f, a)) for f, a in zip(*normal[3], strict=True)]
    monitor.reset()
    monitor.step(normal[3].frames[0], normal[3].actions[0])
    assert len(dict(monitor.score_episodes(normal[:3], progress=False))) == 3
    rest = [
        numbers(monitor.step(f, a)) for f, a in zip(normal[3].frames[1:], normal[3].actions[1:], strict=True)
    ]
    assert rest == first[1:]


def test_an_episode_alone_or_among_others(monitor: AnomalyMonitor, normal: list[Clip]) -> None:
    together = dict(monitor.score_episodes(normal[:3], progress=False))
    for i, clip in enumerate(normal[:3]):
        alone = monitor.score_episode(*clip)
        for ours, theirs in zip(together[i], alone, strict=True):
            assert ours.channels == pytest.approx(theirs.channels, rel=1e-4)


def test_clips_may_be_pairs(monitor: AnomalyMonitor, normal: list[Clip]) -> None:
    """Frames and actions, as for `calibrate`."""
    pairs: list[Any] = [tuple(clip) for clip in normal[:2]]
    records = dict(monitor.score_episodes(pairs, progress=False))
    assert numbers(records[1][3]) == numbers(monitor.score_episode(*normal[1])[3])


def test_above_a_limit_of_zero(monitor: AnomalyMonitor, normal: list[Clip]) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    record = replace(monitor.score_episode(*normal[0])[2], evidence=1.0, statistic=0.0)
    above = replace(record, chunk=3, statistic=0.1)
    assert record.relative((0.5, 0.0)) == (2.0, 0.0)
    assert above.relative((0.5, 0.0)) == (2.0, np.inf)
    figure, axes = pyplot.subplots()
    plot_records(axes, [record, above], (0.5, 0.0))
    figure.canvas.draw()
    pyplot.close(figure)


def test_save_and_load(tmp_path: Path, monitor: AnomalyMonitor, normal: list[Clip]) -> None:
    monitor.save(tmp_path / "monitor.safetensors")
    loaded = AnomalyMonitor.load(tmp_path / "monitor.safetensors", monitor.world)
    assert (loaded.alpha, loaded.limits, loaded.config) == (monitor.alpha, monitor.limits, monitor.config)
    before, after = (m.score_episode(*normal[0]) for m in (monitor, loaded))
    assert [numbers(r) for r in before] == [numbers(r) for r in after]
    np.testing.assert_array_equal(before[2].heatmap, after[2].heatmap)


def test_files_that_are_refused(tmp_path: Path, monitor: AnomalyMonitor) -> None:
    path = tmp_path / "monitor.safetensors"
    monitor.save(path)
    other = toy_world(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="another world"):
        AnomalyMonitor.load(path, other)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        AnomalyMonitor.load(path, monitor.world)
    path.write_bytes(whole)
    tensors = load_file(path)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="not a saved monitor"):
        AnomalyMonitor.load(path, monitor.world)
    monitor.save(path)
    from worldmodel.files import load_metadata

    header = load_metadata(path)
    for name, broken in (
        ("values", torch.full_like(tensors["values"], torch.nan)),
        ("lengths", tensors["lengths"] + 1),
        ("cells", tensors["cells"][:1]),
    ):
        save_file({**tensors, name: broken}, path, header)
        with pytest.raises(CheckpointError, match="not a saved monitor"):
            AnomalyMonitor.load(path, monitor.world)


def test_another_configuration_of_the_same_episodes(monitor: AnomalyMonitor, normal: list[Clip]) -> None:
    other = monitor.with_config(MonitorConfig(combination="mean", channels=("nll",)))
    assert other.limits != monitor.limits
    fresh = AnomalyMonitor(monitor.world, other.config)
    fresh.calibrate(normal, 0.05, progress=False)
    assert other.limits == fresh.limits
    with pytest.raises(InputError, match="with and without actions"):
        monitor.with_config(MonitorConfig(actions=False))


def test_without_actions(world: WorldModel, normal: list[Clip], monitor: AnomalyMonitor) -> None:
    blind = AnomalyMonitor(world, MonitorConfig(actions=False))
    blind.calibrate([Clip(clip.frames, None) for clip in normal], 0.05, progress=False)
    record = blind.step(normal[0].frames[0])
    assert "action_loss" not in record.channels
    with pytest.raises(InputError, match="not to know"):
        blind.step(normal[0].frames[1], normal[0].actions[1])
    with pytest.raises(InputError, match="is to know"):
        monitor.step(normal[0].frames[1])
    with pytest.raises(InputError, match="actions are not given"):
        monitor.score_episode(normal[0].frames)


def test_bad_input(world: WorldModel, monitor: AnomalyMonitor, normal: list[Clip]) -> None:
    bare = AnomalyMonitor(world)
    for call in (
        lambda: bare.step(normal[0].frames[0], normal[0].actions[0]),
        lambda: bare.score_episode(*normal[0]),
        lambda: bare.save("nowhere"),
        lambda: bare.limits,
    ):
        with pytest.raises(InputError, match="not calibrated"):
            call()
    with pytest.raises(InputError, match="99 normal episodes, alpha 0.05 needs at least 100; collect 1 more"):
        bare.calibrate(normal[:99])
    with pytest.raises(InputError, match="normal episode 1: frames are"):
        bare.calibrate([normal[0], Clip(normal[1].frames[:, :2], normal[1].actions)])
    with pytest.raises(InputError, match="actions of another length"):
        monitor.score_episode(normal[0].frames, normal[0].actions[:1])
    monitor.reset()
    with pytest.raises(InputError, match="uint8"):
        monitor.step(normal[0].frames[0].astype(float), normal[0].actions[0])
    assert monitor.step(normal[0].frames[0], normal[0].actions[0]).chunk == 0


def test_heat_is_where_the_error_is() -> None:
    heat = HeatScale(np.ones((2, 2)), np.ones((32, 32)))
    pixels = np.ones((32, 32))
    pixels[4:8, 20:24] = 300.0
    found = heat.heatmap(np.ones((2, 2)), pixels)
    assert found.dtype == np.float32
    row, column = np.unravel_index(int(np.argmax(found)), found.shape)
    assert 4 <= row < 8
    assert 20 <= column < 24
    assert found[20:, :10].max() == 0
    cells = np.ones((2, 2))
    cells[1, 0] = 1e6
    assert heat.heatmap(cells, np.ones((32, 32)))[24, 8] == pytest.approx(0.94, abs=0.01)
    assert heat.heatmap(cells, np.ones((32, 32)))[8, 24] == 0.0
