"""Train what is read off latent frames, or off their pictures: reward, termination, value and prior.

Heads with an eye learn from single chunks. Where the eye has a memory, that is learned next, on whole windows of what
the finished eye saw.

Axis letters: S chunks of all episodes end to end, B batch, T chunks of a window, X features of an eye.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from worldmodel.errors import ConfigError, DataError
from worldmodel.files import require_at_least
from worldmodel.heads import PIXEL_RANGE, EyeConfig, Heads, HeadsConfig
from worldmodel.training.codec import OBSERVED_FLOOR, OBSERVED_LIMIT, standardised
from worldmodel.training.flow import Latents
from worldmodel.training.loop import LoopConfig, Run
from worldmodel.training.pictures import Pictures
from worldmodel.training.precision import autocast
from worldmodel.training.returns import returns_to_go, worth_imitating

SMALL = 1e-6  # least deviation that anything is standardised by


@dataclass(frozen=True)
class MemoryTraining:
    """batch: windows of ``length`` chunks, half of which begin with an episode, half anywhere; none goes beyond it. noise:
    standard deviation added to the standardised features. copies: how often the eye looks at each episode, every time at
    frames and scenery drawn anew. observed: weight of how well the memory tells the simulator's observation, which value
    and prior then read (`HeadsConfig.observed`); 0, or episodes that hold none, for a memory that they read themselves.
    """

    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=2_000, lr=2e-3, warmup=30, weight_decay=0.03, clip=2.0)
    )
    batch: int = 48
    length: int = 160
    noise: float = 0.3
    copies: int = 2
    observed: float = 0.5

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be used."""
        require_at_least(1, self, "batch", "copies")
        require_at_least(2, self, "length")
        if not (self.noise >= 0 and self.observed >= 0):
            raise ConfigError(
                f"MemoryTraining: noise is {self.noise} and observed {self.observed}, expected at least 0"
            )


@dataclass(frozen=True)
class HeadsTraining:
    """noise: standard deviation added to the latents, as what the denoiser leaves. discount: a chunk, of a value head,
    which comes with a prior over actions (`worldmodel.heads.Ahead`); None for neither. Others as in
    `worldmodel.training.flow.FlowTraining`.

    eye: the heads read frames with it, noise then being in units of 64 grey levels. swap: share of the chunks that an eye
    sees before another episode's scenery, so that none is known by its scenery; for cameras that stand still. observed:
    weight of how well an eye's features tell the simulator's own observation, by a map that is dropped after training; 0
    where the episodes hold none. memory: how the eye's is learned, if it has one.
    """

    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=6_000, lr=1e-3))
    width: int = 192
    batch: int = 512
    noise: float = 0.03
    discount: float | None = None
    eye: EyeConfig | None = None
    swap: float = 0.0
    observed: float = 0.0
    memory: MemoryTraining = field(default_factory=MemoryTraining)

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be used."""
        if not 0 <= self.swap <= 1 or self.observed < 0:
            raise ConfigError(
                f"swap is {self.swap} and observed {self.observed}, expected 0 to 1 and at least 0"
            )
        if self.eye is None and (self.swap or self.observed):
            raise ConfigError("swap and observed are for heads with an eye; give one, or set both to 0")


class _Aims:
    """What heads are to say of each chunk, and how far they are off."""

    def __init__(self, data: Latents, heads: Heads, fresh: bool) -> None:
        """Standardises the rewards of ``fresh`` heads on the data, and every head's values.

        Raises:
            DataError: a discount at which no episode's returns are known.
        """
        self.data, self.heads, self.device = data, heads, heads.reward_mean.device
        if fresh:
            std, mean = torch.std_mean(data.rewards)
            heads.reward_mean.copy_(mean)
            heads.reward_std.copy_(std.clamp_min(SMALL))
        discount = heads.config.discount
        if discount is not None:
            self.values, self.known = returns_to_go(data.rewards, data.terminated, data.lengths, discount)
            self.imitated = worth_imitating(data.rewards, data.lengths)
            if not self.known.any():
                raise DataError(
                    f"no return is known at discount {discount}: no episode terminates, and the longest one ends after "
                    f"{data.lengths.max()} chunks; lower the discount, or record longer episodes"
                )
            std, mean = torch.std_mean(self.values[self.known])
            heads.value_mean.copy_(mean)
            heads.value_std.copy_(std.clamp_min(SMALL))

    def outcome(self, raw: Tensor, at: Tensor) -> dict[str, Tensor]:
        """Of `Heads.raw` (B, 2) at places (B,): squared error of the standardised reward, cross-entropy of termination."""
        reward, logit = raw.unbind(1)
        rewards, terminated = self.data.rewards[at].to(self.device), self.data.terminated[at].to(self.device)
        wanted = (rewards - self.heads.reward_mean) / self.heads.reward_std
        ended = F.binary_cross_entropy_with_logits(logit, terminated.float())
        return {"reward": F.mse_loss(reward, wanted), "termination": ended}

    def ahead(self, value: Tensor, prior: Tensor, at: Tensor) -> dict[str, Tensor]:
        """Of `Heads.raw_ahead` at places (B,): squared errors of the standardised return-to-go and of the next packed
        action, whose minimum is a one-hot action's probabilities.
        """
        wanted = (self.values[at].to(self.device) - self.heads.value_mean) / self.heads.value_std
        following = self.data.packed[(at + 1).clamp_max(len(self.data.packed) - 1)].to(self.device)
        known, imitated = self.known[at].to(self.device), self.imitated[at].to(self.device)
        return {
            "value": _mean_where(known, (value - wanted).square()),
            "prior": _mean_where(imitated, (prior - following).square().sum(1)),
        }


class HeadsStage:
    """One training step of heads that read one chunk. The metrics: loss, reward (unexplained share of its variance),
    termination (nats); with a discount also value (unexplained share) and prior (squared error of the packed action);
    where an eye's features are to tell the observation observed (unexplained share).
    """

    def __init__(
        self,
        config: HeadsTraining,
        data: Latents,
        heads: Heads | None = None,
        pictures: Pictures | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """``heads`` are trained further where given, else new ones, without a memory, standardised on the data's rewards.
        ``pictures``: of the same chunks as ``data``, for heads with an eye.
        """
        torch.manual_seed(config.loop.seed)
        self.config, self.data, self.pictures, self.device = config, data, pictures, torch.device(device)
        fresh = heads is None
        if heads is None:
            eye = None if config.eye is None else replace(config.eye, memory=0)
            size = data.latents[0].numel()
            heads = Heads(HeadsConfig(size, data.packed.shape[1], config.width, config.discount, eye))
        self.heads = heads.requires_grad_(True)
        self.readout: nn.Module | None = None
        if heads.eye is not None:
            told = _same_chunks(pictures, data).observations
            if config.observed and told.shape[1]:
                width, numbers = heads.config.width, told.shape[1]
                hidden = nn.Linear(heads.eye.config.features, width)
                self.readout = nn.Sequential(hidden, nn.SiLU(), nn.Linear(width, numbers))
                self.observations = torch.from_numpy(standardised(told.numpy()))
        self.module.to(self.device)
        self.places = data.places(2) + 1
        self.aims = _Aims(data, heads, fresh)

    @property
    def module(self) -> nn.Module:
        """The heads, with what reads observations off an eye where there is one."""
        return self.heads if self.readout is None else nn.ModuleList([self.heads, self.readout])

    def _seen(self, at: np.ndarray, rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        """What the heads see of the chunks at places (B,), with noise."""
        c, heads = self.config, self.heads
        if heads.eye is None:
            latent = self.data.latents[torch.from_numpy(at)]
            return (latent + c.noise * torch.randn(latent.shape, generator=generator)).to(self.device)
        assert self.pictures is not None
        frames = self.pictures.windows(at, 1, c.swap, rng)[:, 0].float()
        frames = frames + c.noise * PIXEL_RANGE * torch.randn(frames.shape, generator=generator)
        with autocast(self.device.type):
            return heads.eye(frames.to(self.device)).float()

    def backward(
        self, rng: np.random.Generator, generator: torch.Generator, progress: float
    ) -> Mapping[str, float | Tensor]:
        """See `worldmodel.training.loop.Stage`."""
        c, heads, data = self.config, self.heads, self.data
        places = rng.choice(self.places, size=c.batch)
        at = torch.from_numpy(places)
        previous = data.latents[at - 1]
        previous = (previous + c.noise * torch.randn(previous.shape, generator=generator)).to(self.device)
        seen = self._seen(places, rng, generator)
        parts = self.aims.outcome(heads.raw(previous, seen, data.packed[at].to(self.device)), at)
        if heads.config.discount is not None:
            parts |= self.aims.ahead(*heads.raw_ahead(seen), at)
        loss = torch.stack(list(parts.values())).sum()
        if self.readout is not None:
            missed = (self.readout(seen) - self.observations[at].to(self.device)).square().mean(0)
            loss = loss + c.observed * _precision(missed)
            parts["observed"] = missed.mean()
        loss.backward()
        return {"loss": loss.detach(), **{name: part.detach() for name, part in parts.items()}}


class MemoryStage:
    """One training step of an eye's memory and of the heads behind it, the eye being finished. Metrics as in `HeadsStage`;
    where the memory tells the observation, value and prior learn from the true one.
    """

    def __init__(
        self, config: HeadsTraining, data: Latents, heads: Heads, pictures: Pictures, fresh: bool
    ) -> None:
        """``heads`` with a memory; a ``fresh`` one, and the observation that it tells, are standardised on the data."""
        assert heads.eye is not None and heads.memory is not None
        self.config, self.data, self.heads = config, data, heads.requires_grad_(True)
        self.device = heads.reward_mean.device
        heads.eye.requires_grad_(False)
        self.features = features_of(heads, pictures, config)
        if fresh:
            std, mean = torch.std_mean(self.features.flatten(0, 1).float(), dim=0)
            heads.memory.mean.copy_(mean)
            heads.memory.std.copy_(std + 1e-3)
        self.observations: Tensor | None = None
        if heads.tell is not None and pictures.observations.shape[1]:
            if fresh:
                std, mean = torch.std_mean(pictures.observations, dim=0)
                heads.observation_mean.copy_(mean)
                heads.observation_std.copy_(std + SMALL)
            told = (pictures.observations - heads.observation_mean.cpu()) / heads.observation_std.cpu()
            self.observations = told.clamp(-OBSERVED_LIMIT, OBSERVED_LIMIT)
        self.first = np.cumsum(data.lengths) - data.lengths
        self.aims = _Aims(data, heads, fresh=False)

    @property
    def module(self) -> nn.Module:
        """The heads; the eye in them has no gradient."""
        return self.heads

    def _windows(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Places of windows (B, T), and which of them (B, T) are in the episode that the window begins in."""
        c = self.config.memory
        episode = rng.choice(len(self.first), p=self.data.lengths / self.data.lengths.sum(), size=c.batch)
        skipped = rng.integers(self.data.lengths[episode]) * rng.integers(2, size=c.batch)
        at = self.first[episode] + skipped
        places = torch.from_numpy(at)[:, None] + torch.arange(c.length)
        ends = torch.from_numpy((self.first + self.data.lengths)[episode])[:, None]
        return places.minimum(ends - 1), places < ends

    def backward(
        self, rng: np.random.Generator, generator: torch.Generator, progress: float
    ) -> Mapping[str, float | Tensor]:
        """See `worldmodel.training.loop.Stage`."""
        c, heads, memory = self.config, self.heads, self.heads.memory
        assert memory is not None
        places, inside = self._windows(rng)
        copy = torch.from_numpy(rng.integers(c.memory.copies, size=len(places)))[:, None]
        features = memory.standardised(self.features[copy, places].float().to(self.device))
        noise = torch.randn(features.shape, generator=generator).to(self.device)
        nothing = features.new_zeros(len(places), heads.config.seen)
        packed = self.data.packed[places].to(self.device)
        here = inside.to(self.device)
        seen = memory.through(features + c.memory.noise * noise, packed, nothing)[here]
        at = places[inside]
        parts = self.aims.outcome(heads.raw(seen[:, :0], seen, packed[here]), at)
        loss = torch.zeros((), device=self.device)
        known = None
        if self.observations is not None and heads.tell is not None:
            known = self.observations[at].to(self.device)
            missed = (heads.tell(seen) - known).square().mean(0)
            loss = c.memory.observed * _precision(missed)
        if heads.config.discount is not None:
            parts |= self.aims.ahead(*heads.raw_ahead(seen, known), at)
        loss = loss + torch.stack(list(parts.values())).sum()
        if known is not None:
            parts["observed"] = missed.mean()
        loss.backward()
        return {"loss": loss.detach(), **{name: part.detach() for name, part in parts.items()}}


@torch.no_grad()
def features_of(heads: Heads, pictures: Pictures, config: HeadsTraining) -> Tensor:
    """What an eye sees of every chunk (copies, S, X) float16: each time in real or decoded frames of the whole episode,
    some before another's scenery.
    """
    assert heads.eye is not None
    rng, device = np.random.default_rng(config.memory.loop.seed), heads.reward_mean.device
    first, counts = np.unique(pictures.episode, return_index=True, return_counts=True)[1:]
    copies = []
    for _ in range(config.memory.copies):
        bar = tqdm(zip(first, counts, strict=True), "look", len(first), leave=False, delay=2, unit="episode")
        seen = [
            heads.eye(pictures.windows(np.array([at]), int(count), config.swap, rng)[0].to(device)).cpu()
            for at, count in bar
        ]
        copies.append(torch.cat(seen).half())
    return torch.stack(copies)


def _precision(missed: Tensor) -> Tensor:
    """Of unexplained shares (D,): what a normal density of each number would lose, in nats."""
    return 0.5 * torch.log(missed + OBSERVED_FLOOR).mean()


def _mean_where(mask: Tensor, values: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum().clamp_min(1)


def _same_chunks(pictures: Pictures | None, data: Latents) -> Pictures:
    if pictures is None or len(pictures.episode) != len(data.rewards):
        raise DataError("heads with an eye learn from the frames of the same chunks as the latents")
    return pictures


def with_memory(heads: Heads, eye: EyeConfig, observed: int) -> Heads:
    """New heads behind the same eye, with a memory that tells ``observed`` numbers."""
    remembering = Heads(replace(heads.config, eye=eye, observed=observed)).to(heads.reward_mean.device)
    remembering.eye = heads.eye
    for name in ("reward_mean", "reward_std"):
        remembering.get_buffer(name).copy_(heads.get_buffer(name))
    return remembering


def train_heads(
    config: HeadsTraining,
    data: Latents,
    folder: Path,
    heads: Heads | None = None,
    pictures: Pictures | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Heads, Run]:
    """Train heads, new ones or ``heads``, or continue; returns them on ``device`` with averaged weights. A memory's run is
    in ``folder``/memory; heads that have one already learn with their eye as it is.

    Raises:
        DataError: heads with an eye without the ``pictures`` of the same chunks, a memory that tells another observation
            than these have, or episodes too short for the discount.
    """
    eye = config.eye if heads is None else heads.config.eye
    fresh = heads is None or heads.memory is None
    if heads is None or heads.memory is None:
        stage = HeadsStage(config, data, heads, pictures, device)
        run = Run(stage, config.loop, folder)
        run.fit("heads")
        heads = stage.heads
        if eye is None or not eye.memory:
            return heads, run
        told = _same_chunks(pictures, data).observations.shape[1] if config.memory.observed else 0
        torch.manual_seed(config.memory.loop.seed)
        heads = with_memory(heads, eye, told)
    heads.to(device)
    pictures = _same_chunks(pictures, data)
    numbers = pictures.observations.shape[1]
    if heads.config.observed and numbers not in (0, heads.config.observed):
        raise DataError(
            f"the episodes hold observations of {numbers} numbers, expected {heads.config.observed}, which the world's "
            "memory tells, or none"
        )
    run = Run(MemoryStage(config, data, heads, pictures, fresh), config.memory.loop, folder / "memory")
    run.fit("memory")
    return heads, run
