"""Two ranks train as one does, and their checkpoints are anybody's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.ranks import on_ranks
from worldmodel.errors import CheckpointError, ConfigError
from worldmodel.files import load_tensors, save_tensors
from worldmodel.flow.flow import FlowConfig
from worldmodel.training.flow import FlowStage, FlowTraining, Latents, gathered, new_parts
from worldmodel.training.loop import LoopConfig, Run
from worldmodel.training.parallel import ALONE, Ranks, shard_folders

FLOW = FlowConfig(
    in_channels=3,
    channels=32,
    top_channels=64,
    layers_per_block=(1, 2),
    head_dim=32,
    position_scale=2.0,
    action_features=8,
    noise_std=0.2,
    window=6,
    context=3,
    denoiser_layers=1,
    denoiser_window=1,
    denoiser_look_ahead=1,
    text_tokens=3,
    text_dim=5,
)
TRAINING = FlowTraining(
    FLOW, LoopConfig(steps=20, lr=1e-3, warmup=2), batch=4, length=4, bf16=False, threads=1, compiled=False
)


def data() -> Latents:
    rng = np.random.default_rng(0)
    return Latents(
        torch.from_numpy(rng.normal(size=(24, 3, 2, 2)).astype(np.float32)),
        torch.from_numpy(rng.uniform(-1, 1, (24, 2)).astype(np.float32)),
        torch.zeros(24),
        torch.zeros(24, dtype=torch.bool),
        np.full(4, 6),
        torch.from_numpy(rng.normal(size=(3, 3, 5)).astype(np.float32)),
        torch.from_numpy(rng.integers(3, size=24)),
    )


def train(folder: Path, ranks: Ranks, steps: int = 20, recompute: bool = False) -> list[float]:
    """Losses of a run that writes its weights after ``steps`` steps."""
    config = replace(TRAINING, recompute=recompute)
    stage, losses = FlowStage(config, data(), None, ranks), []
    run = Run(stage, config.loop, folder, ranks)
    while run.step < steps:
        losses.append(float(run._one_step("flow")["loss"]))
    run.save()
    parts = new_parts(config, 2)
    gathered(stage.parts, parts if ranks.first else None)
    if ranks.first:
        save_tensors(folder / f"weights{steps}.safetensors", parts.state_dict())
        (folder / f"losses{steps}.json").write_text(json.dumps(losses))
    return losses


def two_ranks(folder: Path, again: Path) -> None:
    with Ranks.joined() as ranks:
        train(folder, ranks, 20, recompute=True)
        train(again, ranks, 12)


def test_two_ranks_train_as_one_and_their_checkpoint_loads_on_one(tmp_path: Path) -> None:
    for name in ("one", "two", "mixed"):
        (tmp_path / name).mkdir()
    alone = train(tmp_path / "one", ALONE)
    train(tmp_path / "mixed", ALONE, 6)  # one rank, then two, then one again
    on_ranks(2, two_ranks, tmp_path / "two", tmp_path / "mixed")
    together = json.loads((tmp_path / "two" / "losses20.json").read_text())
    assert together == pytest.approx(alone, abs=1e-5)
    assert alone[-1] < alone[0] - 0.05
    assert len(json.loads((tmp_path / "mixed" / "losses12.json").read_text())) == 6
    assert train(tmp_path / "mixed", ALONE) == pytest.approx(alone[12:], abs=1e-5)
    whole, mixed = (load_tensors(tmp_path / name / "weights20.safetensors") for name in ("one", "mixed"))
    for name, weight in whole.items():
        torch.testing.assert_close(mixed[name], weight, rtol=1e-3, atol=1e-4)
    assert [step for step, _ in shard_folders(tmp_path / "mixed")] == [12]


def test_a_damaged_checkpoint_of_shards_is_refused(tmp_path: Path) -> None:
    """The reader of shards needs no second process: a plain safetensors file is one shard of one rank."""
    train(tmp_path, ALONE, 2)
    target = tmp_path / "checkpoint-00000003"
    target.mkdir()
    shard = target / "shard-00001-model-00001-of-00001.safetensors"
    shard.write_bytes((tmp_path / "checkpoint.safetensors").read_bytes()[:-200])
    header = {"step": 3, "elapsed": 0.0, "config": json.loads(json.dumps(TRAINING.loop.__dict__))}
    (target / "run.json").write_text(json.dumps(header))
    with pytest.raises(CheckpointError, match="damaged"):
        train(tmp_path, ALONE, 4)
    (target / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no header"):
        train(tmp_path, ALONE, 4)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    assert Ranks(1, 2).rows(6) == slice(3, 6)
    with pytest.raises(ConfigError, match="batch of 5 does not divide by 2"):
        Ranks(0, 2).rows(5)


def test_recomputed_activations_change_nothing(tmp_path: Path) -> None:
    for name in ("kept", "recomputed"):
        (tmp_path / name).mkdir()
    assert train(tmp_path / "kept", ALONE, 3) == train(tmp_path / "recomputed", ALONE, 3, recompute=True)
