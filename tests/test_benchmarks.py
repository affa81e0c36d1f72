"""The benchmark measures what it says: the baseline is the same model, FLOPs are counted, switches switch."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import baseline, dial, long_runs, peers, shapes, steps
from benchmarks.ablation import (
    float32_weights,
    jacobi_and_commit,
    nothing_kept,
    plain_weights,
    window_denoised,
)
from benchmarks.baseline import Baseline, exact
from benchmarks.measure import flops, table, torch_alone
from benchmarks.report import Options, run
from tests.sessions import actions, features, small_world
from tests.toy import write_toy
from worldmodel import native
from worldmodel.errors import InputError
from worldmodel.flow import flow as flow_module
from worldmodel.packed import Linear, is_packed, multiplies_halves, pack
from worldmodel.sampling import Sampling


@pytest.mark.parametrize("threshold", [0.0, 1e-3])
def test_the_baseline_samples_the_same_model(threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run to the end it is the exact inverse, with the world's denoiser and decoder; as published it is near."""
    monkeypatch.setattr(baseline, "THRESHOLD", threshold)
    world = small_world()
    a = features(world, actions(2, 5))
    sampler = Baseline(world.flow, 2, world.grid, 6)
    context = world.flow.deep.start(2, world.grid, 6, features=world.flow.config.action_features)
    noisy = []
    for t in range(5):
        w = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(t))
        u, x = exact(world.flow, context, w, a[:, t : t + 1])
        context, _ = world.flow.deep.commit(world.flow.deep.reserve(context), u, a[:, t : t + 1])
        sampler.step(w, a[:, t : t + 1])
        noisy.append(x)
        error = (sampler.noisy[-1] - x[:, 0]).abs().max()
        assert error < 1e-4 if threshold == 0.0 else error < 0.5
    seen = Baseline(world.flow, 2, world.grid, 6)  # the same frames in one pass, and one more
    seen.observe(context.u[:, -5:], torch.cat(noisy, dim=1), a)
    w = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(9))
    for each in (sampler, seen):
        each.step(w, a[:, :1])
    error = (sampler.noisy[-1] - seen.noisy[-1]).abs().max()
    assert error < 1e-4 if threshold == 0.0 else error < 0.5
    for kept in (sampler.noisy, sampler.features):
        kept.pop()
    if threshold == 0.0:
        clean = world.flow.denoise(torch.cat(noisy, dim=1), world.grid, None, a)
        assert torch.allclose(sampler.clean(), clean, atol=1e-4)
        frames = sampler.decode(world.codec, clean)
        alone, _ = world.codec.decode(world.flow.latents(clean[:, -1:], world.grid), {})
        assert torch.equal(frames[:, -4:], alone)


def test_flops_of_packed_and_plain_products_are_those_of_the_formula() -> None:
    for packed, halves in ((False, False), (True, False), (True, True)):
        linear = Linear(32, 64).requires_grad_(False)
        if halves:
            linear.weight.copy_(linear.weight.half())
        conv = nn.Conv2d(4, 8, 3, padding=1).requires_grad_(False)
        if packed:
            pack(linear)
            parts = nn.ModuleList([conv])
            pack(parts)
        x, residual, picture = torch.randn(2, 5, 32), torch.randn(2, 5, 64), torch.randn(3, 4, 6, 6)
        assert flops(lambda: linear(x)) == 2 * 10 * 32 * 64  # noqa: B023
        assert flops(lambda: linear.plus(x, residual)) == 2 * 10 * 32 * 64  # noqa: B023
        assert flops(lambda: linear.gelu(x)) == 2 * 10 * 32 * 64  # noqa: B023
        assert flops(lambda: conv(picture)) == 2 * 3 * 36 * 8 * 4 * 9  # noqa: B023


def test_switches_switch_and_switch_back() -> None:
    world = small_world()
    state = world.initial_state([1])
    action = actions(1, 1)[:, 0]
    _, chunk = world.step(state, action)
    few = flow_module.ONE_BY_ONE
    with jacobi_and_commit():
        assert flow_module.ONE_BY_ONE == 0
        _, other = world.step(state, action)
    assert few == flow_module.ONE_BY_ONE
    assert torch.allclose(chunk.latent, other.latent, atol=1e-4)
    with window_denoised():
        _, whole = world.step(state, action)
    assert torch.allclose(chunk.latent, whole.latent, atol=1e-5)
    halved = copy.copy(world)
    halved.flow = copy.deepcopy(world.flow)
    for weight in halved.flow.parameters():
        weight.copy_(weight.half())
    full = float32_weights(halved)
    with torch_alone():
        assert halved.flow.native is None and native.library() is None
        slow = halved.step(state, action)[1].latent
        assert torch.allclose(full.step(state, action)[1].latent, slow, atol=1e-4)
    fast = halved.step(state, action)[1].latent
    assert torch.allclose(fast, slow, atol=1e-4) and (halved.flow.native is None) == (
        native.library() is None
    )
    after, _ = world.step(state, action)
    with nothing_kept():
        anew = world.step(after, action)[1].latent
    assert torch.equal(anew, world.step(after, action)[1].latent)
    if multiplies_halves() and is_packed(world.flow):
        layers = [[m for m in w.flow.deep.modules() if isinstance(m, Linear)] for w in (halved, full)]
        assert any(m._half for m in layers[0]) and not any(m._half for m in layers[1])
    plain = plain_weights(world)
    if is_packed(world.flow.deep):
        assert not is_packed(plain.flow.deep)
    assert torch.allclose(plain.step(state, action)[1].latent, chunk.latent, atol=1e-4)


def test_stages_add_up_and_forks_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    world = small_world()
    rows = {row["stage"]: row for row in steps.by_stage(world, 1, 2, 100.0)}
    parts = [
        rows[name]["ms"] for name in ("window", "deep", "commit", "shallow", "denoise", "decode", "other")
    ]
    assert sum(parts) + rows["heads"]["ms"] == pytest.approx(rows["step"]["ms"], rel=1e-6)
    assert rows["deep"]["MFLOP"] > 0
    plans = steps.planning(world, [1, 4], 2, 1, False)
    assert {row["branches"] for row in plans} == {1, 4} and plans[0]["x one branch"] == 1
    fork, copy = steps.forks(world, 8, 1)
    assert fork["bytes a branch"] < copy["bytes a branch"] / 10


def test_the_dial_bounds_the_error_against_the_exact_inverse() -> None:
    world = small_world()
    for rows in (dial.of_world(world, 2, 2), dial.of_long_frames(4, 2)):
        assert [row["tolerance"] for row in rows if row["default"]] == [Sampling().tolerance]
        assert all(row["error of x~"] <= row["worst"] <= row["sqrt"] + 1e-5 for row in rows)
        sweeps = [row["sweeps"] for row in rows]
        assert sweeps == sorted(sweeps) and rows[0]["error of x~"] >= rows[-1]["error of x~"]
        levels = [row["frames, p99 levels"] for row in rows if row["default"]]
        assert levels[0] is None or levels[0] <= 1
    assert rows[0]["error of x~"] > 1e-3 and rows[0]["sweeps"] < rows[-1]["sweeps"] == 16


def test_latency_is_told_by_what_happened() -> None:
    wall = np.array([1.0, 1.0, 1.0, 4.0, 3.0])
    cpu = np.array([1.0, 1.0, 1.0, 1.0, 3.0])
    rows = {r["steps in which"]: r for r in long_runs.by_cause(wall, cpu, ["a", "a", "b", "b", "b"])}
    assert {name: row["steps"] for name, row in rows.items()} == {
        "all": 5,
        "a": 2,
        "b": 2,
        long_runs.WAITING: 1,
    }
    assert rows["all"]["over 1.5 p50"] == 2 and rows[long_runs.WAITING]["p50 ms"] == 4000
    assert rows["all"]["CPU p99/p50"] < rows["all"]["p99/p50"]
    world = small_world()
    assert sum(row["steps"] for row in long_runs.latency(world, 30)[1:]) == 30


def test_memory_of_a_session_is_flat() -> None:
    rows = long_runs.memory(small_world(), 48, 4)
    assert [row["steps"] for row in rows] == [0, 12, 24, 36, 48]
    assert len({row["state kB"] for row in rows}) <= small_world().flow.config.window
    assert max(row["pages kB"] for row in rows[1:]) <= 2 * max(row["pages kB"] for row in rows[:2])
    assert all(row["process MB"] > 10 for row in rows)


def test_the_large_sweep_is_little_more_than_its_products() -> None:
    """Its work is the published model's (52 TFLOP at 11 frames of context, two streams), and no operation is a mask, a copy
    of the past or anything else of its size.
    """
    rows = {row["context"]: row for row in shapes.computed()}
    assert rows[11]["TFLOP"] == pytest.approx(52, rel=0.1)
    assert all(1.0 < row["x floor"] < 1.25 for row in rows.values())
    assert rows[20]["one by one ms"] - rows[20]["floor ms"] < 1.05 * (
        rows[1]["one by one ms"] - rows[1]["floor ms"]
    )


@pytest.mark.parametrize("name", list(peers.PEERS))
def test_peers_imagine_from_their_past_and_action(name: str) -> None:
    """Frames of 64 x 64 that follow the action and what came before; by the same noise the same ones."""

    def frames(*pushes: float) -> torch.Tensor:
        torch.manual_seed(0)
        peer = peers.PEERS[name][1](2)
        with torch.no_grad():
            seen = [peer(torch.full((2, peers.ACTIONS), push)) for push in pushes]
        return seen[-1]

    one = frames(0.5, 0.5)
    assert one.shape == (2, 3, peers.SIZE, peers.SIZE) and one.isfinite().all()
    assert torch.equal(one, frames(0.5, 0.5))
    assert not torch.equal(one, frames(0.5, -0.5))  # the action
    assert not torch.equal(one, frames(-0.5, 0.5))  # the past


def test_peers_are_of_their_shape_and_compared_by_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        peers.PEERS, "absent", ("no_such_library", lambda *given: pytest.fail("it was built"))
    )
    world = small_world()
    ours, *others, skipped = peers.against_peers(world, [1], 1)
    assert [row["model"] for row in others] == ["DIAMOND", "Dreamer", "DreamerV3"]
    assert skipped == {"model": "absent", "skipped": "pip install no_such_library"}
    assert ours["x ours a step"] == ours["x ours a frame"] == 1.0
    for row in others:
        assert row["x ours a frame"] == pytest.approx(row["x ours a step"] * world.chunk_frames)
    assert others[0]["parameters"] == pytest.approx(3.2e6, rel=0.05)  # the U-Net and the actions
    assert others[0]["MFLOP a frame"] == pytest.approx(18_000, rel=0.1)


def test_reports_as_tables_and_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = str(write_toy(tmp_path / "toy"))
    threads = torch.get_num_threads()
    run(Options(world, quick=True, only=("fork",), threads=threads, as_json=True))
    result = json.loads(capsys.readouterr().out)
    assert result["fork"][0]["way"] == "fork" and result["peak"]["best float32 gflops"] > 0
    assert table("t", [{"a": 1, "b": 2.5}, {"a": 10}]).splitlines()[2:] == [" a    b", " 1  2.5", "10     "]
    with pytest.raises(InputError, match="no section 'nonsense'"):
        run(Options(world, only=("nonsense",), threads=threads))


def test_the_command_finds_its_own_benchmarks(tmp_path: Path) -> None:
    """Other distributions install a package of that name too."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "theirs.py").write_text("")
    root = str(Path(__file__).parents[1])
    command = [sys.executable, "-m", "worldmodel", "bench", "--only", "deep,nothing"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), root))}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "no section 'nothing'; expected one of: batch" in done.stderr
