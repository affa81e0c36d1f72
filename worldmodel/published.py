"""Published STARFlow and STARFlow-V weights: found, downloaded where allowed, converted once to a world directory.

    apple/starflow-v            by name: from the cache, else from the Hugging Face Hub (HF_HUB_OFFLINE is respected)
    apple/starflow              the model of pictures (3B), likewise
    FOLDER                      with the published .pth, the public .yaml (known for known files), and vae/

A converted world has its flow in bfloat16 shards and the codec's tensors beside them; loading maps the files and puts
each weight straight onto the device.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import Tensor
from tqdm import tqdm

from worldmodel.checkpoint import WorldSpec, check_fit, empty_modules, find_world, read_spec
from worldmodel.codec.kl import KLCodecConfig, present_names
from worldmodel.codec.wan import WanCodecConfig
from worldmodel.condition.actions import ActionEncoderConfig
from worldmodel.errors import CheckpointError
from worldmodel.files import (
    config_to_dict,
    read_json,
    read_pth,
    read_tensors,
    save_shards,
    write_json,
    write_text,
)
from worldmodel.flow.flow import Flow
from worldmodel.flow.published import (
    CODECS,
    PublishedModel,
    map_published,
    published_model,
    read_published_yaml,
)
from worldmodel.sampling import Sampling

VAE_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
LICENCE = (
    "The weights of STARFlow and STARFlow-V are an Apple Machine Learning Research Model, licensed for non-commercial "
    "research only: https://huggingface.co/apple/starflow (LICENSE_MODEL). The Wan2.2 codec and flan-t5-xl are under "
    "Apache 2.0, Stability AI's sd-vae-ft-ema is under MIT."
)


@dataclass(frozen=True)
class Release:
    """A published checkpoint: the Hub repository and file of its weights, and its public configuration."""

    repo: str
    file: str
    arguments: Mapping[str, Any]


RELEASES = {
    "apple/starflow-v": Release(
        "apple/starflow",
        "starflow-v_7B_t2v_caus_480p_v3.pth",
        {
            "img_size": 640,
            "vid_size": "81:16",
            "txt_size": 256,
            "channel_size": 48,
            "patch_size": 1,
            "channels": 3072,
            "top_block_channels": 4096,
            "blocks": 6,
            "layers_per_block": "2 2 2 2 2 24",
            "noise_std": 0.5,
            "rope": 1,
            "sos": 1,
            "seq_order": "L2R",
            "pt_seq_len": 32,
            "use_softplus": 1,
            "cond_top_only": 1,
            "use_final_norm": 1,
            "learnable_self_denoiser": 1,
            "conditional_denoiser": 1,
            "denoiser_window": 10,
            "temporal_causal": 2,
            "shallow_block_local": 1,
            "soft_clip": 4,
            "fps_cond": 1,
            "cond_noise_level": 1,
            "mix_aspect": 1,
            "vae": "Wan-AI/Wan2.2-TI2V-5B-Diffusers:0.6",
            "text": "google/flan-t5-xl",
        },
    ),
    "apple/starflow": Release(
        "apple/starflow",
        "starflow_3B_t2i_256x256.pth",
        {
            "img_size": 256,
            "txt_size": 128,
            "channel_size": 4,
            "patch_size": 1,
            "channels": 3072,
            "blocks": 6,
            "layers_per_block": "2 2 2 2 2 24",
            "noise_std": 0.3,
            "rope": 1,
            "sos": 1,
            "seq_order": "L2R",
            "use_softplus": 1,
            "cond_top_only": 1,
            "use_final_norm": 1,
            "soft_clip": 4,
            "vae": "stabilityai/sd-vae-ft-ema",
            "text": "google/flan-t5-xl",
        },
    ),
}


def cache_folder() -> Path:
    """What is made once is kept here: ``$WORLDMODEL_CACHE``, ``$XDG_CACHE_HOME/worldmodel`` or ``~/.cache/worldmodel``."""
    if own := os.environ.get("WORLDMODEL_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "worldmodel"


def obtain(name: str | Path) -> Path:
    """The world directory of a name: one that ships, a directory, or a published model, converted first if need be.

    Raises:
        CheckpointError: no such world, or its weights are missing, unreachable, damaged or do not fit.
    """
    folder = Path(name)
    if str(name) in RELEASES and not folder.is_dir():
        world = _converted(name)
        return world if (world / "world.json").is_file() else _from_hub(str(name), world)
    if folder.is_dir() and not (folder / "world.json").is_file() and any(folder.glob("*.pth")):
        return _from_folder(folder)
    return find_world(name)


def _converted(name: str | Path) -> Path:
    return cache_folder() / str(name).replace("/", "--")


def planned_spec(name: str | Path) -> WorldSpec:
    """The specification of a world, also of a published one that is not on this machine (its codec's means are not known
    then, and are zero).

    Raises:
        CheckpointError: no such world.
    """
    if str(name) not in RELEASES or Path(name).is_dir() or (_converted(name) / "world.json").is_file():
        return read_spec(obtain(name))
    model = published_model(RELEASES[str(name)].arguments, str(name))
    return world_spec(model, _codec(model), str(name))


def _from_hub(name: str, world: Path) -> Path:
    release = RELEASES[name]
    model = published_model(release.arguments, name)
    weights = download(name, release.repo, release.file, _sizes(flow_bytes(model)))
    return convert(weights, model, _download_codec(name, model), world, name)


def _from_folder(folder: Path) -> Path:
    """Convert ``folder``'s checkpoint, into the cache under its name, size and time of writing."""
    weights = _only(folder, "*.pth")
    known = next((n for n, r in RELEASES.items() if r.file == weights.name), None)
    if any(folder.glob("*.yaml")):
        model = read_published_yaml(_only(folder, "*.yaml"))
    elif known is not None:
        model = published_model(RELEASES[known].arguments, known)
    else:
        raise CheckpointError(
            f"{weights}: no published file of that name is known; put its public .yaml configuration beside it"
        )
    status = weights.stat()
    world = cache_folder() / f"{weights.stem}-{status.st_size:x}-{status.st_mtime_ns:x}"
    if (world / "world.json").is_file():
        return world
    vae = folder / "vae"
    if not vae.is_dir():
        vae = _download_codec(folder.name, model, folder)
    return convert(weights, model, vae, world, known or weights.stem)


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise CheckpointError(
            f"{folder} has {len(found)} {pattern} files, expected one; keep the one that is meant"
        )
    return found[0]


def _download_codec(name: str, model: PublishedModel, folder: Path | None = None) -> Path:
    """The folder of the codec's files."""
    codec = CODECS[model.vae]
    found = [
        download(name, model.vae, f"{codec.folder}{file}", codec.size, folder, f"vae/{file}")
        for file in VAE_FILES
    ]
    return found[0].parent


def flow_bytes(model: PublishedModel) -> int:
    """Bytes of a model's flow in bfloat16."""
    with torch.device("meta"):
        return 2 * sum(p.numel() for p in Flow(model.flow).parameters())


def _sizes(half: int) -> str:
    return f"{half / 1e9:.1f} GB in bfloat16, twice that in float32"


def download(name: str, repo: str, file: str, size: str, folder: Path | None = None, place: str = "") -> Path:
    """A file of a Hub repository, from the Hub's own cache where it is there. ``place``: what it is called in a folder
    that is brought, where that is another name.

    Raises:
        CheckpointError: not there and not to be had; says what, how large, from where, and where to put it.
    """
    there = folder or "FOLDER"
    advice = f"put it at {there}/{place or file} (vae/ of the codec beside it) and load {there}"
    wanted = f"{name} needs {file} ({size}) of https://huggingface.co/{repo}"
    try:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError as error:
        raise CheckpointError(
            f"{wanted}: {advice}, or pip install 'worldmodel[hub]' to download it"
        ) from error
    cause: Exception | None = None
    reason = _unreachable()
    if reason is not None:
        cached = try_to_load_from_cache(repo, file)
        if isinstance(cached, str):
            return Path(cached)
    else:
        try:
            return Path(hf_hub_download(repo, file))
        except (OSError, EntryNotFoundError, ValueError) as error:
            cause, reason = error, f"{' '.join(str(error).split()):.120}"
    raise CheckpointError(
        f"{wanted}, which is not in the Hub's cache and cannot be fetched ({reason}): {advice}"
    ) from cause


def _unreachable() -> str | None:
    """Why the Hub cannot be asked, if so, at once: its own client goes on trying for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    hub = urlsplit(constants.ENDPOINT)
    if "https" in getproxies():
        return None
    try:
        socket.create_connection((hub.hostname or "", hub.port or 443), 10.0).close()
    except OSError as error:
        return f"{hub.hostname} is not reached: {error}"
    return None


def show_licence() -> None:
    """Print the weights' licence to standard error, once for each cache."""
    seen = cache_folder() / "licence-shown"
    if not seen.is_file():
        print(LICENCE, file=sys.stderr)
        write_text(seen, LICENCE + "\n")


def _codec(
    model: PublishedModel, description: Mapping[str, Any] | None = None
) -> WanCodecConfig | KLCodecConfig:
    """A model's codec, as its config.json describes it; without that, as it is published (Wan's means are zero then)."""
    if CODECS[model.vae].kind == "kl":
        if description is None:
            return KLCodecConfig(*model.frame_size)
        return KLCodecConfig.from_diffusers(description, model.frame_size)
    if description is None:
        return WanCodecConfig((0.0,) * 48, (1.0,) * 48, *model.frame_size, later_scale=model.later_scale)
    read = WanCodecConfig.from_diffusers(description, model.frame_size)
    return replace(read, later_scale=model.later_scale)


def world_spec(model: PublishedModel, codec: WanCodecConfig | KLCodecConfig, name: str) -> WorldSpec:
    """The ``world.json`` of a published model: prompts as actions, no heads, no bank, bfloat16."""
    return WorldSpec(
        name=name,
        frame_size=model.frame_size,
        fps=model.fps,
        action_space_json={"kind": "Text", "min_length": 0, "max_length": 2000},
        flow=model.flow,
        codec=codec,
        actions=ActionEncoderConfig(0),
        heads=None,
        text=model.text,
        dtype="bfloat16",
        bank=False,
        sampling=Sampling(guidance=model.guidance, tolerance=1e-3),
        provenance={"published": name, "licence": LICENCE},
    )


def convert(weights: Path, model: PublishedModel, vae: Path, world: Path, name: str) -> Path:
    """Convert published weights to a world directory at ``world``, which appears only when it is complete.

    Raises:
        CheckpointError: damaged files, keys or shapes that do not fit, or too little space on the disk.
    """
    spec = world_spec(model, _codec(model, read_json(vae / VAE_FILES[0])), name)
    modules = empty_modules(spec)
    flow = map_published(modules["flow"]["flow"], read_pth(weights), str(weights))
    stored: Mapping[str, Tensor] = read_tensors(vae / VAE_FILES[1])[0]
    if isinstance(spec.codec, KLCodecConfig):
        stored = present_names(stored)
    coded = {f"vae.{k}": v for k, v in stored.items()}
    check_fit(modules["codec"], coded, vae / VAE_FILES[1])
    needed = 2 * sum(v.numel() for v in flow.values()) + sum(v.nbytes for v in coded.values())
    world.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(world.parent).free) < needed:
        raise CheckpointError(
            f"converting {name} needs {needed / 1e9:.1f} GB in {world.parent}, {free / 1e9:.1f} GB are free; "
            "make room, or set WORLDMODEL_CACHE to another disk"
        )
    show_licence()
    draft = world.with_name(f".{world.name}.{secrets.token_hex(4)}.tmp")
    try:
        draft.mkdir()
        save_shards(draft / "flow.safetensors", _halves(flow, name))
        expected = modules["codec"].state_dict()
        save_shards(draft / "codec.safetensors", ((k, v.to(expected[k].dtype)) for k, v in coded.items()))
        write_text(draft / "README.md", f"# {name}\n\n{LICENCE}\n")
        write_json(draft / "world.json", config_to_dict(spec))
        if not (world / "world.json").is_file():  # another process may have been faster
            os.replace(draft, world)
    except OSError as error:
        raise CheckpointError(f"cannot write {world} ({error}); nothing was changed there") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return world


def _halves(flow: Mapping[str, Tensor], name: str) -> Iterator[tuple[str, Tensor]]:
    bar = tqdm(flow.items(), desc=f"converting {name}", unit=" tensors", delay=2)
    for key, value in bar:
        yield f"flow.{key}", value.to(torch.bfloat16)
