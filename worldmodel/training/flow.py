"""Train the flow by maximum likelihood, and its denoiser by flow-score matching, in one backward pass each.

The loss is the negative log-density of the noised latents in nats per dimension (STARFlow-V, arXiv 2511.20462, sec. 3).
Its gradient at the noised latents, which the same backward pass yields, is the denoiser's target (sec. 3.2).
"""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.nn import functional as F

from worldmodel.condition.actions import ActionEncoder, ActionEncoderConfig
from worldmodel.condition.spaces import pack_actions, packed_size
from worldmodel.errors import ConfigError, DataError
from worldmodel.flow.affine import LOG_2PI
from worldmodel.flow.denoiser import SCORE_SCALE, Denoiser
from worldmodel.flow.flow import Density, Flow, FlowConfig
from worldmodel.training.codec import LatentEpisode
from worldmodel.training.loop import LoopConfig, Run
from worldmodel.training.parallel import ALONE, Ranks, whole
from worldmodel.training.precision import autocast


@dataclass(frozen=True)
class FlowTraining:
    """batch: windows a step, each of ``length`` latent frames. action_dropout: share of frames whose action is hidden,
    so that guidance and the action gain exist. harmonics: Fourier features of the action encoder. bf16: autocast,
    where that is faster. compiled: with torch.compile where a C++ compiler is at hand, on one process.
    recompute: activation checkpointing, which needs less memory and more time; never compiled.
    text_dropout: share of windows whose prompt is replaced by the empty one, in worlds with prompts. motion: share of
    windows drawn in proportion to how much their latents change, the others evenly: where little happens most of the
    time, the rest is learned from more of it.

    noise_start: noise level that the run begins with; it falls to the model's ``noise_std`` between 40 % and 60 % of the
    run. Large noise is learned fast, small noise tells the state precisely. None: the model's all along.
    """

    model: FlowConfig
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=10_000, lr=1e-3))
    batch: int = 64
    length: int = 16
    action_dropout: float = 0.1
    harmonics: int = 3
    bf16: bool = True
    compiled: bool = True
    threads: int = 2
    noise_start: float | None = None
    recompute: bool = False
    text_dropout: float = 0.1
    motion: float = 0.0

    def noise(self, progress: float) -> float:
        """Noise level at ``progress`` (0 to 1) of the run."""
        final = self.model.noise_std
        share = min(max((progress - 0.4) / 0.2, 0.0), 1.0)
        return final if self.noise_start is None else self.noise_start ** (1.0 - share) * final**share

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be used."""
        if not self.model.denoiser_layers:
            raise ConfigError("model.denoiser_layers is 0, expected at least 1: training fits a denoiser too")
        if not 2 <= self.length <= self.model.window:
            raise ConfigError(f"length is {self.length}, expected 2 to the window of {self.model.window}")
        if not 0 <= self.motion <= 1:
            raise ConfigError(f"motion is {self.motion}, expected a share of 0 to 1")


@dataclass(frozen=True)
class Latents:
    """Encoded episodes end to end: latents (S, C, h, w), packed actions (S, P), rewards (S,), terminated (S,) bool;
    lengths (episodes,): chunks of each episode. In worlds with prompts: text (prompts, L, text_dim), the empty prompt
    first, and prompts (S,) int64, the prompt of a window that starts at each latent frame. present (S,) bool: whether
    an action caused the latent frame, None for all (a codec's first picture is caused by none).
    """

    latents: Tensor
    packed: Tensor
    rewards: Tensor
    terminated: Tensor
    lengths: np.ndarray
    text: Tensor | None = None
    prompts: Tensor | None = None
    present: Tensor | None = None

    @classmethod
    def of(cls, episodes: list[LatentEpisode], space: spaces.Space[Any]) -> Latents:
        """Join encoded episodes; those of a codec with a first picture have a latent frame more than actions.

        Raises:
            InputError: an action outside the space.
        """

        def numpy(actions: Any) -> Any:
            if isinstance(actions, Mapping):
                return {k: numpy(v) for k, v in actions.items()}
            return actions.numpy()

        size, packed, present = packed_size(space), [], []
        for e in episodes:
            caused = torch.arange(len(e.latents)) >= len(e.latents) - len(e.rewards)
            rows = np.zeros((len(e.latents), size), dtype=np.float32)
            if size:
                rows[caused.numpy()] = pack_actions(space, numpy(e.actions), len(e.rewards))
            packed.append(rows)
            present.append(caused)

        def late(values: Tensor, caused: Tensor) -> Tensor:
            return values.new_zeros(len(caused)).masked_scatter(caused, values)

        return cls(
            torch.cat([e.latents for e in episodes]),
            torch.from_numpy(np.concatenate(packed)),
            torch.cat([late(e.rewards, c) for e, c in zip(episodes, present, strict=True)]),
            torch.cat([late(e.terminated, c) for e, c in zip(episodes, present, strict=True)]),
            np.array([len(e.latents) for e in episodes]),
            present=None if all(c.all() for c in present) else torch.cat(present),
        )

    def shown(self, at: Tensor) -> Tensor:
        """Whether each of the latent frames ``at`` has an action, bool."""
        return torch.ones(at.shape, dtype=torch.bool) if self.present is None else self.present[at]

    def places(self, length: int) -> np.ndarray:
        """Where a window of ``length`` chunks may start.

        Raises:
            DataError: no episode is that long.
        """
        ends = np.cumsum(self.lengths)
        found = [
            np.arange(e - n, e - length + 1) for e, n in zip(ends, self.lengths, strict=True) if n >= length
        ]
        if not found:
            raise DataError(
                f"no episode has {length} chunks (the longest has {self.lengths.max()}); use shorter windows"
            )
        return np.concatenate(found)

    def motion(self, starts: np.ndarray, length: int) -> np.ndarray:
        """What share (places,) of all change each window of ``length`` holds: mean squares of latents' differences."""
        change = (self.latents[1:] - self.latents[:-1]).square().flatten(1).mean(1).double()
        total = np.concatenate(([0.0], change.cumsum(0).numpy()))
        held = total[starts + length - 1] - total[starts] + 1e-12
        return np.asarray(held / held.sum())


def new_parts(config: FlowTraining, packed: int) -> nn.ModuleDict:
    """{"flow"} and, where a packed action has ``packed`` > 0 floats, {"actions"}, with fresh weights."""
    parts: dict[str, nn.Module] = {"flow": Flow(config.model)}
    if packed:
        parts["actions"] = ActionEncoder(
            ActionEncoderConfig(packed, config.model.action_features, config.harmonics)
        )
    return nn.ModuleDict(parts)


def gathered(trained: nn.ModuleDict, like: nn.ModuleDict | None) -> None:
    """Copy the weights of ``trained``, which may be sharded, into ``like``; all ranks must ask together, None to help."""
    full = {}
    for name, value in trained.state_dict().items():
        together = whole(value)
        if like is not None:
            full[name] = together.cpu()
    if like is not None:
        like.load_state_dict(full)


class FlowStage:
    """One training step of flow and denoiser; see `worldmodel.training.loop.Stage`."""

    def __init__(
        self, config: FlowTraining, data: Latents, parts: nn.ModuleDict | None = None, ranks: Ranks = ALONE
    ) -> None:
        """``parts`` {"flow", "actions"} are trained where given, else new ones; several ranks shard them."""
        torch.manual_seed(config.loop.seed)
        self.config, self.data, self.ranks = config, data, ranks
        self.parts = new_parts(config, data.packed.shape[1]) if parts is None else parts
        self.flow = cast(Flow, self.parts["flow"])
        self.actions = cast(ActionEncoder, self.parts["actions"]) if "actions" in self.parts else None
        self.stored = next(self.flow.parameters()).dtype
        self.grid = self.flow.grid((data.latents.shape[2], data.latents.shape[3]))
        self.starts, self.rows = data.places(config.length), ranks.rows(config.batch)
        self.moving = data.motion(self.starts, config.length) if config.motion else None
        ranks.shard(self.parts, config.recompute)
        self.density: Callable[..., Density] = self.flow
        self.score: Callable[..., Tensor] = cast(Denoiser, self.flow.denoiser).score
        plain = ranks.size == 1 and not config.recompute
        if config.compiled and plain and shutil.which(os.environ.get("CXX", "g++")):
            warnings.filterwarnings("ignore", message=".*lru_cache.*")  # the cached tables are pure
            self.density, self.score = torch.compile(self.density), torch.compile(self.score)

    @property
    def module(self) -> nn.Module:
        """Flow and action encoder."""
        return self.parts

    def backward(
        self, rng: np.random.Generator, generator: torch.Generator, progress: float
    ) -> Mapping[str, float | Tensor]:
        """Metrics: loss (nats per dimension), nats a chunk, bits_per_dim, score (mean squared error of the denoised
        latents' correction, relative to the noise's variance).
        """
        c, sigma, device, rows = self.config, self.config.noise(progress), self.ranks.device, self.rows
        begin = torch.from_numpy(self._places(rng))
        at = begin[rows, None] + torch.arange(c.length)
        x = self.flow.tokens(self.data.latents[at].to(device))
        noise = torch.randn(c.batch, *x.shape[1:], generator=generator)[rows].to(device)
        noisy = (x + sigma * noise).requires_grad_(True)
        with autocast(device.type, c.bf16, self.stored):
            features = None
            if self.actions is not None:
                present = torch.from_numpy(rng.random((c.batch, c.length)) >= c.action_dropout)[rows]
                present = present & self.data.shown(at)
                features = self.actions(self.data.packed[at].to(device), present.to(device))
            text = self._text(rng, begin)
            loss = -self.density(noisy, self.grid, text, features).log_prob_elements.float().mean()
        loss.backward()
        assert noisy.grad is not None
        target = noisy.grad * (noisy.numel() * sigma**2 / SCORE_SCALE)
        with autocast(device.type, c.bf16, self.stored):
            score = self.score(
                noisy.detach(), self.grid, text, None if features is None else features.detach()
            )
        error = F.mse_loss(score.float(), target) * (SCORE_SCALE / sigma) ** 2
        error.backward()
        value, error = self.ranks.mean(torch.stack((loss.detach(), error.detach())))
        dims = x[0, 0].numel()
        return {
            "loss": value - 0.5 * LOG_2PI,
            "nats": value * dims,
            "noise": sigma,
            "bits_per_dim": value / math.log(2.0),
            "score": error,
        }

    def _places(self, rng: np.random.Generator) -> np.ndarray:
        """Where the windows of a batch start (B,)."""
        if self.moving is None:
            return rng.choice(self.starts, size=self.config.batch)
        moving = round(self.config.batch * self.config.motion)
        evenly = rng.choice(self.starts, size=self.config.batch - moving)
        return np.concatenate((evenly, rng.choice(self.starts, size=moving, p=self.moving)))

    def _text(self, rng: np.random.Generator, begin: Tensor) -> Tensor | None:
        """Prompts (rows, L, text_dim) of the windows that start at ``begin``, some replaced by the empty one."""
        if self.data.text is None or self.data.prompts is None:
            return None
        hidden = torch.from_numpy(rng.random(len(begin)) < self.config.text_dropout)
        chosen = torch.where(hidden, 0, self.data.prompts[begin])[self.rows]
        return self.data.text[chosen].to(self.ranks.device)


def train_flow(
    config: FlowTraining,
    data: Latents,
    folder: Path,
    ranks: Ranks = ALONE,
    start: Mapping[str, Tensor] | None = None,
) -> tuple[nn.ModuleDict, Run]:
    """Train, or continue what is in ``folder``; returns {"flow", "actions"} that hold the averaged weights.

    ``start``: the state dict of such a pair that a fresh run begins with, instead of random weights.

    Raises:
        DataError: episodes too short. Others as `worldmodel.training.loop.Run`.
    """
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.loop.seed)
    parts, packed = new_parts(config, data.packed.shape[1]), data.packed.shape[1]
    if start is not None:
        parts.load_state_dict(start)
    stage = FlowStage(config, data, parts, ranks)
    run = Run(stage, config.loop, folder, ranks)
    run.fit("flow")
    made = new_parts(config, packed)
    gathered(stage.parts, made)
    return made, run
