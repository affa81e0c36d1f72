"""Train the convolutional codec, measure it on held-out episodes, and encode a dataset once for the flow.

Axis letters: B batch, F pixel frames of a chunk, C latent channels, K chunks of an episode; h, w latent grid;
height, width pixels.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from worldmodel.codec.base import Codec
from worldmodel.codec.conv import (
    PIXEL_SCALE,
    ConvCodec,
    ConvCodecConfig,
    channels_last,
    load_codec,
    round_weights,
    save_codec,
)
from worldmodel.errors import ConfigError, DataError
from worldmodel.files import (
    config_from_dict,
    config_to_dict,
    load_tensors,
    read_json,
    save_tensors,
    write_json,
)
from worldmodel.training.episodes import Episode, EpisodeDataset, EpisodeSplit
from worldmodel.training.loop import LoopConfig, Run
from worldmodel.training.precision import autocast

MOVED = 12.0  # grey levels by which a pixel must change to count as moving
SAVE_SECONDS = 60.0
PIECE = 16  # chunks encoded at once
OBSERVED_LIMIT = 4.0  # standard deviations at which an observation is cut off
OBSERVED_FLOOR = 1e-3  # share of its variance below which a number of the observation need not be told
NOISES = (0.0, 0.05, 0.1)  # standard deviations at which decoding is measured


@dataclass(frozen=True)
class CodecTraining:
    """How to train a codec.

    batch: chunks a step; half of them are the other half one frame later. noise: largest standard deviation
    of the noise on the standardised latents, drawn anew for each chunk. smoothness: weight of the squared
    distance that the latent moves in one frame. moving: weight of a second error term, over the pixels that move within
    a pair of chunks, for what is small in the picture. still: share of chunks that show one frame F times, as an
    environment that starts from an image does. motion: share of chunks drawn in proportion to how much their pixels
    change, the others evenly. observed: weight of how well one linear map of the noisy latents tells the observation
    that the simulator gave with a chunk's last frame, for what matters and is hardly seen; where every episode has scenery
    of its own, it may learn that by heart. It is dropped after training, so the codec reads pixels alone. bf16: autocast
    to bfloat16, where that is faster. threads: of the processor.
    """

    model: ConvCodecConfig = ConvCodecConfig()
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=3_000, lr=2e-3, warmup=100))
    batch: int = 64
    noise: float = 0.12
    smoothness: float = 1.0
    moving: float = 0.0
    still: float = 0.04
    motion: float = 0.0
    observed: float = 0.0
    bf16: bool = True
    threads: int = 2

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be used."""
        if self.batch < 2 or self.batch % 2:
            raise ConfigError(f"batch must be even and at least 2, got {self.batch}")
        if not 0 <= self.motion <= 1:
            raise ConfigError(f"motion is {self.motion}, expected a share of 0 to 1")


def pendulum_codec(minutes: float = 14.5) -> CodecTraining:
    """The recipe of the shipped world's codec, ended by the clock (about 3,000 steps on 2 cores)."""
    return CodecTraining(loop=LoopConfig(steps=8_000, minutes=minutes, lr=2e-3, warmup=100))


def lunarlander_codec(minutes: float = 25.0) -> CodecTraining:
    """The recipe of the shipped world's codec: more channels, and an eye on the lander, which is 3 pixels tall."""
    return CodecTraining(
        model=ConvCodecConfig(latent_channels=16),
        loop=LoopConfig(steps=8_000, minutes=minutes, lr=2e-3, warmup=100),
        smoothness=0.3,
        moving=1.0,
    )


class CodecStage:
    """One training step: the log of the squared error through a noisy latent, plus the latent's smoothness.

    The loss is half the log of the mean squared error, a Gaussian likelihood with its best variance, so it
    pulls as strongly at 40 dB as at 20 dB. A squared error, unlike an absolute one, is not at rest at the
    background.
    """

    def __init__(
        self,
        config: CodecTraining,
        split: EpisodeSplit,
        start: ConvCodec | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """``start``: a codec whose weights the run begins with, instead of random ones."""
        torch.manual_seed(config.loop.seed)
        self.config, self.split, self.device = config, split, torch.device(device)
        self.codec = ConvCodec(config.model)
        if start is not None:
            self.codec.load_state_dict(start.state_dict())
        channels_last(self.codec)
        self.codec.background.copy_(median_background(split) if start is None else start.background)
        self.places = places(split, config.model.frames)
        self.moving = pixel_motion(split, config.model.frames) if config.motion else None
        self.readout = Readout(config.model, split) if config.observed else None
        self.module.to(self.device)

    @property
    def module(self) -> nn.Module:
        """The codec, with its readout where there is one."""
        if self.readout is None:
            return self.codec
        return nn.ModuleDict({"codec": self.codec, "readout": self.readout})

    def pairs(self, rng: np.random.Generator) -> Tensor:
        """(B, F, height, width, 3) uint8: B/2 chunks at any frame, then the same one frame later."""
        return self._pictures(self._drawn(rng))

    def _drawn(self, rng: np.random.Generator) -> list[tuple[int, int, bool]]:
        """B/2 pairs as (episode, frame, whether they stand still)."""
        places = self._places(rng, self.config.batch // 2)
        return [(index, start, rng.random() < self.config.still) for index, start in places]

    def _pictures(self, drawn: list[tuple[int, int, bool]]) -> Tensor:
        """See `pairs`."""
        size = self.config.model.frames
        first, second = [], []
        for index, start, still in drawn:
            frames = self.split.episode(index).frames
            if still:
                first.append(np.repeat(frames[start : start + 1], size, axis=0))
                second.append(np.repeat(frames[start + 1 : start + 2], size, axis=0))
            else:
                first.append(frames[start : start + size])
                second.append(frames[start + 1 : start + 1 + size])
        return torch.from_numpy(np.stack(first + second))

    def _places(self, rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
        """Where ``count`` pairs start: (episode, frame)."""
        chosen = rng.integers(len(self.places), size=count)
        if self.moving is not None:
            drawn = round(count * self.config.motion)
            chosen[count - drawn :] = rng.choice(len(self.places), size=drawn, p=self.moving)
        return [(int(index), int(start)) for index, start in self.places[chosen]]

    def backward(
        self, rng: np.random.Generator, generator: torch.Generator, progress: float
    ) -> Mapping[str, float | Tensor]:
        """See `worldmodel.training.loop.Stage`. Metrics: loss, psnr (dB, of noisy latents), motion, and, with a readout,
        observed (unexplained share of the observations' variance).
        """
        drawn = self._drawn(rng)
        x = self.codec.to_input(self._pictures(drawn).to(self.device))
        with autocast(self.device.type, self.config.bf16):
            raw = self.codec.encoder(x)
        raw = raw.float()
        centred = raw - raw.mean(dim=0)
        z = centred / (centred.square().mean(dim=(0, 2, 3), keepdim=True) + 1e-6).sqrt()
        sigma = self.config.noise * torch.rand(len(z), 1, 1, 1, generator=generator)
        noisy = z + (sigma * torch.randn(z.shape, generator=generator)).to(self.device)
        with autocast(self.device.type, self.config.bf16):
            y = self.codec.decoder(noisy.contiguous(memory_format=torch.channels_last))
        squares = (y.float() - x).square()
        square = squares.mean()
        now, later = z.chunk(2)
        motion = (later - now).square().mean()
        loss = 0.5 * torch.log(square + 1e-8) + self.config.smoothness * motion
        if self.config.moving:
            mask = moving_pixels(x)
            seen = (squares * mask).sum() / mask.sum().clamp_min(1.0)
            loss = loss + self.config.moving * 0.5 * torch.log(seen + 1e-8)
        told = {}
        if self.readout is not None:
            missed = self.readout.missed(noisy, drawn)
            loss = loss + self.config.observed * 0.5 * torch.log(missed + OBSERVED_FLOOR).mean()
            told = {"observed": missed.detach().mean()}
        loss.backward()
        psnr = 10 * torch.log10((255 / 128) ** 2 / square.detach())
        return {"loss": loss.detach(), "psnr": psnr, "motion": motion.detach(), **told}


class Readout(nn.Module):
    """One linear map of a noisy latent to the standardised observation of its chunk's last frame, for training alone."""

    def __init__(self, model: ConvCodecConfig, split: EpisodeSplit) -> None:
        """Raises DataError for episodes that hold no observations."""
        super().__init__()
        every = [split.episode(index).observations for index in split.indices]
        together = np.concatenate(every).reshape(sum(map(len, every)), -1)
        if not together.shape[1]:
            raise DataError("the episodes hold no observations to be told; set the codec's observed to 0")
        parts = np.split(standardised(together), np.cumsum([len(row) for row in every])[:-1])
        self.aims = dict(zip(split.indices, parts, strict=True))
        self.frames = model.frames
        self.map = nn.Linear(math.prod(model.latent_shape), together.shape[1])

    def missed(self, latents: Tensor, drawn: list[tuple[int, int, bool]]) -> Tensor:
        """Mean squared error (D,) by number of the observation, over the pairs ``drawn`` that do not stand still."""
        rows = [row for row, (_, _, still) in enumerate(drawn) if not still]
        ends = [(drawn[row][0], drawn[row][1] + self.frames - 1) for row in rows]
        aims = [self.aims[index][end + later] for later in (0, 1) for index, end in ends]
        chosen = torch.tensor(
            [row + later * len(drawn) for later in (0, 1) for row in rows], dtype=torch.long
        )
        if not rows:
            return latents.new_ones(self.map.out_features)
        told = self.map(latents.flatten(1)[chosen.to(latents.device)])
        return (told - torch.from_numpy(np.stack(aims)).to(told.device)).square().mean(dim=0)


def standardised(observations: np.ndarray) -> np.ndarray:
    """Observations (n, D) as float32, each number less its mean, in standard deviations, cut off at `OBSERVED_LIMIT`."""
    spread = observations.std(axis=0) + 1e-6
    limited = ((observations - observations.mean(axis=0)) / spread).clip(-OBSERVED_LIMIT, OBSERVED_LIMIT)
    return np.asarray(limited, dtype=np.float32)


def places(split: EpisodeSplit, size: int) -> np.ndarray:
    """(episode, frame) (N, 2) at which a chunk of ``size`` frames and the one a frame later may start."""
    each = [(index, len(split.episode(index).frames) - size) for index in split.indices]
    return np.concatenate([np.stack([np.full(n, index), np.arange(n)], axis=1) for index, n in each])


def pixel_motion(split: EpisodeSplit, size: int) -> np.ndarray:
    """What share (N,) of all change a chunk of ``size`` frames and the frame after it hold, at each of `places`."""
    shares = []
    for index in tqdm(split.indices, desc="motion", leave=False, delay=2):
        frames = split.episode(index).frames[:, ::2, ::2].astype(np.int16)
        total = np.concatenate(([0.0], np.abs(frames[1:] - frames[:-1]).mean(axis=(1, 2, 3)).cumsum()))
        shares.append(total[size:] - total[: len(total) - size])
    held = np.concatenate(shares) + 1e-6
    return np.asarray(held / held.sum())


def moving_pixels(x: Tensor) -> Tensor:
    """(B, 3F, height, width) float32, 1 where a pixel changes within its pair of chunks, else 0; ``x`` as the codec sees
    it, the second half of the batch one frame after the first.
    """
    pictures = rearrange(x, "(two B) (F c) height width -> B (two F) c height width", two=2, c=3)
    span = (pictures.amax(dim=1) - pictures.amin(dim=1)).amax(dim=1)  # B height width
    moved = (span > MOVED / PIXEL_SCALE).float()
    return moved.repeat(2, 1, 1)[:, None].expand_as(x)


def median_background(split: EpisodeSplit, frames: int = 400) -> Tensor:
    """(3, height, width) float32 in pixels: the median over frames spread evenly through the split."""
    chosen = np.linspace(0, len(split.indices) - 1, min(frames, len(split.indices))).astype(int)
    each = math.ceil(frames / len(chosen))
    stack = []
    for row in chosen:
        clip = split.episode(split.indices[int(row)]).frames
        stack += [clip[int(i)] for i in np.linspace(0, len(clip) - 1, each)]
    median = np.median(np.stack(stack), axis=0).astype(np.float32)
    return torch.from_numpy(rearrange(median, "height width c -> c height width").copy())


def chunk_batches(split: EpisodeSplit, description: str, episodes: int | None = None) -> Iterator[Tensor]:
    """The chunks (K, F, height, width, 3) uint8 of ``episodes`` episodes spread evenly, one by one."""
    count = len(split.indices) if episodes is None else min(episodes, len(split.indices))
    for row in tqdm(
        np.linspace(0, len(split.indices) - 1, count).astype(int), desc=description, leave=False, delay=2
    ):
        frames = torch.from_numpy(split.episode(split.indices[int(row)]).frames)
        yield rearrange(frames[1:], "(K F) height width c -> K F height width c", F=split.frame_skip)


@torch.no_grad()
def standardise(stage: CodecStage, batches: int = 200) -> None:
    """Set the codec's latent mean (by element) and deviation (by channel) from batches drawn as in its training,
    where each batch is standardised by itself.
    """
    codec, rng = stage.codec, np.random.default_rng((stage.config.loop.seed, 2**31))
    codec.latent_mean.zero_()
    codec.latent_std.fill_(1.0)
    drawn = tqdm(range(batches), desc="standardise", leave=False, delay=2)
    latents = torch.cat([codec.encode(stage.pairs(rng).to(stage.device), {})[0] for _ in drawn])
    codec.latent_mean.copy_(latents.mean(dim=(0, 1)))
    deviation = (latents - codec.latent_mean).square().mean(dim=(0, 1, 3, 4)).sqrt()
    codec.latent_std.copy_(deviation[:, None, None])


@torch.no_grad()
def measure_codec(codec: ConvCodec, split: EpisodeSplit, episodes: int | None = None) -> dict[str, float]:
    """Reconstruction of real chunks of uint8 frames, in dB.

    psnr: of the mean squared error over all chunks; psnr_chunk_mean and psnr_chunk_p5: mean and 5th
    percentile of the chunks' own. psnr_noise_S: with N(0, S^2) on the standardised latents. motion: mean
    squared distance that a latent moves from one chunk to the next, where two independent ones would be 2
    apart; left out where every episode has one chunk.
    """
    generator = torch.Generator().manual_seed(0)
    errors: dict[float, list[Tensor]] = {noise: [] for noise in NOISES}
    moves = []
    for chunks in chunk_batches(split, "measure codec", episodes):
        latents, _ = codec.encode(chunks, {})
        moves.append((latents[1:] - latents[:-1]).square().mean(dim=(1, 2, 3)))
        for noise in NOISES:
            back, _ = codec.decode(latents + noise * torch.randn(latents.shape, generator=generator), {})
            errors[noise].append((back.double() - chunks.double()).square().mean(dim=(1, 2, 3, 4)))
    by_noise = {noise: torch.cat(parts) for noise, parts in errors.items()}
    result = {"psnr" if not n else f"psnr_noise_{n:g}": float(_psnr(e.mean())) for n, e in by_noise.items()}
    each, moved = _psnr(by_noise[0.0]), torch.cat(moves)
    result |= {"psnr_chunk_mean": float(each.mean()), "psnr_chunk_p5": float(each.quantile(0.05))}
    result |= {"motion": float(moved.mean())} if len(moved) else {}
    return result | {"chunks": float(len(each))}


def _psnr(square_error: Tensor) -> Tensor:
    """dB from mean squared errors of 8-bit pixels; at most 100."""
    return 10 * torch.log10(255.0**2 / square_error.clamp_min(255.0**2 / 1e10))


def train_codec(
    config: CodecTraining,
    data: Path,
    folder: Path,
    start: ConvCodec | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Train on the train split of the dataset in ``data``, continuing what is in ``folder``; export, measure.

    ``start``: a codec of the same configuration whose weights a fresh run begins with.

    Writes ``codec.safetensors`` (float16 weights) and ``codec.json`` (configuration, and quality on the
    test split of the weights as written); returns the content of the latter.

    Raises:
        DataError: the dataset cannot be read or does not fit the configuration.
        Interrupted, TrainingError, CheckpointError, ConfigError: as `worldmodel.training.loop.Run`.
    """
    dataset, folder = EpisodeDataset.open(data), Path(folder)
    model = config.model
    if dataset.frame_size != (model.height, model.width) or dataset.frame_skip != model.frames:
        raise DataError(
            f"{data} has chunks of {dataset.frame_skip} frames of {dataset.frame_size} pixels, the codec for "
            f"{model.frames} of {(model.height, model.width)}; change the codec's configuration"
        )
    if start is not None and start.config != model:
        raise ConfigError(f"the codec to start with has {start.config}, expected the recipe's {model}")
    torch.set_num_threads(config.threads)
    train = dataset.split("train")
    stage = CodecStage(config, train, start, device)
    run = Run(stage, config.loop, folder)
    run.fit("codec")
    codec = stage.codec.requires_grad_(False).eval()
    round_weights(codec)
    standardise(stage)
    save_codec(folder / "codec.safetensors", codec)
    shipped = load_codec(
        folder / "codec.safetensors", model
    )  # measured on the CPU, where its quality is the same anywhere
    report = {
        "codec": config_to_dict(model),
        "training": config_to_dict(config),
        "steps": run.step,
        "minutes": run.elapsed / 60,
        "parameters": sum(weight.numel() for weight in codec.parameters()),
        "test": measure_codec(shipped, dataset.split("test")),
    }
    write_json(folder / "codec.json", report)
    return report


def load_trained_codec(folder: Path) -> ConvCodec:
    """The codec that `train_codec` exported to ``folder``, frozen.

    Raises:
        CheckpointError: missing or corrupt.
        ConfigError: its configuration cannot be used.
    """
    description = Path(folder) / "codec.json"
    config = config_from_dict(ConvCodecConfig, read_json(description)["codec"], str(description))
    return load_codec(Path(folder) / "codec.safetensors", config)


class LatentEpisode(NamedTuple):
    """An encoded episode: latents (K, C, h, w) float32, actions (K, ...), rewards, terminated (K,)."""

    latents: Tensor
    actions: Any
    rewards: Tensor
    terminated: Tensor


@torch.no_grad()
def encode_dataset(
    codec: Codec, dataset: EpisodeDataset, path: Path, device: torch.device | str = "cpu"
) -> None:
    """Encode every episode once, to one safetensors file that `load_latents` reads. Actions that are text are left out.

    A codec whose first latent frame is one picture (Wan) begins with frame 0: a latent more than there are chunks.
    Every minute what is done is written beside ``path``, so an interrupted run continues.

    Raises:
        DataError: an episode cannot be read.
        CheckpointError: the file cannot be written.
    """
    waiting = path.with_suffix(".parts")
    tensors: dict[str, Tensor] = {}
    fresh: dict[str, Tensor] = {}
    for file in sorted(waiting.glob("*.safetensors")):
        tensors |= load_tensors(file)
    done, saved = {int(name.partition("/")[0]) for name in tensors}, time.monotonic()
    for index in tqdm(range(dataset.episodes), desc="encode", unit="episode"):
        if index in done:
            continue
        parts = _encoded(codec, dataset.episode(index), dataset.frame_skip, device)
        fresh |= {f"{index:06d}/{name}": tensor for name, tensor in parts.items()}
        if time.monotonic() - saved > SAVE_SECONDS:
            save_tensors(waiting / f"{index:06d}.safetensors", fresh)
            tensors, fresh, saved = tensors | fresh, {}, time.monotonic()
    save_tensors(path, tensors | fresh, {"episodes": str(dataset.episodes)})
    shutil.rmtree(waiting, ignore_errors=True)


def pieces(codec: Codec, frames: np.ndarray, skip: int) -> Iterator[Tensor]:
    """An episode's frames (1 + F K, ...) in pieces (1, n, height, width, 3) of some chunks; frame 0 is left out unless
    it is the codec's first latent frame.
    """
    at = 1 if codec.first_frames == codec.temporal_stride else 0
    while at < len(frames):
        stop = PIECE * skip + (1 if at <= 1 else at)  # the first picture goes with the first chunks
        yield torch.from_numpy(frames[None, at:stop])
        at = stop


def _encoded(codec: Codec, episode: Episode, skip: int, device: torch.device | str) -> dict[str, Tensor]:
    latents, state = [], codec.initial_state(1)
    for frames in pieces(codec, episode.frames, skip):
        piece, state = codec.encode(frames.to(device), state)
        latents.append(piece[0].cpu())
    named = episode.actions if isinstance(episode.actions, dict) else {"": episode.actions}
    actions = {
        "actions" + (f"/{name}" if name else ""): torch.from_numpy(array)
        for name, array in named.items()
        if array.dtype.kind in "fiub"
    }
    return actions | {
        "latents": torch.cat(latents),
        "rewards": torch.from_numpy(episode.rewards),
        "terminated": torch.from_numpy(episode.terminated),
    }


def load_latents(path: Path) -> list[LatentEpisode]:
    """What `encode_dataset` wrote, by episode index.

    Raises:
        CheckpointError: missing or corrupt.
    """
    groups: dict[int, dict[str, Tensor]] = {}
    for name, tensor in load_tensors(path).items():
        number, _, key = name.partition("/")
        groups.setdefault(int(number), {})[key] = tensor
    episodes = []
    for index in sorted(groups):
        part = groups[index]
        actions: Any = part.get("actions")
        if actions is None:
            actions = {k.removeprefix("actions/"): v for k, v in part.items() if k.startswith("actions/")}
        episodes.append(LatentEpisode(part["latents"], actions, part["rewards"], part["terminated"]))
    return episodes
