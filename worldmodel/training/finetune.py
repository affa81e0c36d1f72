"""Fine-tune a world on somebody's data; give actions to one that has none, which changes nothing until it is trained.

The action path is a fresh `ActionEncoder` and a zero-initialised projection in the deep block and the denoiser
(STARFlow-V has none): at step 0 every output is the checkpoint's own. Low-rank adapters (LoRA, arXiv 2106.09685) on
attention and MLP are merged into the weights before they are written. They are parametrisations of the weights, not
wrapped modules (as peft's are), so whatever the flow does with a weight, sharding included, does it with adapters too.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.nn.utils import parametrize

from worldmodel.checkpoint import WorldFiles, half_precision, narrowed, read_world, write_world
from worldmodel.codec.base import Codec
from worldmodel.condition.actions import ActionEncoder, ActionEncoderConfig
from worldmodel.condition.spaces import packed_size, space_to_json
from worldmodel.errors import ConfigError, DataError
from worldmodel.files import (
    config_to_dict,
    different,
    load_tensors,
    read_json,
    remove_leftovers,
    require_at_least,
    save_tensors,
    writable,
    write_json,
)
from worldmodel.flow.attention import Attention
from worldmodel.flow.block import MLP
from worldmodel.flow.flow import Flow
from worldmodel.published import obtain
from worldmodel.training.codec import LatentEpisode, encode_dataset, load_latents, pieces
from worldmodel.training.datasets import converted
from worldmodel.training.episodes import EpisodeDataset, split_indices
from worldmodel.training.export import bank_of_starts, check_out, noted
from worldmodel.training.flow import FlowStage, FlowTraining, Latents, gathered
from worldmodel.training.heads import HeadsTraining, MemoryTraining, train_heads
from worldmodel.training.loop import LoopConfig, Run
from worldmodel.training.parallel import ALONE, Ranks
from worldmodel.training.pictures import Pictures
from worldmodel.training.provenance import environment_of, episodes_of, git_revision, trained_on
from worldmodel.world import WorldModel

FAITHFUL = 30.0
"""dB below which a codec does not show the data well enough to learn from it."""


class Prompts(Protocol):
    """Captions to the condition tokens of a world."""

    def without_start(self, caption: str) -> str:
        """The caption of a window from which the video's first frame is missing."""
        ...

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """(n, L, text_dim), through the world's own template; "" is the unconditional one."""
        ...


@dataclass(frozen=True)
class Finetune:
    """How to fine-tune. lora: rank of the adapters, 0 trains every weight. length: latent frames of a window, at most
    the world's window and the data's longest episode. features: E of an action path that is added. Others as in
    `FlowTraining`; heads: of reward and termination, trained where the data has any.
    """

    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=2_000, lr=3e-4, warmup=50))
    heads: HeadsTraining = field(
        default_factory=lambda: HeadsTraining(
            LoopConfig(steps=1_000, lr=5e-4, warmup=50),
            memory=MemoryTraining(LoopConfig(steps=500, lr=5e-4, warmup=30, weight_decay=0.03, clip=2.0)),
        )
    )
    lora: int = 16
    batch: int = 16
    length: int = 16
    features: int = 64
    bf16: bool = True
    recompute: bool = False
    compiled: bool = True
    threads: int = 2

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be used."""
        require_at_least(0, self, "lora")
        require_at_least(1, self, "batch", "features")
        require_at_least(2, self, "length")


def with_actions(flow: Flow, space: spaces.Space[Any], features: int, harmonics: int = 3) -> nn.ModuleDict:
    """{"flow", "actions"}: the same weights with a new action path for ``space``; an old path is left behind.

    The outputs are those of ``flow`` without an action, whatever the action: the projection begins at zero.
    """
    with torch.device("meta"):
        wider = Flow(replace(flow.config, action_features=features))
    old = {k: v for k, v in flow.state_dict().items() if "proj_action" not in k}
    new = {
        k: torch.zeros(v.shape, device=flow.deep.sos.device)
        for k, v in wider.state_dict().items()
        if k not in old
    }
    wider.load_state_dict(old | new, assign=True)
    encoder = ActionEncoder(ActionEncoderConfig(packed_size(space), features, harmonics))
    return nn.ModuleDict({"flow": wider, "actions": encoder.to(flow.deep.sos.device)})


class LowRank(nn.Module):
    """``W + 2 up down``: a weight (out, in) with an update of low rank beside it, zero at first."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.down = nn.Parameter(torch.randn(rank, inputs, device=weight.device) / math.sqrt(inputs))
        self.up = nn.Parameter(torch.zeros(outputs, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight."""
        return weight + 2.0 * (self.up @ self.down).to(weight.dtype)


def _adapted(parts: nn.ModuleDict) -> list[nn.Module]:
    units = [m for m in parts.modules() if isinstance(m, Attention | MLP)]
    return [m for unit in units for m in unit.children() if isinstance(m, nn.Linear)]


def add_adapters(parts: nn.ModuleDict, rank: int) -> None:
    """LoRA of ``rank`` on every attention and MLP, in place; trained besides: the action path, whole."""
    parts.requires_grad_(False)
    for linear in _adapted(parts):
        parametrize.register_parametrization(linear, "weight", LowRank(linear.get_parameter("weight"), rank))
    for name, weight in parts.named_parameters():
        if name.startswith("actions.") or "proj_action" in name:
            weight.requires_grad_(True)


def merge_adapters(parts: nn.ModuleDict) -> None:
    """Fold the adapters into the weights they stand beside, in place."""
    for linear in _adapted(parts):
        parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)


def parts_of(files: WorldFiles, space: spaces.Space[Any], config: Finetune) -> nn.ModuleDict:
    """What is trained: the world's flow, its action path where ``space`` is the world's own, else a new one; adapters.

    A space without packed actions (Text) leaves the world's conditions as they are.
    """
    torch.manual_seed(config.loop.seed)
    flow, _, actions, _ = files.build("cpu")
    same = actions is not None and space == files.spec.action_space
    if packed_size(space) and not same:
        parts = with_actions(flow, space, config.features)
    else:
        parts = nn.ModuleDict({"flow": flow} | ({"actions": actions} if same and actions is not None else {}))
    if config.lora:
        add_adapters(parts, config.lora)
    else:
        parts.float().requires_grad_(True)  # half precision would lose small updates
    return parts.train()


def finetune(
    world: str | Path,
    source: str,
    run: Path,
    out: Path,
    config: Finetune,
    camera: str | None = None,
    prompts: Prompts | None = None,
    ranks: Ranks = ALONE,
) -> WorldModel | None:
    """Fine-tune ``world`` on the dataset ``source`` (see `worldmodel.training.datasets`) and write the world ``out``.

    ``run`` holds converted episodes, latents and checkpoints: run the same again after a kill, it continues.
    ``prompts`` are needed where the world has some. Returns the world, None on every rank but the first.

    Raises:
        DataError: the data cannot be read, or is too short. ConfigError: ``run`` is of other settings, or ``out`` holds
            anything that ``run`` did not write.
        CheckpointError: ``run`` or ``out`` cannot be written. Interrupted: by a signal, with the checkpoint written.
    """
    if ranks.first:
        obtain(world)  # which may download and convert
    ranks.wait()
    files = read_world(obtain(world))
    torch.set_num_threads(config.threads)
    window = files.spec.flow.window
    if ranks.first and config.length > window:
        print(
            f"warning: length {config.length} is beyond the world's window; training on {window} latent frames",
            file=sys.stderr,
        )
    if ranks.first:
        check_out(out, run)
        remove_leftovers(run)
        writable(out)
        _prepare(files, source, run, config, camera, prompts, ranks.device)
    ranks.wait()
    dataset = _episodes(files, source, run, camera)
    episodes = load_latents(run / "latents.safetensors")
    text = load_tensors(run / "text.safetensors") if files.spec.flow.text_tokens else {}
    space = dataset.action_space
    train = latents_of(episodes, split_indices(len(episodes), "train"), space, text)
    if train.lengths.max() < 2:
        raise DataError(
            f"{source}: no clip to train on has 2 chunks of {dataset.frame_skip} frames, which a window has at least; "
            "give longer clips"
        )
    apart = split_indices(len(episodes), "test")
    held_out = latents_of(episodes, apart, space, text) if apart else None
    parts = parts_of(files, space, config)
    flow = cast(Flow, parts["flow"])
    training = FlowTraining(
        flow.config,
        config.loop,
        config.batch,
        min(config.length, flow.config.window, int(train.lengths.max())),
        bf16=config.bf16,
        compiled=config.compiled,
        recompute=config.recompute,
    )
    quality: dict[str, dict[str, float]] = {}
    base, codec, encoder, _ = files.build("cpu")
    if ranks.first:
        quality["codec"] = {"psnr": _faithfulness(codec.to(ranks.device), dataset, ranks.device)}
    del codec  # its memory is the training's
    if ranks.first and held_out is not None:
        own = encoder if space == files.spec.action_space else None
        quality["bits_per_dim"] = {"before": bits_per_dim(base, own, held_out, training.length)}
    stage = FlowStage(training, train, parts, ranks)
    fit = Run(stage, config.loop, run / "flow", ranks)
    fit.fit("fine-tune")
    if not ranks.first:
        gathered(stage.parts, None)
        return None
    parts = parts_of(files, space, config).eval()
    gathered(stage.parts, parts)
    if config.lora:
        merge_adapters(parts)
    parts.requires_grad_(False)["flow"].to(base.deep.sos.dtype)
    if held_out is not None:
        encoder = cast(ActionEncoder, parts["actions"]) if "actions" in parts else None
        quality["bits_per_dim"]["after"] = bits_per_dim(
            cast(Flow, parts["flow"]), encoder, held_out, training.length
        )
    return noted(
        lambda: _export(files, source, dataset, train, parts, run, out, config, quality),
        out,
        run,
    )


def _episodes(files: WorldFiles, source: str, run: Path, camera: str | None) -> EpisodeDataset:
    spec = files.spec
    space = spec.action_space if spec.actions.packed else None
    return converted(source, run / "episodes", spec.frame_size, spec.codec.frames, space, camera)


def _prepare(
    files: WorldFiles,
    source: str,
    run: Path,
    config: Finetune,
    camera: str | None,
    prompts: Prompts | None,
    device: torch.device,
) -> None:
    """Convert, encode and embed once; what is there already stays, if it is of the same settings."""
    given = {
        "world": files.fingerprint,
        "source": source,
        "camera": camera,
        "settings": config_to_dict(config),
    }
    note = run / "finetune.json"
    if note.exists() and (old := read_json(note)) != given:
        raise ConfigError(
            f"{run} was made otherwise ({', '.join(different(old, given))} differ); restore that, or use another "
            "--run folder"
        )
    dataset = _episodes(files, source, run, camera)
    write_json(note, given)  # once the source is known to be one
    if not (run / "latents.safetensors").is_file():
        _, codec, _, _ = files.build(device)
        encode_dataset(codec, dataset, run / "latents.safetensors", device)
    if not files.spec.flow.text_tokens or (run / "text.safetensors").is_file():
        return
    if prompts is None:
        spec = replace(files.spec, fps=float(dataset.info["fps"]))
        prompts = replace(files, spec=spec).prompts(device, run / "prompts")
    if prompts is None:
        raise ConfigError(
            f"{files.spec.name} has prompts, and no text encoder to embed the captions with was found"
        )
    captions = [str(dataset.episode(i).meta.get("caption", "")) for i in range(dataset.episodes)]
    wanted = [[c, prompts.without_start(c)] for c in captions]
    unique = ["", *sorted({caption for pair in wanted for caption in pair} - {""})]
    index = torch.tensor([[unique.index(caption) for caption in pair] for pair in wanted])
    save_tensors(run / "text.safetensors", {"text": prompts(unique), "prompts": index})


def latents_of(
    episodes: Sequence[LatentEpisode], indices: range, space: spaces.Space[Any], text: dict[str, Tensor]
) -> Latents:
    """Encoded episodes of a split, with their prompts where the world has some."""
    data = Latents.of([episodes[i] for i in indices], space)
    if not text:
        return data
    prompts = []
    for i in indices:
        start, later = text["prompts"][i].tolist()
        prompts.append(torch.tensor([start] + [later] * (len(episodes[i].latents) - 1)))
    return replace(data, text=text["text"].float(), prompts=torch.cat(prompts))


@torch.no_grad()
def bits_per_dim(
    flow: Flow, actions: ActionEncoder | None, data: Latents, length: int, windows: int = 64
) -> float:
    """Mean density of the noised latents of ``windows`` windows, drawn the same each time, in bits per dimension."""
    longest = min(length, int(data.lengths.max()))
    rng, noise = np.random.default_rng(0), torch.Generator().manual_seed(0)
    grid = flow.grid((data.latents.shape[2], data.latents.shape[3]))
    total = []
    for begin in rng.choice(data.places(longest), size=windows):
        at = torch.arange(int(begin), int(begin) + longest)[None]
        x = flow.tokens(data.latents[at])
        x = x + flow.config.noise_std * torch.randn(x.shape, generator=noise)
        features = None if actions is None else actions(data.packed[at], data.shown(at))
        text = None if data.text is None or data.prompts is None else data.text[data.prompts[at[:, 0]]]
        density = flow(x, grid, text, features)
        total.append(-density.log_prob_elements.double().mean() / math.log(2.0))
    return float(torch.stack(total).mean())


@torch.no_grad()
def codec_psnr(codec: Codec, dataset: EpisodeDataset, device: torch.device, episodes: int = 4) -> float:
    """How well the world's codec, on ``device``, reproduces the data, in dB over the last few episodes' frames."""
    errors = []
    for index in range(dataset.episodes)[-episodes:]:
        state = codec.initial_state(1)
        for frames in pieces(codec, dataset.episode(index).frames, dataset.frame_skip):
            latents, state = codec.encode(frames.to(device), state)
            back, state = codec.decode(latents, state)
            errors.append((back.cpu().double() - frames.double()).square().mean((0, 2, 3, 4)))
    return float(10 * torch.log10(255.0**2 / torch.cat(errors).mean().clamp_min(1e-5)))


def _faithfulness(codec: Codec, dataset: EpisodeDataset, device: torch.device) -> float:
    """`codec_psnr`; says so where it is too low, before anything is trained."""
    psnr = codec_psnr(codec, dataset, device)
    if psnr < FAITHFUL:
        print(
            f"warning: the world's codec reproduces this data at {psnr:.1f} dB, below {FAITHFUL:g}; better train a world "
            "of its own (worldmodel train)",
            file=sys.stderr,
        )
    return psnr


def _export(
    files: WorldFiles,
    source: str,
    dataset: EpisodeDataset,
    train: Latents,
    parts: nn.ModuleDict,
    run: Path,
    out: Path,
    config: Finetune,
    quality: dict[str, dict[str, float]],
) -> None:
    _, codec, _, old_heads = files.build("cpu")
    flow, acts = cast(Flow, parts["flow"]), "actions" in parts
    device = flow.deep.sos.device
    codec.to(device)
    encoder = cast(ActionEncoder, parts["actions"]).config if acts else files.spec.actions
    space = space_to_json(dataset.action_space) if acts else files.spec.action_space_json
    same = encoder.packed == files.spec.actions.packed
    half = files.spec.dtype == "bfloat16"  # is stored as it is
    tensors = dict(files.tensors) | {"flow": parts.state_dict() if half else narrowed(parts)}
    heads = files.spec.heads
    if train.rewards.any() or train.terminated.any() or (heads is not None and not same):
        old = old_heads if same else None
        eye = config.heads.eye if old is None else old.config.eye
        pictures = None if eye is None else Pictures.of([dataset], codec, train, device)
        trained, _ = train_heads(config.heads, train, run / "heads", old, pictures, device)
        tensors["heads"], heads = half_precision(trained), trained.config
    spec = replace(
        files.spec,
        name=out.name,
        fps=float(dataset.info["fps"]),
        action_space_json=space,
        flow=flow.config,
        actions=encoder,
        heads=heads,
        bank=codec.first_frames == codec.temporal_stride,  # no action has caused a clip's first picture
        environment=environment_of(dataset),
        provenance={
            "base": files.spec.name,
            "base_fingerprint": files.fingerprint,
            "data": source,
            "camera": dataset.collected.get("camera"),
            "trained_on": trained_on(files.spec) + episodes_of([dataset]),
            "settings": config_to_dict(config),
            "git_revision": git_revision(),
            "torch": torch.__version__,
            "training_episodes": len(train.lengths),
        },
        quality=quality,
    )
    starts = bank_of_starts(dataset, 32, 3, config.loop.seed) if spec.bank else {}
    if not acts:
        starts = {k: v for k, v in starts.items() if k == "frames"}
    write_world(out, spec, tensors, starts, card(spec.name, files.spec.name, source, spec.quality))
    if spec.text is not None and (files.path / spec.text.encoder).is_dir():
        shutil.copytree(files.path / spec.text.encoder, out / spec.text.encoder, dirs_exist_ok=True)


def card(name: str, base: str, source: str, quality: dict[str, Any]) -> str:
    """README.md of a fine-tuned world."""
    bits = quality.get("bits_per_dim")
    measured = f", held-out {bits['before']:.3f} -> {bits['after']:.3f} bits/dim" if bits else ""
    return f"""# {name}

`{base}`, a causal normalizing-flow world model (STARFlow-V, arXiv 2511.20462), fine-tuned on `{source}` by
`worldmodel finetune`; every setting is in `world.json` under provenance.

* The codec is that of `{base}`: {quality["codec"]["psnr"]:.1f} dB on the last episodes of this data{measured}.
* Likelihoods are of the noised latent, in nats per chunk; not of pixels.
"""
