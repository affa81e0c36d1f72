"""Fine-tuning: unchanged at step 0, resumable, merged; worlds with and without actions and prompts."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from tests.ranks import on_ranks
from tests.toy import BOX, FRAME, toy_flow, write_toy, write_wan_toy
from worldmodel.checkpoint import read_world
from worldmodel.condition.actions import ActionEncoder
from worldmodel.condition.spaces import space_to_json
from worldmodel.errors import ConfigError, DataError
from worldmodel.files import load_tensors, read_json, write_json
from worldmodel.flow.flow import Flow
from worldmodel.sampling import Sampling
from worldmodel.training.codec import encode_dataset, load_latents
from worldmodel.training.episodes import Episode, EpisodeDataset, episode_path, save_episode
from worldmodel.training.evaluate import held_out_dataset
from worldmodel.training.finetune import Finetune, add_adapters, finetune, merge_adapters, with_actions
from worldmodel.training.flow import FlowStage, Latents
from worldmodel.training.heads import HeadsTraining
from worldmodel.training.loop import Interrupted, LoopConfig
from worldmodel.training.parallel import Ranks
from worldmodel.training.provenance import first_held_out
from worldmodel.world import WorldModel

ROOT = Path(__file__).parents[2]
TEXT = spaces.Text(64)
LOOP = LoopConfig(steps=6, lr=1e-3, warmup=1)
CONFIG = Finetune(
    LOOP, HeadsTraining(LOOP, batch=8), lora=2, batch=4, length=4, bf16=False, compiled=False, threads=1
)


class Spelled:
    """As good as any text encoder: (n, 3, 5) numbers for each caption."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def without_start(self, caption: str) -> str:
        return f"(extend) {caption}"

    def __call__(self, captions: Sequence[str]) -> torch.Tensor:
        self.asked.extend(captions)
        generators = [torch.Generator().manual_seed(sum(map(ord, c))) for c in captions]
        return torch.stack([torch.randn(3, 5, generator=g) for g in generators])


def write_episodes(
    folder: Path,
    space: spaces.Space[Any] = BOX,
    episodes: int = 4,
    chunks: int = 6,
    size: tuple[int, int] = FRAME,
) -> Path:
    """A square that moves as the action says."""
    space.seed(0)
    for i in range(episodes):
        actions = np.array([space.sample() for _ in range(chunks)])
        speed = np.zeros(chunks) if isinstance(space, spaces.Text) else actions.reshape(chunks, -1)[:, 0]
        places = np.cumsum(np.concatenate([[i], np.repeat(speed, 4)])).astype(int) % (size[1] - 8)
        frames = np.full((1 + 4 * chunks, *size, 3), 90, dtype=np.uint8)
        for frame, at in zip(frames, places, strict=True):
            frame[8:16, at : at + 8] = (200, 30, 30)
        ends = np.arange(chunks) == chunks - 1
        episode = Episode(
            frames,
            actions,
            np.arange(chunks, dtype=np.float32),
            ends,
            np.zeros(chunks, dtype=bool),
            np.zeros((len(frames), 0), dtype=np.float32),
            {"caption": f"square {i % 2}"},
        )
        save_episode(episode_path(folder, i), episode)
    info = {"format_version": 1, "complete": True, "episodes": episodes, "frame_skip": 4, "fps": 20.0}
    info |= {"frame_size": list(size), "action_space": space_to_json(space), "collect": {"env": "squares"}}
    write_json(folder / "dataset.json", info)
    return folder


# ---- the action path --------------------------------------------------------------------------------------------------
def test_a_new_action_path_changes_nothing_until_it_is_trained(tmp_path: Path) -> None:
    files = read_world(write_toy(tmp_path / "toy", TEXT, action_features=0))
    flow, codec, _, heads = files.build("cpu")
    parts = with_actions(flow, BOX, 16).eval()
    wider, encoder = parts["flow"], parts["actions"]
    assert isinstance(wider, Flow) and isinstance(encoder, ActionEncoder)
    spec = replace(
        files.spec, flow=wider.config, actions=encoder.config, action_space_json=space_to_json(BOX)
    )
    old = WorldModel(files.spec, flow, codec, None, heads, files.starts)
    new = WorldModel(spec, wider, codec, encoder, heads, files.starts)
    # the heads take the packed action, so they are the one part that must be new; frames and nats come before them
    new.heads = type(heads)(replace(heads.config, packed=1)).eval()
    clip, action = files.starts["frames"][:2], np.ones((2, 1), dtype=np.float32)
    before, after = old.initial_state([1, 2]), new.initial_state([1, 2])
    for t in range(2):
        before, seen = old.observe(before, clip[:, t])
        after, seen_new = new.observe(after, clip[:, t], action)
        assert torch.equal(seen.log_prob, seen_new.log_prob)
    for t in range(8):  # past the window
        before, chunk = old.step(before)
        after, chunk_new = new.step(after, action * np.cos(t), Sampling(guidance=0.0))
        assert torch.equal(chunk.frames, chunk_new.frames)
        # a second stream, of the action gain, runs beside: sums of other shapes
        assert torch.allclose(chunk.log_prob, chunk_new.log_prob, rtol=1e-6)
        assert chunk_new.action_gain.abs().max() < 1e-4
    torch.nn.init.normal_(wider.deep.transformer.proj_action.weight)
    _, moved = new.step(after, action)
    assert (moved.action_gain != 0).all()


@torch.no_grad()
def test_a_world_with_prompts_keeps_its_density_when_it_gets_actions() -> None:
    flow = toy_flow(text_tokens=3, text_dim=5, action_features=0)
    parts = with_actions(flow, BOX, 8)
    x, text = torch.randn(2, 3, 4, 3), Spelled()(["a", "b"])
    features = parts["actions"](torch.ones(2, 3, 1), torch.ones(2, 3, dtype=torch.bool))
    assert features.abs().min() > 0
    assert torch.equal(flow(x, (2, 2), text).log_prob, parts["flow"](x, (2, 2), text, features).log_prob)
    sampled = [
        f.sample(x, (2, 2), text=text, features=e) for f, e in ((flow, None), (parts["flow"], features))
    ]
    assert torch.equal(*sampled)


# ---- adapters ---------------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_adapters_begin_as_nothing_train_alone_and_merge() -> None:
    parts = with_actions(toy_flow(action_features=0), BOX, 8)
    x = torch.randn(2, 3, 4, 3)
    before = parts["flow"](x, (2, 2)).log_prob
    add_adapters(parts, 2)
    assert torch.equal(parts["flow"](x, (2, 2)).log_prob, before)
    trained = {n for n, p in parts.named_parameters() if p.requires_grad}
    assert all(
        n.startswith("actions.") or "proj_action" in n or n.endswith((".up", ".down")) for n in trained
    )
    layers = len([m for m in parts.modules() if type(m).__name__ == "Layer"])
    assert len([n for n in trained if n.endswith(".up")]) == 4 * layers
    for name, weight in parts.named_parameters():
        if name.endswith(".0.up"):
            torch.nn.init.normal_(weight, std=0.1)
    adapted = parts["flow"](x, (2, 2)).log_prob
    assert not torch.allclose(adapted, before, atol=1e-2)
    merge_adapters(parts)
    assert torch.equal(parts["flow"](x, (2, 2)).log_prob, adapted)
    assert {n for n, _ in parts["flow"].named_parameters()} == {
        n for n, _ in Flow(parts["flow"].config).named_parameters()
    }


# ---- the whole way ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lora", [0, 2])
def test_a_killed_run_goes_on_to_the_same_world(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: int
) -> None:
    toy, data = write_toy(tmp_path / "toy"), write_episodes(tmp_path / "data")
    config = replace(CONFIG, lora=lora)
    assert finetune(toy, str(data), tmp_path / "run", tmp_path / "whole", config) is not None
    backward, calls = FlowStage.backward, []

    def interrupted(stage: FlowStage, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return backward(stage, *arguments)

    monkeypatch.setattr(FlowStage, "backward", interrupted)
    with pytest.raises(Interrupted, match="stopped at step 3"):
        finetune(toy, str(data), tmp_path / "again", tmp_path / "killed", config)
    finetune(toy, str(data), tmp_path / "again", tmp_path / "killed", config)
    assert len(calls) == config.loop.steps
    for part in ("flow", "heads", "codec"):
        whole, killed = (load_tensors(tmp_path / n / f"{part}.safetensors") for n in ("whole", "killed"))
        assert whole.keys() == killed.keys() and all(torch.equal(whole[k], killed[k]) for k in whole)
    spec = read_world(tmp_path / "killed").spec
    assert spec.action_space == BOX and spec.provenance["base"] == "toy"
    assert set(spec.quality["bits_per_dim"]) == {"before", "after"}
    assert spec.provenance["trained_on"][-1]["episodes"] == 4
    with pytest.raises(
        ConfigError, match=r"was made otherwise \(settings\.loop\.lr, settings\.batch differ\)"
    ):
        other = replace(config, batch=2, loop=replace(LOOP, lr=2e-3))
        finetune(toy, str(data), tmp_path / "again", tmp_path / "x", other)


def test_a_world_with_prompts_learns_actions_from_captioned_episodes(tmp_path: Path) -> None:
    toy = write_toy(tmp_path / "toy", TEXT, action_features=0, text_tokens=3, text_dim=5)
    data = write_episodes(tmp_path / "data", spaces.MultiDiscrete([3, 2]))
    prompts = Spelled()
    world = finetune(toy, str(data), tmp_path / "run", tmp_path / "out", CONFIG, prompts=prompts)
    extended = ["(extend) square 0", "(extend) square 1"]
    assert world is not None and prompts.asked == ["", *extended, "square 0", "square 1"]
    assert world.spec.action_space == spaces.MultiDiscrete([3, 2]) and world.spec.flow.text_tokens == 3
    assert world.flow.deep.transformer.proj_action.weight.abs().max() > 0
    state, chunks = world.reset([0])
    state, chunk = world.step(state, np.array([[2, 1]]))
    assert torch.isfinite(chunk.log_prob).all() and chunk.action_gain.abs().max() > 0


def test_captions_are_embedded_by_the_encoder_that_comes_with_the_world(tmp_path: Path) -> None:
    toy = write_toy(tmp_path / "toy", TEXT, action_features=0, text_tokens=3, text_dim=5)
    data = write_episodes(tmp_path / "data", spaces.MultiDiscrete([3, 2]))
    world = finetune(toy, str(data), tmp_path / "run", tmp_path / "out", CONFIG)
    assert world is not None
    state, _ = world.reset([0], prompts=["square 1"])
    _, chunk = world.step(state, np.array([[2, 1]]))
    assert torch.isfinite(chunk.log_prob).all()


def test_captions_alone_leave_the_action_space_as_it_is(tmp_path: Path) -> None:
    toy = write_toy(tmp_path / "toy", TEXT, action_features=0, text_tokens=3, text_dim=5)
    data = write_episodes(tmp_path / "data", TEXT)
    world = finetune(
        toy, str(data), tmp_path / "run", tmp_path / "out", replace(CONFIG, lora=0), prompts=Spelled()
    )
    assert world is not None and world.actions is None and isinstance(world.spec.action_space, spaces.Text)
    with pytest.raises(DataError, match="has no actions, but the world takes some; put every clip's"):
        finetune(write_toy(tmp_path / "box"), str(data), tmp_path / "other", tmp_path / "x", CONFIG)


def test_what_cannot_go_well_is_told_before_it_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy, data = write_toy(tmp_path / "toy"), write_episodes(tmp_path / "data")

    def told(self: object, description: str) -> None:
        raise Interrupted(capsys.readouterr().err)

    monkeypatch.setattr("worldmodel.training.loop.Run.fit", told)
    for length, psnr in ((99, 24.6), (6, 30.5)):
        monkeypatch.setattr("worldmodel.training.finetune.codec_psnr", lambda *a, psnr=psnr: psnr)
        with pytest.raises(Interrupted) as at:
            finetune(toy, str(data), tmp_path / f"{length}", tmp_path / "out", replace(CONFIG, length=length))
        lines = [line for line in str(at.value).splitlines() if "warning" in line]
        warned = (
            "length 99 is beyond the world's window; training on 6 latent frames",
            "the world's codec reproduces this data at 24.6 dB, below 30",
        )
        assert len(lines) == (2 if length == 99 else 0)
        assert all(words in line for words, line in zip(warned, lines, strict=False))


def test_clips_of_one_chunk_are_too_short(tmp_path: Path) -> None:
    data = write_episodes(tmp_path / "data", chunks=1)
    with pytest.raises(DataError, match=r"no clip to train on has 2 chunks of 4 frames.* give longer clips"):
        finetune(write_toy(tmp_path / "toy"), str(data), tmp_path / "run", tmp_path / "out", CONFIG)


def test_episodes_of_another_size_are_refused(tmp_path: Path) -> None:
    data = write_episodes(tmp_path / "data", size=(16, 32))
    with pytest.raises(DataError, match=r"\(16, 32\), the world 4 of \(32, 32\)"):
        finetune(write_toy(tmp_path / "toy"), str(data), tmp_path / "run", tmp_path / "out", CONFIG)


def test_a_world_of_another_run_is_not_written_over(tmp_path: Path) -> None:
    toy, data = write_toy(tmp_path / "toy"), write_episodes(tmp_path / "data")
    with pytest.raises(ConfigError, match="toy holds another world; choose another --out"):
        finetune(toy, str(data), tmp_path / "run", tmp_path / "toy", CONFIG)
    for _ in range(2):
        assert finetune(toy, str(data), tmp_path / "run", tmp_path / "out", CONFIG) is not None
    other = replace(CONFIG, batch=2)
    with pytest.raises(ConfigError, match="out holds another world; choose another --out"):
        finetune(toy, str(data), tmp_path / "other", tmp_path / "out", other)
    assert not (tmp_path / "other").exists()


def test_a_source_that_is_none_leaves_the_run_to_the_right_one(tmp_path: Path) -> None:
    toy, data = write_toy(tmp_path / "toy"), write_episodes(tmp_path / "data")
    with pytest.raises(DataError, match="no such folder"):
        finetune(toy, str(tmp_path / "dta"), tmp_path / "run", tmp_path / "out", CONFIG)
    assert finetune(toy, str(data), tmp_path / "run", tmp_path / "out", CONFIG) is not None


def test_a_published_world_is_obtained_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy, data = write_toy(tmp_path / "toy"), write_episodes(tmp_path / "data")
    monkeypatch.setattr("worldmodel.training.finetune.obtain", {"apple/starflow-v": toy}.__getitem__)
    world = finetune("apple/starflow-v", str(data), tmp_path / "run", tmp_path / "out", CONFIG)
    assert world is not None and world.spec.provenance["base"] == "toy"


def test_a_world_of_foreign_data_names_no_environment(tmp_path: Path) -> None:
    """Its own episodes are known again, and those that its base was trained on are kept in mind."""
    toy, data = write_toy(tmp_path / "toy"), write_episodes(tmp_path / "data")
    info = read_json(data / "dataset.json")
    write_json(data / "dataset.json", info | {"collect": {"env": "videos", "camera": "top"}})
    base = finetune(toy, str(data), tmp_path / "run", tmp_path / "base", CONFIG)
    assert base is not None and base.spec.environment == {} and base.spec.provenance["camera"] == "top"
    with pytest.raises(DataError, match="names no environment to collect from; give --data"):
        held_out_dataset(base, 2)
    more = write_episodes(tmp_path / "more")
    world = finetune(tmp_path / "base", str(more), tmp_path / "run2", tmp_path / "out", CONFIG)
    assert world is not None
    for folder in (data, more):
        assert first_held_out(world.spec, EpisodeDataset.open(folder)) == 4 - 1


class FirstPicture:
    """A codec whose first latent frame is one picture, as Wan's is; the mean colour of 2 x 2 cells."""

    first_frames, temporal_stride = 1, 4

    def initial_state(self, batch: int) -> dict[str, torch.Tensor]:
        return {}

    def encode(self, frames: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        kept = frames[:, ::4].float().unflatten(2, (2, -1)).unflatten(4, (2, -1)).mean((3, 5))
        return kept.permute(0, 1, 4, 2, 3), state


def test_the_first_picture_of_a_causal_codec_is_caused_by_no_action(tmp_path: Path) -> None:
    dataset = EpisodeDataset.open(write_episodes(tmp_path / "data"))
    encode_dataset(FirstPicture(), dataset, tmp_path / "latents.safetensors")
    episodes = load_latents(tmp_path / "latents.safetensors")
    data = Latents.of(episodes, BOX)
    assert data.lengths.tolist() == [7, 7, 7, 7] and data.present is not None
    assert data.present[:7].tolist() == [False] + [True] * 6
    np.testing.assert_allclose(data.packed[1:7, 0], dataset.episode(0).actions[:, 0] / 2, atol=1e-6)
    assert data.rewards[:7].tolist() == [0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert data.terminated[:7].tolist() == [False] * 6 + [True]


def test_a_published_world_learns_in_bfloat16_from_its_first_picture_on(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    toy = write_wan_toy(tmp_path / "toy", dtype="bfloat16")
    data = write_episodes(tmp_path / "data", spaces.Discrete(3), chunks=4)
    config = replace(CONFIG, bf16=True)
    world = finetune(toy, str(data), tmp_path / "run", tmp_path / "out", config)
    assert world is not None and world.spec.dtype == "bfloat16" and not world.spec.bank
    stored = load_tensors(tmp_path / "out" / "flow.safetensors")
    assert {t.dtype for name, t in stored.items() if name.startswith("flow.")} == {torch.bfloat16}
    assert load_latents(tmp_path / "run" / "latents.safetensors")[0].latents.shape[0] == 5
    assert world.heads is not None  # the data has rewards
    clip = EpisodeDataset.open(data).episode(0).frames[None]
    state, _ = world.observe(world.initial_state([0]), clip[:, :1])
    _, chunk = world.observe(state, clip[:, 1:5], np.array([2]))
    assert torch.isfinite(chunk.log_prob).all() and chunk.action_gain.abs().max() > 0


def test_the_shipped_world_learns_from_a_few_episodes(tmp_path: Path) -> None:
    space = spaces.Discrete(2)  # as CartPole's: another action space than the world's own
    data = write_episodes(tmp_path / "data", space, episodes=3, chunks=5, size=(64, 64))
    config = replace(CONFIG, loop=replace(LOOP, steps=3))
    world = finetune("pendulum", str(data), tmp_path / "run", tmp_path / "out", config)
    assert world is not None and world.spec.action_space == space
    state, _ = world.reset([0])
    _, chunk = world.step(state, np.array([1]))
    assert chunk.frames.shape == (1, 4, 64, 64, 3) and torch.isfinite(chunk.log_prob).all()


def two_ranks(root: Path) -> None:
    with Ranks.joined() as ranks:
        world = finetune(root / "toy", str(root / "data"), root / "two", root / "both", CONFIG, ranks=ranks)
        assert (world is not None) == ranks.first


@pytest.mark.slow
def test_two_ranks_make_the_world_that_one_makes(tmp_path: Path) -> None:
    write_toy(tmp_path / "toy")
    write_episodes(tmp_path / "data")
    finetune(tmp_path / "toy", str(tmp_path / "data"), tmp_path / "one", tmp_path / "alone", CONFIG)
    on_ranks(2, two_ranks, tmp_path)
    alone, both = (load_tensors(tmp_path / n / "flow.safetensors") for n in ("alone", "both"))
    for name, weight in alone.items():
        torch.testing.assert_close(both[name].float(), weight.float(), rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_torchrun_stopped_by_ctrl_c_continues_on_one_process(tmp_path: Path) -> None:
    toy, data, run, out = (tmp_path / n for n in ("toy", "data", "run", "out"))
    write_toy(toy)
    write_episodes(data)
    command = [
        "-m",
        "worldmodel",
        "finetune",
        str(toy),
        "--data",
        str(data),
        "--out",
        str(out),
        "--run",
        str(run),
    ]
    command += ["--steps", "200", "--batch", "4", "--length", "4", "--lora", "2"]
    # after "--": torchrun would take --run for one of its own options
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "--",
        *command[1:],
    ]
    with (tmp_path / "log").open("w") as log:
        child = subprocess.Popen(torchrun, cwd=ROOT, stderr=log, stdout=log)
        deadline = time.monotonic() + 200
        stepped = re.compile(r"[1-9]\d*/200 ")  # the bar shows 0/200 before there is anything to keep
        while not stepped.search((tmp_path / "log").read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=300) != 0
    assert "run the same command to continue" in (tmp_path / "log").read_text()
    assert len(list(run.glob("flow/checkpoint-*/run.json"))) == 1
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "world written to" in done.stdout and "bits_per_dim: before" in done.stdout
    assert WorldModel.load(out).spec.name == "out"
