"""What is planned is what is taken: bytes of weights, of sessions, of branches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.sessions import actions, walk
from tests.toy import write_toy, write_wan_toy
from worldmodel import plan as planning
from worldmodel.checkpoint import read_spec
from worldmodel.cli import app
from worldmodel.plan import Plan, plan
from worldmodel.published import planned_spec
from worldmodel.state import WorldState
from worldmodel.world import WorldModel


def page_bytes(state: WorldState) -> list[int]:
    pages = {id(s.page): s.page for c in state.context.cache.cohorts for s in c.segments}
    return [p.kv.untyped_storage().nbytes() for p in pages.values()]


@pytest.mark.parametrize("wan", [False, True])
def test_a_session_takes_what_is_planned(tmp_path: Path, wan: bool) -> None:
    if wan:
        pytest.importorskip("diffusers")
    world = WorldModel.load((write_wan_toy if wan else write_toy)(tmp_path / "world"))
    counted = plan(world.spec)
    modules = [world.flow, world.codec, world.actions, *([] if wan else [world.heads])]
    assert sum(counted.weights.values()) == sum(t.nbytes for m in modules for t in m.state_dict().values())
    state = world.initial_state([0])
    if wan:
        state, _ = world.observe(state, np.zeros((1, 1, 32, 32, 3), np.uint8))
    state, _, _ = walk(world, state, actions(1, world.flow.config.window - int(state.steps[0])))
    assert state.context.frames == [world.flow.config.window]
    assert state.context.cache.nbytes == counted.kv_window
    assert page_bytes(state) == [counted.kv_allocated]
    assert sum(t.nbytes for t in state.codec.values()) == counted.codec_state
    context = state.context
    assert context.features is not None
    kept = sum(t.nbytes for t in (state.noisy, state.latent, context.u, context.features))
    assert kept == counted.denoiser_state


def test_a_branch_takes_what_is_planned(tmp_path: Path) -> None:
    world = WorldModel.load(write_toy(tmp_path / "world"))
    counted = plan(world.spec)
    state, _, _ = walk(world, world.initial_state([0]), actions(1, world.flow.config.context))
    forked, _ = world.step(state.fork(3), actions(3, 1)[:, 0])
    old = page_bytes(state)
    assert sorted(page_bytes(forked)) == sorted([*old, 3 * counted.kv_branch])
    assert counted.kv_branch < 0.6 * counted.kv_allocated


def test_bfloat16_halves_weights_and_keys(tmp_path: Path) -> None:
    spec = read_spec(write_toy(tmp_path / "world"))
    full, half = plan(spec), plan(replace(spec, dtype="bfloat16"))
    assert half.kv_window * 2 == full.kv_window and half.denoiser_state == full.denoiser_state
    assert (
        half.weights["codec"] == full.weights["codec"] and half.weights["flow"] < 0.6 * full.weights["flow"]
    )


def test_the_published_model_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.setenv("WORLDMODEL_CACHE", str(tmp_path))
    counted = plan(planned_spec("apple/starflow-v"))
    assert counted.weights["flow"] == 2 * counted.parameters == 2 * 6_890_096_528
    tokens = 256 + 21 * 30 * 53
    assert counted.streams == 2 and counted.kv_window == 2 * 2 * 24 * 4096 * tokens * 2
    assert not list(tmp_path.iterdir())


def test_what_fits() -> None:
    small = Plan("x", 1, {"flow": 100}, 1, 10, 20, 5, 20, 3, 2, 30)
    assert (small.session, small.branch) == (25, 10)
    assert small.fits(100) == (0, 0) and small.fits(175) == (1, 0) and small.fits(204) == (2, 2)
    assert "does not fit: 175" not in small.lines({"cpu": (204, 300)})[-1]
    assert small.lines({"cpu": (100, 300)})[-1].endswith("needed for one session")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "devices", lambda: {"cpu": (10**9, 2 * 10**9)})
    runner = CliRunner()
    text = runner.invoke(app, ["info", "pendulum", "--plan"])
    assert text.exit_code == 0 and "a session" in text.output and "1.00 GB   free of 2.00 GB" in text.output
    data = json.loads(runner.invoke(app, ["info", "pendulum", "--plan", "--json"]).output)
    room = 10**9 - sum(data["weights"].values()) - data["working"] - data["reencoding"]
    assert data["devices"]["cpu"]["sessions"] == room // data["session"]
    assert data["weights"].keys() == {"flow", "codec", "heads"}


def test_devices_are_those_present() -> None:
    found = planning.devices()
    assert 0 < found["cpu"][0] <= found["cpu"][1]
    assert len(found) == 1 + torch.cuda.device_count()
