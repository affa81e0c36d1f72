"""The training loop that codec, flow and heads share: resumable after a kill at any moment, no pickle.

A checkpoint is ``checkpoint.safetensors`` (weights, their moving average, the optimisers' moments) whose header
holds, as JSON, the step, the elapsed time and the settings; it is replaced atomically. The batch of a step
is a function of (seed, step) alone, so a resumed run sees what an uninterrupted one would have seen.
Several ranks write shards instead (`worldmodel.training.parallel`); either form continues on any number of ranks.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from worldmodel.errors import CheckpointError, ConfigError, TrainingError, WorldModelError
from worldmodel.files import load_metadata, load_tensors, require_at_least, save_tensors
from worldmodel.training.parallel import (
    ALONE,
    Ranks,
    checked_header,
    fill,
    header_of,
    load_shards,
    names_in,
    save_shards,
    shard_folders,
    whole,
)

REPORT_EVERY = 20  # steps
BY_THE_CLOCK = "{desc}: {n_fmt} steps [{elapsed}, {rate_fmt}{postfix}]"
"""A bar whose steps do not tell when the run ends; its postfix does."""
OPTIMIZERS = ("adamw", "muon")
MOMENTS = {torch.optim.AdamW: ("exp_avg", "exp_avg_sq"), torch.optim.Muon: ("momentum_buffer",)}
CADENCE = ("save_seconds",)  # settings that may change between a run and its continuation


@dataclass(frozen=True)
class LoopConfig:
    """How to optimise.

    optimizer: "adamw", or "muon" (orthogonalised momentum, Liu et al., arXiv 2502.16982) for matrices with AdamW for the
    rest; it takes AdamW's learning rates, and one process. steps: length of the run. minutes: if given, the run ends by
    the clock too, and progress (which drives the learning rate) is whichever of the two is further; such a run is not
    exactly repeatable. lr: peak learning rate, reached after ``warmup`` steps, then cosine to ``lr * final_lr``.
    weight_decay: of matrices and kernels. clip: largest gradient norm. ema: decay of the moving average of the weights,
    which `Run.fit` leaves in the module. save_seconds: time between checkpoints.
    """

    steps: int = 10_000
    minutes: float | None = None
    lr: float = 1e-3
    final_lr: float = 0.01
    warmup: int = 200
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    ema: float = 0.999
    seed: int = 0
    save_seconds: float = 60.0
    optimizer: str = "adamw"

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be used."""
        require_at_least(1, self, "steps")
        if not 0 < self.lr < math.inf or not self.clip > 0:
            raise ConfigError(f"lr is {self.lr:g} and clip {self.clip:g}, expected above 0, and lr finite")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema is {self.ema:g}, expected a share from 0 to below 1")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}, expected at least 0")
        if self.minutes is not None and not self.minutes > 0:
            raise ConfigError(f"minutes must be above 0, got {self.minutes}")
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(f"no optimizer {self.optimizer!r}; choose from {', '.join(OPTIMIZERS)}")


class Stage(Protocol):
    """What is trained: a module, and how one step computes its gradients."""

    @property
    def module(self) -> nn.Module:
        """The module whose parameters are trained."""
        ...

    def backward(
        self, rng: np.random.Generator, generator: torch.Generator, progress: float
    ) -> Mapping[str, float | Tensor]:
        """Draw a batch with ``rng`` and noise with ``generator``, accumulate gradients, return metrics.

        "loss" is among the metrics. ``progress`` runs from 0 to 1 over the training.
        """
        ...


class Interrupted(WorldModelError):
    """The run was stopped by a signal after its checkpoint was written; run it again to continue."""

    exit_status = 130


def _optimizers(config: LoopConfig, weights: list[nn.Parameter]) -> Iterator[torch.optim.Optimizer]:
    """Those of the configuration, each for some of the weights."""
    shared: dict[str, Any] = {"lr": config.lr}
    matrices = [w for w in weights if w.ndim == 2] if config.optimizer == "muon" else []
    if matrices:
        yield torch.optim.Muon(
            matrices, **shared, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
    taken = {id(w) for w in matrices}
    rest = [w for w in weights if id(w) not in taken]
    groups = [
        {"params": [w for w in rest if w.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [w for w in rest if w.ndim < 2], "weight_decay": 0.0},
    ]
    if rest:
        yield torch.optim.AdamW(groups, **shared, betas=config.betas, fused=True)


@contextmanager
def _signals_caught() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them in the middle of a step."""
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)

    before = {kind: signal.signal(kind, note) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


class Run:
    """One training run in a folder; continues from the checkpoint there, if any.

    Raises:
        ConfigError: the checkpoint was made with other settings.
        CheckpointError: it is corrupt or holds another module.
    """

    def __init__(self, stage: Stage, config: LoopConfig, folder: Path, ranks: Ranks = ALONE) -> None:
        self.stage, self.config, self.folder, self.ranks = stage, config, Path(folder), ranks
        self.file = self.folder / "checkpoint.safetensors"
        self.weights = {n: p for n, p in stage.module.named_parameters() if p.requires_grad}
        if config.optimizer == "muon" and ranks.size > 1:
            raise ConfigError("the optimizer muon takes one process; use adamw on several")
        self.optimizers = list(_optimizers(config, list(self.weights.values())))
        self.owner = {w: o for o in self.optimizers for group in o.param_groups for w in group["params"]}
        self.average = {n: p.detach().clone() for n, p in self.weights.items()}
        self.step, self.elapsed = 0, 0.0
        self._load()

    @property
    def progress(self) -> float:
        """0 at the start, 1 when done."""
        done = self.step / self.config.steps
        if self.config.minutes is not None:
            done = max(done, self.elapsed / (60.0 * self.config.minutes))
        return min(done, 1.0)

    def fit(self, description: str) -> None:
        """Train to the end from where an earlier call stopped, then put the averaged weights into the module.

        Raises:
            Interrupted: after SIGINT or SIGTERM, once the checkpoint is written.
            TrainingError: the loss or the gradient is not finite; the last checkpoint stays.
        """
        writer = _tensorboard(self.folder) if self.ranks.first else None
        saved = last = time.monotonic()
        bar = tqdm(
            total=self.config.steps,
            initial=self.step,
            desc=description,
            unit="step",
            smoothing=0.05,
            bar_format=None if self.config.minutes is None else BY_THE_CLOCK,
            disable=not self.ranks.first,
        )
        with bar, _signals_caught() as caught:
            while self.progress < 1.0:
                metrics = self._one_step(description)
                now = time.monotonic()
                stop, due, self.elapsed = self.ranks.agree(
                    bool(caught), now - saved > self.config.save_seconds, self.elapsed + now - last
                )
                last = now
                bar.update()
                if self.step % REPORT_EVERY == 0:
                    self._report(bar, writer, metrics)
                if stop or due:
                    self.save()
                    saved = time.monotonic()
                if stop:
                    raise Interrupted(
                        f"{description}: stopped at step {self.step} with the checkpoint written; "
                        "run the same command to continue"
                    )
        if self.step and self.step != self._saved():
            self.save()
        if writer is not None:
            writer.close()
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(self.average[name])

    def _one_step(self, description: str) -> dict[str, float | Tensor]:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._lr()
            optimizer.zero_grad(set_to_none=True)
        metrics = self.stage.backward(
            np.random.default_rng((self.config.seed, self.step)),
            torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step),
            self.progress,
        )
        norm = whole(torch.nn.utils.clip_grad_norm_(self.weights.values(), self.config.clip))
        if not math.isfinite(float(metrics["loss"])) or not math.isfinite(float(norm)):
            if self.step == 0:
                raise TrainingError(
                    f"{description}: loss or gradient is not finite at step 0, when nothing is learned yet; look for "
                    "values in the data, or in the weights it begins with, that are not finite or far too large"
                )
            raise TrainingError(
                f"{description}: loss or gradient is not finite at step {self.step}; the checkpoint in "
                f"{self.folder} is the last good one; lower the learning rate in a new run"
            )
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        decay = min(self.config.ema, self.step / (10.0 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.weights.values()), 1.0 - decay)
        return {**metrics, "grad_norm": norm, "lr": self.optimizers[0].param_groups[0]["lr"]}

    def _lr(self) -> float:
        config = self.config
        warm = min(1.0, (self.step + 1) / max(config.warmup, 1))
        cosine = 0.5 * (1.0 + math.cos(math.pi * self.progress))
        return config.lr * warm * (config.final_lr + (1.0 - config.final_lr) * cosine)

    def save(self) -> None:
        """Write the checkpoint, atomically. Raises CheckpointError if it cannot be written."""
        header = {"step": self.step, "elapsed": self.elapsed, "config": asdict(self.config)}
        if self.ranks.size > 1:
            save_shards(self.folder, self._tensors(), header, self.ranks)
        else:
            save_tensors(self.file, self._tensors(), {"run": json.dumps(header)})

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            tensors[f"weight.{name}"] = weight
            tensors[f"average.{name}"] = self.average[name]
            owner = self.owner[weight]
            for moment in MOMENTS[type(owner)]:
                if moment in owner.state[weight]:
                    tensors[f"{moment}.{name}"] = owner.state[weight][moment]
        return tensors

    def _header(self) -> dict[str, Any]:
        try:
            return checked_header(json.loads(load_metadata(self.file)["run"]), self.file)
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"{self.file} is not a training checkpoint; delete it to start again"
            ) from error

    def _saved(self) -> int:
        """The step of the newest checkpoint, 0 where there is none."""
        steps = [step for step, _ in shard_folders(self.folder)]
        return max([0, *steps, *([int(self._header()["step"])] if self.file.exists() else [])])

    def _load(self) -> None:
        """Continue from the newest checkpoint, in one file or in shards."""
        newest = self._saved()
        if not newest:
            return
        shards = dict(shard_folders(self.folder)).get(newest)
        header = self._header() if shards is None else header_of(shards)
        now = json.loads(json.dumps(asdict(self.config)))
        known = (
            asdict(LoopConfig()) | header["config"]
        )  # what an older version did not know was as it is by default
        changed = [k for k in now if k not in CADENCE and now[k] != known[k]]
        if changed:
            raise ConfigError(
                f"{shards or self.file} was made with other settings ({', '.join(changed)}); "
                "restore them, or use another run folder"
            )
        saved = load_tensors(self.file) if shards is None else {}
        names = set(saved) if shards is None else names_in(shards)
        for name, weight in self.weights.items():
            owner = self.owner[weight]
            moments = MOMENTS[type(owner)]
            if f"{moments[0]}.{name}" in names:  # else no loss has reached it yet
                owner.state[weight] = {moment: torch.zeros_like(weight) for moment in moments}
                if isinstance(owner, torch.optim.AdamW):
                    owner.state[weight]["step"] = torch.tensor(float(header["step"]), device=weight.device)
        tensors, where = self._tensors(), shards or self.file
        for name, tensor in tensors.items():
            if name not in names or (shards is None and saved[name].shape != tensor.shape):
                raise CheckpointError(
                    f"{where} does not fit this model ({name}); "
                    "restore its configuration, or use another run folder"
                )
        if shards is not None:
            load_shards(shards, tensors, self.ranks)
        for name, value in saved.items():
            if name in tensors:
                fill(tensors[name], value)
        self.step, self.elapsed = int(header["step"]), float(header["elapsed"])

    def _report(self, bar: tqdm, writer: Any, metrics: Mapping[str, float | Tensor]) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        left = self.elapsed * (1.0 - self.progress) / max(self.progress, 1e-6)
        shown = " ".join(f"{name} {value:.4g}" for name, value in values.items())
        bar.set_postfix_str(f"{shown} | {self.progress:.0%}, {left / 60:.0f} min left", refresh=False)
        if writer is not None:
            for name, value in values.items():
                writer.add_scalar(name, value, self.step)


def _tensorboard(folder: Path) -> Any:
    """A TensorBoard writer where tensorboard is installed (extra "train"), else None."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))
