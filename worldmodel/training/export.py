"""Put trained parts together into a world directory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from worldmodel.checkpoint import WorldSpec, half_precision, narrowed, read_world, write_world
from worldmodel.condition.actions import ActionEncoderConfig
from worldmodel.condition.spaces import packed_size, space_to_json
from worldmodel.errors import ConfigError, DataError, WorldModelError
from worldmodel.files import config_to_dict, different, read_json, remove_leftovers, writable, write_json
from worldmodel.flow.flow import Flow
from worldmodel.heads import Heads
from worldmodel.training.codec import encode_dataset, load_latents, load_trained_codec, train_codec
from worldmodel.training.collect import CollectConfig
from worldmodel.training.episodes import EpisodeDataset, split_indices
from worldmodel.training.flow import Latents, train_flow
from worldmodel.training.heads import train_heads
from worldmodel.training.loop import CADENCE
from worldmodel.training.parallel import ALONE, Ranks
from worldmodel.training.pictures import Pictures
from worldmodel.training.provenance import environment_of, episodes_of, git_revision
from worldmodel.training.recipes import Recipe, Round, round_folder
from worldmodel.world import WorldModel

STAGES = ("codec", "flow", "heads")


@dataclass(frozen=True)
class _Planned:
    """A round of a recipe with its folder, its codec's, and all episodes collected so far, the newest last."""

    round: Round
    folder: Path
    codec: Path
    datasets: tuple[EpisodeDataset, ...]

    @property
    def encoded(self) -> dict[Path, EpisodeDataset]:
        """The datasets by the files of their latents, one beside the codec for each."""
        return {
            self.codec / f"latents{number or ''}.safetensors": d for number, d in enumerate(self.datasets)
        }


def train_world(
    recipe: Recipe, data: Path, run: Path, out: Path, until: str = "heads", ranks: Ranks = ALONE
) -> WorldModel | None:
    """Train codec, flow and heads in that order, up to ``until``, and export; what is finished is not trained again.

    A round lies in its `round_folder` of ``run``, as codec/ and flow/, and its episodes in that of ``data``.
    Several ranks train the flow together; the first does the rest alone.

    Returns the world, or None where ``until`` ends before the heads, and on every rank but the first.

    Raises:
        ConfigError: ``until`` is no stage, the data is of another environment than the recipe, ``run`` was made from
            another recipe or other data, or ``out`` holds anything that ``run`` did not write.
        CheckpointError: ``run`` or ``out`` cannot be written.
        DataError: the dataset does not fit the recipe. Interrupted: by a signal.
    """
    if until not in STAGES:
        raise ConfigError(f"no stage {until!r}; choose from {', '.join(STAGES)}")
    plan = _plan(recipe, data, run)
    if ranks.first:
        if until == "heads":
            check_out(out, run)
        remove_leftovers(run)
        _check_run(recipe, plan, run)
        if until == "heads":
            writable(out)
        _train_codecs(plan, ranks.device)
        for path, dataset in [item for p in plan for item in p.encoded.items()] if until != "codec" else ():
            if not path.is_file():
                codec = load_trained_codec(path.parent).to(ranks.device)
                encode_dataset(codec, dataset, path, ranks.device)
    ranks.wait()
    if until == "codec":
        return None
    before, steps = None, 0
    for planned in plan:
        train = []
        for path in planned.encoded:
            episodes = load_latents(path)
            train += [episodes[i] for i in split_indices(len(episodes), "train")]
        latents = Latents.of(train, planned.datasets[-1].action_space)
        parts, made = train_flow(planned.round.flow, latents, planned.folder / "flow", ranks, before)
        before, steps = parts.state_dict(), steps + made.step
    if until == "flow" or not ranks.first:
        return None
    pictures = None
    if recipe.heads.eye is not None:
        codec = load_trained_codec(planned.codec).to(ranks.device)
        pictures = Pictures.of(planned.datasets, codec, latents, ranks.device)
    heads, _ = train_heads(recipe.heads, latents, run / "heads", None, pictures, ranks.device)
    return noted(
        lambda: export_world(recipe, planned.datasets, len(train), planned.codec, out, parts, heads, steps),
        out,
        run,
    )


WORLDS = "worlds.json"
"""In a run's folder: fingerprints of the worlds it wrote, and the folder where it is writing one."""


def check_out(out: Path, run: Path) -> None:
    """Refuse a folder for a world unless it is free or holds what ``run`` wrote, as `noted` has it.

    Raises:
        ConfigError: another world or other files in it, the run's own among them.
    """
    place, held = out.resolve(), sorted(p.name for p in out.iterdir()) if out.is_dir() else []
    if run.resolve().is_relative_to(place):
        raise ConfigError(f"{out} is where the run lies ({run}); choose another --out or --run")
    note = read_json(run / WORLDS) if (run / WORLDS).is_file() else {}
    if not held or note.get("writing") == str(place):
        return
    if "world.json" not in held:
        raise ConfigError(f"{out} holds other files ({', '.join(held[:3])}); choose another --out")
    try:
        own = read_world(out).fingerprint in note.get("written", ())
    except WorldModelError:  # damaged, or of another version
        own = False
    if not own:
        raise ConfigError(f"{out} holds another world; choose another --out")


def noted(write: Callable[[], None], out: Path, run: Path) -> WorldModel:
    """Let ``write`` fill ``out``, note in ``run`` that the world there is its own, and load it.

    Raises:
        ConfigError: as `check_out`.
    """
    check_out(out, run)
    note = read_json(run / WORLDS) if (run / WORLDS).is_file() else {}
    write_json(run / WORLDS, note | {"writing": str(out.resolve())})
    write()
    world = WorldModel.load(out)
    written = sorted({*note.get("written", ()), world.fingerprint})
    write_json(run / WORLDS, {"writing": None, "written": written})
    return world


def _plan(recipe: Recipe, data: Path, run: Path) -> list[_Planned]:
    plan: list[_Planned] = []
    codec, datasets, longest = run / "codec", list[EpisodeDataset](), 0
    for number, each in enumerate(recipe.rounds):
        folder = round_folder(run, number)
        codec = folder / "codec" if each.codec is not None else codec
        if each.collect is not None:
            dataset = EpisodeDataset.open(round_folder(data, number))
            _check_environment(dataset, each.collect)
            datasets.append(dataset)
            longest = max(longest, *dataset.lengths()[dataset.indices("train")])
        if each.codec is not None:
            datasets[-1].indices("test")  # by which it is measured
        plan.append(_Planned(each, folder, codec, tuple(datasets)))
        if longest < each.flow.length:
            raise DataError(
                f"{data}: no episode to train on has the {each.flow.length} chunks of flow.length; lower it in the "
                "recipe, or collect longer episodes"
            )
    return plan


def _check_environment(dataset: EpisodeDataset, collect: CollectConfig) -> None:
    """Raises ConfigError for episodes of another environment than the recipe's, as far as they tell theirs."""
    recipe, told = config_to_dict(collect), dataset.collected
    for name in ("env", "env_kwargs", "frame_skip"):
        if name in told and told[name] != recipe[name]:
            raise ConfigError(
                f"{dataset.folder} was collected with {name} {told[name]}, the recipe's is {recipe[name]}; give other "
                "--data, or another recipe"
            )


def _check_run(recipe: Recipe, plan: list[_Planned], run: Path) -> None:
    """Refuse a run of which anything began with other settings or data, and note in ``run``/train.json what this one is.

    Raises:
        ConfigError: such a run.
    """
    note, now = run / "train.json", _made_from(recipe, plan, run)
    old = read_json(note) if note.is_file() else {}
    changed = [
        f"{name}: {', '.join(different(old[name], made))}"
        for name, made in now.items()
        if name in old and old[name] != made and (run / name).exists()
    ]
    if changed:
        raise ConfigError(
            f"{run} was made otherwise ({'; '.join(changed)} differ); restore that, or use another --run folder"
        )
    write_json(note, old | now)


def _made_from(recipe: Recipe, plan: list[_Planned], run: Path) -> dict[str, Any]:
    """By the name in ``run`` of each stage, and of each file of latents, what it is made from."""
    made: dict[str, Any] = {}
    for planned in plan:
        data = [{"collect": d.collected, "episodes": d.episodes} for d in planned.datasets]
        codec = str(planned.codec.relative_to(run))
        if planned.round.codec is not None:
            made[codec] = {"settings": _lasting(config_to_dict(planned.round.codec)), "data": data[-1:]}
        for path, each in zip(planned.encoded, data, strict=True):
            made[str(path.relative_to(run))] = {"data": [each]}
        flow = {"settings": _lasting(config_to_dict(planned.round.flow)), "data": data, "codec": codec}
        made[str((planned.folder / "flow").relative_to(run))] = flow
    return made | {
        "heads": {"settings": _lasting(config_to_dict(recipe.heads)), "data": data, "codec": codec}
    }


def _lasting(settings: Any) -> Any:
    """Settings without those that change how fast a training runs and not what comes of it."""
    if not isinstance(settings, dict):
        return settings
    return {
        k: _lasting(v) for k, v in settings.items() if k not in (*CADENCE, "threads", "compiled", "recompute")
    }


def _train_codecs(plan: list[_Planned], device: torch.device) -> None:
    """Train each round's codec on the newest episodes, from the weights of the one before."""
    before = None
    for planned in plan:
        if planned.round.codec is not None:
            if not (planned.codec / "codec.json").is_file():
                train_codec(planned.round.codec, planned.datasets[-1].folder, planned.codec, before, device)
            before = load_trained_codec(planned.codec)


def export_world(
    recipe: Recipe,
    datasets: Sequence[EpisodeDataset],
    episodes: int,
    codec_folder: Path,
    out: Path,
    parts: nn.ModuleDict,
    heads: Heads,
    steps: int,
) -> None:
    """Write the world directory: float16 weights, a bank of starts from validation episodes, and the model card.

    datasets: all that it was trained on, the newest last; episodes: how many of theirs.
    """
    dataset = datasets[-1]
    codec = load_trained_codec(codec_folder)
    report = read_json(codec_folder / "codec.json")
    flow = parts["flow"]
    assert isinstance(flow, Flow)
    packed = packed_size(dataset.action_space)
    spec = WorldSpec(
        name=recipe.name,
        frame_size=dataset.frame_size,
        fps=float(dataset.info["fps"]),
        action_space_json=space_to_json(dataset.action_space),
        flow=flow.config,
        codec=codec.config,
        actions=ActionEncoderConfig(packed, flow.config.action_features, recipe.flow.harmonics),
        heads=heads.config,
        sampling=recipe.sampling,
        environment=environment_of(dataset),
        provenance={
            "recipe": config_to_dict(recipe),
            "git_revision": git_revision(),
            "torch": torch.__version__,
            "codec_steps": report["steps"],
            "flow_steps": steps,
            "training_episodes": episodes,
            "trained_on": episodes_of(datasets),
        },
        quality={"codec": report["test"]},
    )
    starts = bank_of_starts(dataset, recipe.starts, recipe.start_chunks, recipe.collect.seed)
    tensors = {"flow": narrowed(parts), "codec": half_precision(codec), "heads": half_precision(heads)}
    write_world(out, spec, tensors, starts, model_card(spec))


def bank_of_starts(dataset: EpisodeDataset, count: int, chunks: int, seed: int) -> dict[str, np.ndarray]:
    """Clips (S, T, F, height, width, 3) and actions (S, T, ...) from anywhere in validation episodes.

    ``count`` of at most ``chunks`` chunks; of training episodes where there are too few for a validation split.
    """
    split = dataset.split("validation" if split_indices(dataset.episodes, "validation") else "train")
    length = min(chunks, int(split.lengths.max()))
    windows = split.sample_windows(count, length, np.random.default_rng(seed))
    if isinstance(windows.actions, dict):
        packed = {f"actions/{k}": v for k, v in windows.actions.items()}
    else:
        packed = {"actions": windows.actions}
    return {"frames": windows.frames, **packed}


def model_card(spec: WorldSpec) -> str:
    """README.md of a world directory."""
    quality, heads, told = spec.quality["codec"], spec.heads, ""
    if heads is not None and heads.observed:
        numbers = f"{heads.observed} numbers"
        told = f"* Its heads learned from the simulator's observation ({numbers}) too, and tell it now by pixels alone.\n"
    return f"""# {spec.name}

A causal normalizing-flow world model (STARFlow-V, arXiv 2511.20462) of `{spec.environment.get("env")}`, trained on
{spec.provenance["training_episodes"]} episodes from pixels at {spec.frame_size[0]} x {spec.frame_size[1]}, actions held for
{spec.codec.frames} frames.

    import worldmodel
    world = worldmodel.WorldModel.load("DIR")  # this directory

* Made by `worldmodel train`; the whole recipe and what it was trained on are in `world.json` under provenance.
* Codec on held-out chunks: {quality["psnr"]:.1f} dB. All other figures: `worldmodel evaluate DIR`.
* Likelihoods are of the noised latent (noise {spec.flow.noise_std}), in nats per chunk; not of pixels.
* Matrices of flow and codec hold bfloat16 numbers, as most of training multiplied by them.
{told}* Limits: it knows one environment, seen from one camera, with the actions and speeds of its training episodes.
"""
