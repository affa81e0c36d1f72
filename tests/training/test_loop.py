"""The training loop: a killed run that goes on equals one that never stopped."""

import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from worldmodel.errors import CheckpointError, ConfigError, TrainingError
from worldmodel.files import load_metadata, load_tensors, save_tensors
from worldmodel.training.loop import Interrupted, LoopConfig, Run
from worldmodel.training.parallel import ALONE

CONFIG = LoopConfig(steps=60, lr=1e-2, warmup=5, save_seconds=0.02)


class Line:
    """Learns y = x W from noisy batches."""

    def __init__(self, bad_step: int | None = None, pause: float = 0.0) -> None:
        torch.manual_seed(0)
        self.module: nn.Module = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 1))
        self.bad_step, self.pause, self.calls = bad_step, pause, 0
        self.interrupt_at: int | None = None

    def backward(
        self, rng: np.random.Generator, generator: torch.Generator, progress: float
    ) -> dict[str, float | torch.Tensor]:
        self.calls += 1
        time.sleep(self.pause)
        x = torch.from_numpy(rng.normal(size=(16, 4)).astype(np.float32))
        y = x.sum(1, keepdim=True) + 0.1 * torch.randn(16, 1, generator=generator)
        loss = (self.module(x) - y).square().mean()
        loss.backward()
        if self.calls == self.interrupt_at:
            signal.raise_signal(signal.SIGINT)
        return {"loss": math.nan if self.calls == self.bad_step else loss.detach(), "progress": progress}


def weights(stage: Line) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in stage.module.parameters()])


@pytest.mark.parametrize(("optimizer", "lr"), [("adamw", 1e-2), ("muon", 4e-2)])
def test_it_learns_and_leaves_the_average_in_the_module(optimizer: str, lr: float, tmp_path: Path) -> None:
    stage = Line()
    run = Run(stage, replace(CONFIG, steps=400, save_seconds=60.0, optimizer=optimizer, lr=lr), tmp_path)
    run.fit("line")
    x = torch.randn(100, 4)
    assert (stage.module(x) - x.sum(1, keepdim=True)).square().mean() < 0.1
    assert all(torch.equal(p, run.average[n]) for n, p in stage.module.named_parameters())
    assert list((tmp_path / "tensorboard").iterdir())


def test_kill_at_any_moment_then_resume_equals_no_kill(tmp_path: Path) -> None:
    whole = Line()
    Run(whole, CONFIG, tmp_path / "whole").fit("whole")
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import torch
torch.set_num_threads(1)
from test_loop import CONFIG, Line, Run
Run(Line(pause=0.02), CONFIG, Path({str(tmp_path / "killed")!r})).fit("killed")
"""
    checkpoint = tmp_path / "killed" / "checkpoint.safetensors"
    child = subprocess.Popen(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 40
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    resumed = Line()
    run = Run(resumed, CONFIG, tmp_path / "killed")
    assert 0 < run.step < CONFIG.steps
    run.fit("resumed")
    assert resumed.calls < CONFIG.steps
    assert torch.equal(weights(resumed), weights(whole))
    final = [load_tensors(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "killed")]
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])


def test_a_signal_saves_and_stops(tmp_path: Path) -> None:
    stage, config = Line(), replace(CONFIG, save_seconds=60.0)
    stage.interrupt_at = 7
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped at step 7"):
        Run(stage, config, tmp_path).fit("line")
    assert signal.getsignal(signal.SIGINT) is before
    again, whole = Line(), Line()
    run = Run(again, config, tmp_path)
    assert run.step == 7
    run.fit("line")
    Run(whole, config, tmp_path / "whole").fit("line")
    assert torch.equal(weights(again), weights(whole))


def test_muon_is_for_matrices_and_for_one_process(tmp_path: Path) -> None:
    Run(Line(), replace(CONFIG, optimizer="muon"), tmp_path).fit("line")
    saved = load_tensors(tmp_path / "checkpoint.safetensors")
    for name in ("0.weight", "2.weight"):
        assert f"momentum_buffer.{name}" in saved and f"exp_avg.{name}" not in saved
    for name in ("0.bias", "2.bias"):
        assert f"momentum_buffer.{name}" not in saved and f"exp_avg.{name}" in saved
    with pytest.raises(ConfigError, match="muon takes one process"):
        Run(Line(), replace(CONFIG, optimizer="muon"), tmp_path, replace(ALONE, size=2))


def test_a_checkpoint_of_an_older_version_goes_on(tmp_path: Path) -> None:
    """What its settings do not name was then as it is by default now."""
    Run(Line(), CONFIG, tmp_path).fit("line")
    file = tmp_path / "checkpoint.safetensors"
    header = json.loads(load_metadata(file)["run"])
    del header["config"]["optimizer"]
    save_tensors(file, load_tensors(file), {"run": json.dumps(header)})
    assert Run(Line(), CONFIG, tmp_path).step == CONFIG.steps
    with pytest.raises(ConfigError, match=r"other settings \(optimizer\)"):
        Run(Line(), replace(CONFIG, optimizer="muon"), tmp_path)


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="not finite at step 20"):
        Run(Line(bad_step=21, pause=0.01), CONFIG, tmp_path).fit("line")
    stage = Line()
    assert 0 < Run(stage, CONFIG, tmp_path).step <= 20
    assert weights(stage).isfinite().all()


def test_a_loss_that_is_never_finite_is_no_matter_of_the_rate(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"at step 0, .* in the data") as caught:
        Run(Line(bad_step=1), CONFIG, tmp_path).fit("line")
    assert "rate" not in str(caught.value)


def test_minutes_end_the_run_and_drive_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = Line(pause=0.01)
    run = Run(stage, replace(CONFIG, steps=100_000, minutes=0.5 / 60), tmp_path)
    run.fit("line")
    assert run.progress == 1.0 and 5 < run.step < 100
    shown = capsys.readouterr().err
    assert (
        "0 min left" in shown and "100000" not in shown and "<" not in shown
    )  # as tqdm writes elapsed<remaining


def test_a_finished_run_only_loads(tmp_path: Path) -> None:
    first, second = Line(), Line()
    Run(first, CONFIG, tmp_path).fit("line")
    Run(second, CONFIG, tmp_path).fit("line")
    assert second.calls == 0
    assert torch.equal(weights(first), weights(second))


def test_other_settings_or_models_or_files_are_refused(tmp_path: Path) -> None:
    Run(Line(), CONFIG, tmp_path).fit("line")
    with pytest.raises(ConfigError, match="other settings .lr, clip"):
        Run(Line(), replace(CONFIG, lr=1.0, clip=2.0), tmp_path)
    Run(Line(), replace(CONFIG, save_seconds=9.0), tmp_path)
    other = Line()
    other.module = nn.Linear(3, 1)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        Run(other, CONFIG, tmp_path)
    file = tmp_path / "checkpoint.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"elapsed", b"elapsad"))
    with pytest.raises(CheckpointError, match="no header of a training checkpoint; delete it"):
        Run(Line(), CONFIG, tmp_path)
    file.write_bytes(whole[:-50])
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        Run(Line(), CONFIG, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"lr": 0.0},
        {"ema": 1.0},
        {"minutes": 0.0},
        {"optimizer": "sgd"},
        {"lr": math.nan},
        {"seed": -1},
    ],
    ids=str,
)
def test_wrong_settings_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        replace(CONFIG, **change)  # type: ignore[arg-type]
