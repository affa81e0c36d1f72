"""Train the flow by maximum likelihood, and its denoiser by flow-score matching, in one backward pass each.

The loss is the negative log-density of the noised latents in nats per dimension (STARFlow-V, arXiv 2511.20462, sec. 3).
Its gradient at the noised latents, which the same backward pass yields, is the denoiser's target (sec. 3.2).
"""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.nn import functional as F

from worldmodel.condition.actions import ActionEncoder, ActionEncoderConfig
from worldmodel.condition.spaces import pack_actions
from worldmodel.errors import ConfigError, DataError
from worldmodel.flow.affine import LOG_2PI
from worldmodel.flow.denoiser import SCORE_SCALE
from worldmodel.flow.flow import Flow, FlowConfig
from worldmodel.heads import Heads, HeadsConfig
from worldmodel.training.codec import LatentEpisode
from worldmodel.training.loop import LoopConfig, Run


@dataclass(frozen=True)
class FlowTraining:
    """batch: windows a step, each of ``length`` latent frames. action_dropout: share of frames whose action is hidden,
    so that guidance and the action gain exist. harmonics: Fourier features of the action encoder. bf16: autocast.
    compiled: with torch.compile where a C++ compiler is at hand (1.5 x faster here).

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

    def noise(self, progress: float) -> float:
        """Noise level at ``progress`` (0 to 1) of the run."""
        final = self.model.noise_std
        share = min(max((progress - 0.4) / 0.2, 0.0), 1.0)
        return final if self.noise_start is None else self.noise_start ** (1.0 - share) * final**share

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be used."""
        if not 2 <= self.length <= self.model.window:
            raise ConfigError(f"length is {self.length}, expected 2 to the window of {self.model.window}")


@dataclass(frozen=True)
class HeadsTraining:
    """noise: standard deviation added to the latents, as what the denoiser leaves. Others as in `FlowTraining`."""

    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=6_000, lr=1e-3))
    width: int = 192
    batch: int = 512
    noise: float = 0.03


@dataclass(frozen=True)
class Latents:
    """Encoded episodes end to end: latents (S, C, h, w), packed actions (S, P), rewards (S,), terminated (S,) bool;
    lengths (episodes,): chunks of each episode.
    """

    latents: Tensor
    packed: Tensor
    rewards: Tensor
    terminated: Tensor
    lengths: np.ndarray

    @classmethod
    def of(cls, episodes: list[LatentEpisode], space: spaces.Space[Any]) -> Latents:
        """Join encoded episodes.

        Raises:
            InputError: an action outside the space.
        """

        def numpy(actions: Any) -> Any:
            if isinstance(actions, Mapping):
                return {k: numpy(v) for k, v in actions.items()}
            return actions.numpy()

        packed = [pack_actions(space, numpy(e.actions), len(e.latents)) for e in episodes]
        return cls(
            torch.cat([e.latents for e in episodes]),
            torch.from_numpy(np.concatenate(packed)),
            torch.cat([e.rewards for e in episodes]),
            torch.cat([e.terminated for e in episodes]),
            np.array([len(e.latents) for e in episodes]),
        )

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


class FlowStage:
    """One training step of flow and denoiser; see `worldmodel.training.loop.Stage`."""

    def __init__(self, config: FlowTraining, data: Latents) -> None:
        torch.manual_seed(config.loop.seed)
        self.config, self.data = config, data
        self.flow = Flow(config.model)
        packed = data.packed.shape[1]
        encoder = ActionEncoderConfig(packed, config.model.action_features, config.harmonics)
        self.actions = ActionEncoder(encoder) if packed else None
        parts: dict[str, nn.Module] = {"flow": self.flow}
        if self.actions is not None:
            parts["actions"] = self.actions
        self.parts = nn.ModuleDict(parts)
        self.grid = self.flow.grid((data.latents.shape[2], data.latents.shape[3]))
        self.starts = data.places(config.length)
        self.density, self.score = self.flow.forward, self.flow.denoiser.score
        if config.compiled and shutil.which(os.environ.get("CXX", "g++")):
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
        c, sigma = self.config, self.config.noise(progress)
        at = torch.from_numpy(rng.choice(self.starts, size=c.batch))[:, None] + torch.arange(c.length)
        x = self.flow.tokens(self.data.latents[at])
        noisy = (x + sigma * torch.randn(x.shape, generator=generator)).requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16, enabled=c.bf16):
            features = None
            if self.actions is not None:
                present = torch.from_numpy(rng.random((c.batch, c.length)) >= c.action_dropout)
                features = self.actions(self.data.packed[at], present)
            loss = -self.density(noisy, self.grid, None, features).log_prob_elements.float().mean()
        loss.backward()
        assert noisy.grad is not None
        target = noisy.grad * (noisy.numel() * sigma**2 / SCORE_SCALE)
        with torch.autocast("cpu", torch.bfloat16, enabled=c.bf16):
            score = self.score(
                noisy.detach(), self.grid, None, None if features is None else features.detach()
            )
        error = F.mse_loss(score.float(), target) * (SCORE_SCALE / sigma) ** 2
        error.backward()
        dims = x[0, 0].numel()
        value = loss.detach()
        return {
            "loss": value - 0.5 * LOG_2PI,
            "nats": value * dims,
            "noise": sigma,
            "bits_per_dim": value / math.log(2.0),
            "score": error.detach(),
        }


def train_flow(config: FlowTraining, data: Latents, folder: Path) -> tuple[Flow, ActionEncoder | None, Run]:
    """Train, or continue what is in ``folder``; returns modules that hold the averaged weights.

    Raises:
        DataError: episodes too short. Others as `worldmodel.training.loop.Run`.
    """
    torch.set_num_threads(config.threads)
    stage = FlowStage(config, data)
    run = Run(stage, config.loop, folder)
    run.fit("flow")
    return stage.flow, stage.actions, run


class HeadsStage:
    """One training step of the heads: squared error of the standardised reward plus cross-entropy of termination."""

    def __init__(self, config: HeadsTraining, data: Latents) -> None:
        torch.manual_seed(config.loop.seed)
        self.config, self.data = config, data
        self.heads = Heads(HeadsConfig(data.latents[0].numel(), data.packed.shape[1], config.width))
        std, mean = torch.std_mean(data.rewards)
        self.heads.reward_mean.copy_(mean)
        self.heads.reward_std.copy_(std.clamp_min(1e-6))
        self.places = data.places(2) + 1

    @property
    def module(self) -> nn.Module:
        """The heads."""
        return self.heads

    def backward(
        self, rng: np.random.Generator, generator: torch.Generator, progress: float
    ) -> Mapping[str, float | Tensor]:
        """Metrics: loss, reward (unexplained share of its variance), termination (nats)."""
        c, heads, data = self.config, self.heads, self.data
        at = torch.from_numpy(rng.choice(self.places, size=c.batch))
        previous, latent = (
            x + c.noise * torch.randn(x.shape, generator=generator)
            for x in (data.latents[at - 1], data.latents[at])
        )
        reward, logit = heads.raw(previous, latent, data.packed[at]).unbind(1)
        wanted = (data.rewards[at] - heads.reward_mean) / heads.reward_std
        squared = F.mse_loss(reward, wanted)
        ended = F.binary_cross_entropy_with_logits(logit, data.terminated[at].float())
        loss = squared + ended
        loss.backward()
        return {"loss": loss.detach(), "reward": squared.detach(), "termination": ended.detach()}


def train_heads(config: HeadsTraining, data: Latents, folder: Path) -> tuple[Heads, Run]:
    """Train reward and termination heads, or continue; returns them with averaged weights."""
    stage = HeadsStage(config, data)
    run = Run(stage, config.loop, folder)
    run.fit("heads")
    return stage.heads, run
