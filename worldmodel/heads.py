"""What is read off latent frames: reward and termination of two successive ones, and, in worlds that learned from
episodes worth imitating, the value of one and the action that good behaviour would take next.

Heads with an `Eye` read the decoded picture in the latents' place: of something small that moves before scenery which
differs from episode to episode, latents say too little that carries over to scenery never seen. A `Memory` of what the
eye saw and of what was done tells what one chunk does not, e.g. how fast something turns.

Axis letters: B batch, F pixel frames of a chunk, C channels, K points, X features, M remembered numbers, D numbers of the
simulator's observation; h, w latent grid; height, width pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from worldmodel.codec.base import Codec
from worldmodel.errors import ConfigError, InputError
from worldmodel.files import require_at_least
from worldmodel.invariance import MATRIX_ROWS, PICTURES, with_rows
from worldmodel.packed import Perceptron

PIXEL_RANGE = 64.0  # grey levels that an eye calls 1
STILL = 0.02  # motion below which a pixel counts as at rest, in units of PIXEL_RANGE


@dataclass(frozen=True)
class EyeConfig:
    """frames: F of a chunk. channels: of its convolutions. points: K places in the picture that it looks at. memory: M
    numbers that are remembered of all chunks and actions so far; 0 for none.
    """

    frames: int = 4
    channels: int = 32
    points: int = 8
    memory: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError for sizes that no model has."""
        require_at_least(1, self, "channels", "points")
        require_at_least(2, self, "frames")
        require_at_least(0, self, "memory")

    @property
    def features(self) -> int:
        """Numbers that it makes of a chunk: of each point the place and what is there."""
        return self.points * (2 + self.channels)


class Eye(nn.Module):
    """Pictures to features: K soft points, each with its place and what is seen there (spatial softmax, as in Deep Spatial
    Autoencoders, arXiv 1509.06113). Every other point is drawn to what moves within the chunk, from the start of
    training on.
    """

    def __init__(self, config: EyeConfig) -> None:
        super().__init__()
        self.config = config
        width = config.channels
        self.first = nn.Conv2d(3 * config.frames, width, 5, stride=2, padding=2)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.third = nn.Conv2d(width, width, 3, padding=1)
        self.points = nn.Conv2d(width, config.points, 1)
        nn.init.normal_(self.points.weight, std=0.3)
        self.drawn = nn.Parameter((torch.arange(config.points) % 2).float()[:, None, None])

    def forward(self, frames: Tensor) -> Tensor:
        """(B, F, height, width, 3) uint8 or floating-point grey levels to (B, `EyeConfig.features`) float32."""
        x = rearrange(frames.float() / PIXEL_RANGE - 1.0, "B F height width c -> B (F c) height width")
        x = x.contiguous(memory_format=torch.channels_last)
        h = F.silu(self.first(x))
        h = h + F.silu(self.second(h))
        h = h + F.silu(self.third(h))
        weights = (
            (self.points(h).float() + self.drawn * _motion(x, self.config.frames)).flatten(2).softmax(-1)
        )
        rows, columns = (torch.linspace(-1.0, 1.0, n, device=x.device) for n in h.shape[2:])
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
        seen = weights @ torch.cat((grid.expand(len(h), -1, -1), h.float().flatten(2).mT), dim=2)
        return seen.flatten(1)


def _motion(x: Tensor, frames: int) -> Tensor:
    """Log of how much half-size pixels differ from the last frame (B, 1, height/2, width/2), blurred a little."""
    last = x[:, -3:]
    moved = torch.stack([(x[:, 3 * k : 3 * k + 3] - last).abs().sum(1) for k in range(frames - 1)]).sum(0)
    half = F.avg_pool2d(moved[:, None], 2, ceil_mode=True)
    return torch.log(F.avg_pool2d(half, 3, stride=1, padding=1) + STILL)


@dataclass(frozen=True)
class HeadsConfig:
    """latent_size: C * h * w of a latent frame. packed: P of a packed action. width: hidden units. discount: of the
    returns that the value foresees, a chunk; None for heads of reward and termination alone. eye: they read the newest
    chunk's picture with it; None for heads that read latents. observed: D numbers of the simulator's observation that the
    eye's memory tells, and that value and prior then read in its place; 0 for none.
    """

    latent_size: int
    packed: int
    width: int = 192
    discount: float | None = None
    eye: EyeConfig | None = None
    observed: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError for sizes that no model has."""
        require_at_least(1, self, "latent_size", "width")
        require_at_least(0, self, "packed", "observed")
        if self.observed and not (self.eye and self.eye.memory):
            raise ConfigError(
                f"HeadsConfig: observed is {self.observed} without a memory to tell it; expected 0"
            )
        if self.discount is not None and not 0 < self.discount <= 1:
            raise ConfigError(f"HeadsConfig: discount is {self.discount}, expected (0, 1], or null")

    @property
    def seen(self) -> int:
        """Numbers that are kept of what an eye saw: M with a memory, else X; 0 without an eye."""
        return 0 if self.eye is None else self.eye.memory or self.eye.features


class Memory(nn.Module):
    """What an eye saw and what was done, chunk after chunk, in M numbers: a gated recurrent unit (arXiv 1406.1078).

    Features are standardised; their means and deviations are buffers fitted on the training data.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: EyeConfig, packed: int, width: int) -> None:
        super().__init__()
        self.read = nn.Linear(config.features + packed, width)
        self.unit = nn.GRU(width, config.memory, batch_first=True)
        self.register_buffer("mean", torch.zeros(config.features))
        self.register_buffer("std", torch.ones(config.features))

    def standardised(self, features: Tensor) -> Tensor:
        """Features (..., X) as `through` reads them."""
        return (features - self.mean) / self.std

    def through(self, standardised: Tensor, packed: Tensor, before: Tensor) -> Tensor:
        """Windows of standardised features (B, T, X), of the packed actions (B, T, P) that led to them, and what was
        remembered before (B, M), to what is remembered after each chunk (B, T, M).
        """
        read = F.silu(self.read(torch.cat((standardised, packed), dim=2)))
        remembered: Tensor = self.unit(read, before[None])[0]
        return remembered

    def forward(self, features: Tensor, packed: Tensor, before: Tensor) -> Tensor:
        """One chunk: features (B, X), actions (B, P) and what was remembered before (B, M) to what is now (B, M)."""
        return self.through(self.standardised(features)[:, None], packed[:, None], before)[:, 0]


class Outcome(NamedTuple):
    """reward (B,), summed over the chunk; termination (B,), a probability."""

    reward: Tensor
    termination: Tensor


class Ahead(NamedTuple):
    """value (B,): what the training episodes returned after such a latent, discounted, in units of reward. prior (B, P):
    the expected packed action of their better half: probabilities where it is one-hot, a mean in [-1, 1] for Box.
    """

    value: Tensor
    prior: Tensor


class Heads(nn.Module):
    """(previous latent, latent, action) to reward and termination; one latent, which holds the motion within its chunk,
    to value and prior where the configuration has a ``discount``.

    With an eye, what is seen of the newer latent's picture takes the place of both. With an observation to tell, value and
    prior read that alone: good behaviour is then learned from the simulator's observation, and not from what a memory
    knows of the actions before, which imitation would merely repeat. Reward, value and observation are predicted
    standardised; their means and deviations are buffers fitted on the training data.
    """

    reward_mean: Tensor
    reward_std: Tensor
    value_mean: Tensor
    value_std: Tensor
    observation_mean: Tensor
    observation_std: Tensor

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        self.config = config
        self.eye = None if config.eye is None else Eye(config.eye)
        self.memory: Memory | None = None
        one, two = config.latent_size, 2 * config.latent_size
        if config.eye is not None:
            one = two = config.seen
            if config.eye.memory:
                self.memory = Memory(config.eye, config.packed, config.width)
        self.layers = Perceptron(two + config.packed, config.width, config.width, 2)
        self.register_buffer("reward_mean", torch.zeros(()))
        self.register_buffer("reward_std", torch.ones(()))
        self.tell: Perceptron | None = None
        if config.observed:
            self.tell = Perceptron(config.seen, config.width, config.width, config.observed)
            self.register_buffer("observation_mean", torch.zeros(config.observed))
            self.register_buffer("observation_std", torch.ones(config.observed))
        self.ahead_layers: Perceptron | None = None
        if config.discount is not None:
            self.ahead_layers = Perceptron(
                config.observed or one, config.width, config.width, 1 + config.packed
            )
            self.register_buffer("value_mean", torch.zeros(()))
            self.register_buffer("value_std", torch.ones(()))

    def see(
        self, before: Tensor | None, latent: Tensor, frames: Tensor, packed: Tensor, codec: Codec
    ) -> Tensor | None:
        """What is kept of a chunk, as `WorldState.seen`: (B, X), (B, M) with a memory, None for heads that read latents.

        ``before``: the same before the chunk. latent (B, C, h, w) and frames (B, F, height, width, 3) uint8 of the chunk,
        or (B, 0, ...) where ``codec`` is to decode it. packed: (B, P) the action that caused it.
        """
        if self.eye is None:
            return None
        if not frames.shape[1]:
            frames, _ = codec.decode(latent[:, None], codec.initial_state(len(latent)))
        features = with_rows(PICTURES, self.eye, frames.to(latent.device))
        if self.memory is None or before is None:
            return features
        return with_rows(MATRIX_ROWS, self.memory, features, packed, before)

    def raw(self, previous: Tensor, seen: Tensor, packed: Tensor) -> Tensor:
        """Standardised reward and termination logit (B, 2), from the latents before (B, C, h, w), what is seen of the newer
        ones (`see`; the latents themselves without an eye) and packed actions (B, P).
        """
        before = () if self.eye is not None else (previous.flatten(1),)
        return self.layers(torch.cat((*before, seen.flatten(1), packed), dim=1))

    def forward(self, previous: Tensor, seen: Tensor, packed: Tensor) -> Outcome:
        """See `raw`; in the units of the environment's reward, and as a probability."""
        reward, logit = with_rows(self.layers.least_rows, self.raw, previous, seen, packed).float().unbind(1)
        return Outcome(reward * self.reward_std + self.reward_mean, logit.sigmoid())

    def raw_ahead(self, seen: Tensor, observation: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Standardised value (B,) and the expected packed action (B, P), from what is seen (`see`).

        ``observation``: the standardised one (B, D) where it is known, for heads that would have to tell it.

        Raises:
            InputError: heads of reward and termination alone.
        """
        if self.ahead_layers is None:
            raise InputError("this world's heads foresee no value and no action; train them with a discount")
        if self.tell is not None:
            seen = self.tell(seen) if observation is None else observation
        both = self.ahead_layers(seen.flatten(1))
        return both[:, 0], both[:, 1:]

    @torch.no_grad()
    def observation(self, seen: Tensor) -> Tensor:
        """The simulator's observation after what was seen (`WorldState.seen`), as pixels tell it: (B, D), in its own units.

        Raises:
            InputError: heads that tell none.
        """
        if self.tell is None:
            raise InputError(
                "this world's heads tell no observation; train them with a memory, on episodes that hold one"
            )
        return (
            with_rows(self.tell.least_rows, self.tell, seen).float() * self.observation_std
            + self.observation_mean
        )

    @torch.no_grad()
    def ahead(self, seen: Tensor) -> Ahead:
        """See `Ahead` and `see`. Raises InputError as `raw_ahead`."""
        value, prior = (
            with_rows(
                MATRIX_ROWS,
                lambda x: torch.cat([y.reshape(len(x), -1) for y in self.raw_ahead(x)], dim=1),
                seen,
            )
            .float()
            .split((1, self.config.packed), dim=1)
        )
        return Ahead(value[:, 0] * self.value_std + self.value_mean, prior)
