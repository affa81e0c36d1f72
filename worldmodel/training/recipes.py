"""Recipes: everything from collecting to export of a world, as one configuration. The shipped worlds come from these;
for episodes of any other environment `general` makes one.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from worldmodel.codec.conv import ConvCodecConfig
from worldmodel.errors import ConfigError, DataError
from worldmodel.files import config_from_dict, read_json
from worldmodel.flow.flow import FlowConfig
from worldmodel.heads import EyeConfig
from worldmodel.sampling import Sampling
from worldmodel.training.codec import CodecTraining, lunarlander_codec, pendulum_codec
from worldmodel.training.collect import CollectConfig, restless_pendulum
from worldmodel.training.collect import lunarlander as lunarlander_collection
from worldmodel.training.collect import pendulum as pendulum_collection
from worldmodel.training.episodes import EpisodeDataset
from worldmodel.training.flow import FlowTraining
from worldmodel.training.heads import HeadsTraining
from worldmodel.training.loop import LoopConfig

Stage = TypeVar("Stage", CodecTraining, FlowTraining)


@dataclass(frozen=True)
class Round:
    """A further round of training: of the codec, where given, then of the flow; each begins with the weights before it.

    collect: episodes collected for this round. The flow learns from all that were collected so far, a codec from the
    newest, and the world is evaluated on fresh ones like the newest.
    """

    flow: FlowTraining
    codec: CodecTraining | None = None
    collect: CollectConfig | None = None


@dataclass(frozen=True)
class Recipe:
    """How a world is made. further: rounds of training after the first. sampling: its default sampler. starts: clips in
    its bank, of ``start_chunks`` chunks each.
    """

    name: str
    collect: CollectConfig
    codec: CodecTraining
    flow: FlowTraining
    further: tuple[Round, ...] = ()
    heads: HeadsTraining = field(default_factory=HeadsTraining)
    sampling: Sampling = Sampling()
    starts: int = 32
    start_chunks: int = 3

    def __post_init__(self) -> None:
        """Raises ConfigError for rounds that cannot begin with the weights before them or whose episodes do not fit."""
        seeds = {self.collect.seed}
        for number, each in enumerate(self.further, 1):
            if each.codec is not None and each.codec.model != self.codec.model:
                raise ConfigError(f"further round {number}: codec.model differs from the recipe's")
            if (each.flow.model, each.flow.harmonics) != (self.flow.model, self.flow.harmonics):
                raise ConfigError(f"further round {number}: flow.model or harmonics differ from the recipe's")
            if each.collect is None:
                continue
            for name in ("env", "env_kwargs", "frame_skip", "frame_size"):
                if getattr(each.collect, name) != getattr(self.collect, name):
                    raise ConfigError(f"further round {number}: collect.{name} differs from the recipe's")
            if each.collect.seed in seeds:
                raise ConfigError(
                    f"further round {number}: collect.seed {each.collect.seed} is taken, give another"
                )
            seeds.add(each.collect.seed)

    @property
    def rounds(self) -> tuple[Round, ...]:
        """All rounds of training in their order."""
        return Round(self.flow, self.codec, self.collect), *self.further

    def collections(self, data: Path) -> dict[Path, CollectConfig]:
        """What to collect, by folder: the first in ``data``, that of a further round in its `round_folder` there."""
        rounds = enumerate(self.rounds)
        return {
            round_folder(data, number): each.collect for number, each in rounds if each.collect is not None
        }


def round_folder(root: Path, number: int) -> Path:
    """Where round ``number`` of a recipe lies: ``root`` itself for the first (0), then ``root``/further1 and so on."""
    return root / f"further{number}" if number else root


def small_flow(latent_channels: int, patch_size: int = 2) -> FlowConfig:
    """A flow of 3.3 M parameters for latent grids of about 4 x 4; tokens are 2 x 2 cells, so a frame has 4."""
    return FlowConfig(
        in_channels=latent_channels,
        patch_size=patch_size,
        channels=96,
        top_channels=192,
        layers_per_block=(2, 2, 5),
        head_dim=32,
        position_scale=4.0,
        action_features=64,
        noise_std=0.05,
        window=16,
        context=8,
        denoiser_channels=128,
        denoiser_layers=3,
        denoiser_window=1,
        denoiser_look_ahead=1,
    )


def pendulum() -> Recipe:
    """Pendulum-v1 at 64 x 64 without its torque arrow; five and three quarter hours on 2 CPU cores.

    Two thirds of the first episodes soon stand still at the top: in the further rounds those that move are drawn more
    often, and the last collects episodes that seldom stand still. The second codec tells the angle through the flow's noise
    to 0.06 degrees instead of 0.3: the more noise it is trained with, and the less smoothness is asked of it, the farther
    apart are the latents of states that differ little.
    """
    codec = pendulum_codec()
    flow = FlowTraining(
        small_flow(codec.model.latent_channels),
        LoopConfig(steps=30_000, minutes=56.0, lr=1.5e-3, warmup=300),
        batch=32,
        noise_start=0.1,
    )
    moving = replace(
        flow,
        loop=LoopConfig(steps=30_000, minutes=70.0, lr=1.2e-3, warmup=100, seed=1, optimizer="muon"),
        noise_start=None,
        motion=0.5,
    )
    finer = replace(
        codec,
        loop=LoopConfig(steps=30_000, minutes=34.0, lr=2e-3, warmup=100),
        noise=0.3,
        smoothness=0.03,
        motion=0.5,
    )
    again = replace(moving, loop=replace(moving.loop, minutes=72.0), noise_start=0.1)
    last = replace(moving, loop=replace(moving.loop, minutes=92.0, seed=2))
    return Recipe(
        name="pendulum",
        collect=pendulum_collection(),
        codec=codec,
        flow=flow,
        further=(Round(moving), Round(again, finer), Round(last, collect=restless_pendulum())),
        sampling=Sampling(temperature=0.1),
    )


def lunarlander() -> Recipe:
    """LunarLander-v3 at 64 x 64; about three and a half hours on 2 CPU cores.

    The lander is 3 pixels tall: what the first codec's pictures keep of its tilt is lost in noise; the second one's keep
    it. The heads read the decoded picture, since what reads flat latents, the codec's linear map too, learns the terrain of
    the training episodes by heart; and they remember, since no chunk alone tells how fast the lander turns.
    """
    codec = lunarlander_codec()
    flow = FlowTraining(
        replace(small_flow(codec.model.latent_channels), top_channels=224),
        LoopConfig(steps=30_000, minutes=60.0, lr=1.2e-3, warmup=300),
        batch=32,
        noise_start=0.15,
    )
    finer = replace(
        codec,
        loop=LoopConfig(steps=30_000, minutes=38.0, lr=2e-3, warmup=100),
        noise=0.3,
        smoothness=0.03,
        motion=0.5,
        observed=1.0,
    )
    again = replace(
        flow,
        loop=LoopConfig(steps=30_000, minutes=60.0, lr=1.2e-3, warmup=100, seed=1, optimizer="muon"),
        noise_start=0.1,
        motion=0.5,
    )
    return Recipe(
        name="lunarlander",
        collect=lunarlander_collection(),
        codec=codec,
        flow=flow,
        further=(Round(again, finer),),
        # every episode has its own terrain, by which heads would know it
        heads=HeadsTraining(
            LoopConfig(steps=3_500, lr=2e-3, warmup=50, weight_decay=0.02),
            batch=128,
            noise=0.03,
            discount=0.98,
            eye=EyeConfig(memory=160),
            swap=0.7,
            observed=0.5,
        ),
        sampling=Sampling(temperature=0.25),
    )


def general(folder: Path) -> Recipe:
    """A recipe for episodes of any environment, by their size and length; an hour and a half on 2 CPU cores.

    A flow knows windows as long as it learned them, so a quarter of the episodes may be shorter than those, and no more.

    Raises:
        DataError: no collected episodes, or episodes of which it is not told how they were collected.
        ConfigError: pictures whose size no codec has.
    """
    dataset = EpisodeDataset.open(folder)
    if "env" not in dataset.collected:
        raise DataError(
            f"{folder}/dataset.json does not tell the environment; give a recipe (--print-recipe)"
        )
    collected = config_from_dict(
        CollectConfig, dataset.collected | {"episodes": dataset.episodes}, f"{folder}/dataset.json"
    )
    window = int(np.clip(np.quantile(dataset.lengths()[dataset.indices("train")], 0.25), 2, 16))
    codec = CodecTraining(
        ConvCodecConfig(*dataset.frame_size, frames=dataset.frame_skip, latent_channels=16),
        LoopConfig(steps=30_000, minutes=25.0, lr=2e-3, warmup=100),
        smoothness=0.3,
        moving=1.0,
        motion=0.5,
    )
    channels, *grid = codec.model.latent_shape
    model = replace(
        small_flow(channels, patch_size=1 if any(n % 2 for n in grid) else 2),
        window=window,
        context=window // 2,
    )
    flow = FlowTraining(
        model,
        LoopConfig(steps=30_000, minutes=30.0, lr=1.5e-3, warmup=300),
        batch=32,
        length=window,
        noise_start=0.1,
        motion=0.5,
    )
    again = replace(
        flow,
        loop=LoopConfig(steps=30_000, minutes=35.0, lr=1.2e-3, warmup=100, seed=1, optimizer="muon"),
        noise_start=None,
    )
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(folder).resolve().name)
    return Recipe(name, collected, codec, flow, (Round(again),), sampling=Sampling(temperature=0.25))


def within(recipe: Recipe, minutes: float) -> Recipe:
    """The recipe with its stages that end by the clock shortened or lengthened, to ``minutes`` in all.

    Raises:
        ConfigError: not above 0, or a recipe of which no stage ends by the clock.
    """
    if not 0 < minutes < math.inf:
        raise ConfigError(f"minutes is {minutes:g}, expected a number above 0")
    stages = [stage for each in recipe.rounds for stage in (each.codec, each.flow) if stage is not None]
    whole = sum(stage.loop.minutes or 0.0 for stage in stages)
    if not whole:
        raise ConfigError("no stage of this recipe ends by the clock; set loop.minutes in it")

    def scaled(stage: Stage) -> Stage:
        share = stage.loop.minutes
        loop = replace(stage.loop, minutes=None if share is None else share * minutes / whole)
        return replace(stage, loop=loop)

    further = tuple(
        replace(r, flow=scaled(r.flow), codec=None if r.codec is None else scaled(r.codec))
        for r in recipe.further
    )
    return replace(recipe, codec=scaled(recipe.codec), flow=scaled(recipe.flow), further=further)


RECIPES: dict[str, Callable[[], Recipe]] = {"pendulum": pendulum, "lunarlander": lunarlander}


def load_recipe(name: str) -> Recipe:
    """A recipe by name, from a JSON file (``worldmodel train --print-recipe pendulum`` shows one), or for a folder of
    collected episodes, see `general`.

    Raises:
        ConfigError: neither, or unknown keys in the file. DataError: a folder that holds no such episodes.
    """
    if name in RECIPES:
        return RECIPES[name]()
    if Path(name).is_file():
        return config_from_dict(Recipe, read_json(Path(name)), name)
    if Path(name).is_dir():
        return general(Path(name))
    if re.search(r"-v\d+$", name):  # the id of an environment
        folder = shlex.quote(str(Path("data") / name.replace("/", "-")))
        raise ConfigError(f"to learn {name}, run: worldmodel collect {name}, then: worldmodel train {folder}")
    raise ConfigError(
        f"no recipe {name!r}; give a folder of collected episodes, a JSON file or one of: {', '.join(RECIPES)}"
    )
