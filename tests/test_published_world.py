"""Published checkpoints, at a small size and made here: converted once, loaded in bfloat16, and refused for a reason."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from typer.testing import CliRunner

from tests.flow.test_published import published_keys
from tests.toy import randomise, wan_config, write_t5
from worldmodel import files, published
from worldmodel import plan as planning
from worldmodel.cli import app
from worldmodel.codec.wan import autoencoder
from worldmodel.errors import CheckpointError, ConfigError, WorldModelError
from worldmodel.files import read_pth, read_tensors, save_shards
from worldmodel.flow.flow import Flow
from worldmodel.flow.published import map_published, published_model, read_published_yaml
from worldmodel.published import RELEASES, obtain
from worldmodel.world import WorldModel

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
NAME = "apple/starflow-v"
SMALL = {
    **RELEASES[NAME].arguments,
    "img_size": 32,
    "vid_size": "9:16",
    "txt_size": 4,
    "channel_size": 3,
    "channels": 32,
    "top_block_channels": 64,
    "head_dim": 32,
    "blocks": 3,
    "layers_per_block": "1 1 2",
    "denoiser_window": 1,
}
TRAINING = {"fsdp": 1, "nvp": 1, "adaln": 0, "lr": "5e-5", "batch_size": 192, "drop_label": 0.1, "cfg": 2.5}


def write_folder(folder: Path) -> Path:
    """What a user who downloads everything has: the .pth, the .yaml, vae/, and here a tiny text encoder."""
    folder.mkdir()
    encoder = write_t5(folder / "t5")
    arguments = {**SMALL, **TRAINING, "text": str(encoder)}
    (folder / "model.yaml").write_text(yaml.safe_dump({"arguments": [{k: v} for k, v in arguments.items()]}))
    torch.manual_seed(0)
    flow = Flow(published_model(arguments, "test").flow)
    randomise(flow, 0)
    state = {
        k: v.reshape(1, 1, -1) if k.endswith("sos_embed") else v for k, v in published_keys(flow).items()
    }
    torch.save({**state, "var": torch.ones(3)}, folder / "model.pth")
    torch.manual_seed(1)
    autoencoder(wan_config()).save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("published") / "folder")


@pytest.fixture
def folder(tmp_path: Path, original: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to spoil, and an empty cache."""
    monkeypatch.setenv("WORLDMODEL_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(original, tmp_path / "folder"))


def refused(call: Callable[[], object], *words: str, kind: type[Exception] = CheckpointError) -> str:
    with pytest.raises(kind) as error:
        call()
    message = str(error.value)
    assert isinstance(error.value, WorldModelError) and "\n" not in message and len(message) < 900
    for word in words:
        assert word in message, message
    return message


# ---- what is published is what is loaded -------------------------------------------------------------------
def test_a_folder_becomes_a_world_in_bfloat16(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = WorldModel.load(folder)
    assert capsys.readouterr().err.count("non-commercial research only") == 1
    assert {p.dtype for p in world.flow.parameters()} == {torch.bfloat16}
    given = torch.load(folder / "model.pth", weights_only=True)
    expected = map_published(world.flow, given)
    ours = world.flow.state_dict()
    assert set(expected) == set(ours)
    assert all(torch.equal(ours[k], v.to(torch.bfloat16)) for k, v in expected.items())
    spec = world.spec
    assert (spec.frame_size, spec.fps, spec.heads, spec.bank) == ((32, 48), 16.0, None, False)
    assert (spec.flow.window, spec.flow.context, spec.flow.noise_std) == (3, 2, 0.5)
    assert spec.text is not None and (spec.text.fps, spec.text.noise_level, spec.text.aspect) == (True,) * 3
    assert world.codec.config.later_scale == 0.6 and world.codec.config.latents_mean == (0.1, -0.2, 0.3)
    shown = CliRunner().invoke(app, ["info", str(folder)])
    assert shown.exit_code == 0 and "none: begin with a picture" in shown.output
    picture = np.random.default_rng(0).integers(0, 256, (1, 1, 32, 48, 3), dtype=np.uint8)
    state, chunk = world.observe(world.initial_state([0]), picture)
    assert torch.isfinite(chunk.log_prob).all() and chunk.log_prob.dtype == torch.float64
    assert state.noisy.dtype == state.context.u.dtype == torch.float32


def test_it_is_converted_once_and_the_licence_shown_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = obtain(folder)
    assert "Apple" in capsys.readouterr().err
    monkeypatch.setattr(published, "read_pth", lambda path: pytest.fail("converted again"))
    assert obtain(folder) == first and obtain(first) == first
    assert capsys.readouterr().err == ""
    published.show_licence()
    assert capsys.readouterr().err == ""


def test_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("WORLDMODEL_CACHE", str(tmp_path / "own"))
    assert published.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("WORLDMODEL_CACHE")
    assert published.cache_folder() == tmp_path / "xdg" / "worldmodel"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert published.cache_folder() == tmp_path / "home" / ".cache" / "worldmodel"


def test_shards_hold_what_one_file_holds(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole, _ = read_tensors(obtain(folder) / "flow.safetensors")
    monkeypatch.setenv("WORLDMODEL_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(published, "save_shards", partial(save_shards, shard_bytes=40_000))
    cut = obtain(folder)
    names = sorted(p.name for p in cut.glob("flow-*"))
    assert len(names) > 3 and names[0] == f"flow-00001-of-{len(names):05d}.safetensors"
    assert not (cut / "flow.safetensors").exists() and not list(cut.glob(".*"))
    tensors, _ = read_tensors(cut / "flow.safetensors")
    assert set(tensors) == set(whole) and all(torch.equal(tensors[k], v) for k, v in whole.items())
    index = json.loads((cut / "flow.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in whole.values())
    victim = cut / names[1]
    victim.write_bytes(victim.read_bytes()[:-100])
    refused(lambda: WorldModel.load(cut), names[1], "truncated")
    victim.unlink()
    refused(lambda: WorldModel.load(cut), names[1], "does not exist")
    index["metadata"]["sha256"]["../elsewhere.safetensors"] = ""
    (cut / "flow.safetensors.index.json").write_text(json.dumps(index))
    refused(lambda: WorldModel.load(cut), "not a file beside it")


def test_the_fingerprint_is_of_the_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = WorldModel.load(folder).fingerprint
    monkeypatch.setenv("WORLDMODEL_CACHE", str(tmp_path / "again"))
    assert WorldModel.load(folder).fingerprint == first
    state = torch.load(folder / "model.pth", weights_only=True)
    state["blocks.0.proj_in.bias"] += 1
    torch.save(state, folder / "model.pth")
    assert WorldModel.load(folder).fingerprint != first


MEASURE = """
import sys, threading
from functools import partial
from pathlib import Path
from worldmodel import files, published
from worldmodel.world import WorldModel

published.save_shards = partial(files.save_shards, shard_bytes=30_000_000)

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

import diffusers.models.autoencoders.autoencoder_kl_wan  # what importing it takes is not the weights
def during(call):
    begin, peak, stop = anonymous(), [0], threading.Event()
    def watch():
        while not stop.wait(0.005):
            peak[0] = max(peak[0], anonymous())
    thread = threading.Thread(target=watch)
    thread.start()
    result = call()
    stop.set()
    thread.join()
    return result, max(peak[0] - begin, 0)

world, converting = during(lambda: published.obtain(sys.argv[1]))
_, loading = during(lambda: WorldModel.load(world))
print(converting, loading)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_memory_of_converting_and_loading_is_less_than_a_copy(folder: Path) -> None:
    """Converting holds a few shards, loading on the host maps the files: 300 MB of bfloat16, from 600 MB of float32."""
    rewritten(folder, channels=1024, top_block_channels=1024, layers_per_block="1 1 4")
    model = read_published_yaml(folder / "model.yaml")
    torch.save(published_keys(Flow(model.flow)), folder / "model.pth")
    size = published.flow_bytes(model)
    assert size > 300e6
    command = [sys.executable, "-c", MEASURE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    converting, loading = map(int, done.stdout.split())
    print(
        f"{size / 1e6:.0f} MB of weights: converting {converting / 1e6:.0f} MB, loading {loading / 1e6:.0f} MB"
    )
    assert converting < 0.6 * size
    assert loading < 0.2 * size


# ---- what is refused, and why ------------------------------------------------------------------------------
def respoil(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    state = torch.load(folder / "model.pth", weights_only=True)
    change(state)
    torch.save(state, folder / "model.pth")


def test_keys_that_do_not_fit_are_listed(folder: Path) -> None:
    def change(state: dict[str, Tensor]) -> None:
        del state["blocks.2.attn_blocks.1.mlp.main.0.weight"], state["blocks.0.sos_embed"]
        state["blocks.7.proj_in.weight"] = torch.zeros(2)
        state["blocks.1.proj_in.bias"] = torch.zeros(5)

    respoil(folder, change)
    refused(
        lambda: WorldModel.load(folder),
        "model.pth does not fit",
        "missing: blocks.0.sos_embed, blocks.2.attn_blocks.1.mlp.main.0.weight",
        "unexpected: blocks.7.proj_in.weight",
        "wrong shape: blocks.1.proj_in.bias (5,) (expected (32,))",
    )
    assert not list((folder.parent / "cache").glob("*/world.json"))


@pytest.mark.parametrize("keep", [0, 1000, -1000])
def test_a_truncated_checkpoint(folder: Path, keep: int) -> None:
    file = folder / "model.pth"
    file.write_bytes(file.read_bytes()[:keep])
    refused(
        lambda: WorldModel.load(folder),
        "model.pth",
        "truncated or not a PyTorch state dict",
        "download it again",
    )


def test_a_wrong_file(folder: Path) -> None:
    (folder / "model.pth").write_text("<html>not found</html>")
    refused(lambda: WorldModel.load(folder), "not a PyTorch state dict")
    torch.save({"model": {"a": torch.zeros(1)}, "epoch": 3}, folder / "model.pth")
    refused(lambda: WorldModel.load(folder), "not a state dict of tensors (keys model, epoch)")
    torch.save({"a": Path("x")}, folder / "model.pth")
    refused(lambda: WorldModel.load(folder), "not a PyTorch state dict")
    refused(lambda: read_pth(folder / "absent.pth"), "does not exist")


def test_a_codec_that_is_missing_or_damaged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    refused(lambda: WorldModel.load(folder), str(file), "truncated")
    file.unlink()
    refused(lambda: WorldModel.load(folder), str(file), "does not exist")
    shutil.rmtree(folder / "vae")
    offline(monkeypatch, folder)
    refused(
        lambda: WorldModel.load(folder),
        "needs vae/config.json (2.8 GB) of https://huggingface.co/Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        "HF_HUB_OFFLINE is set",
        f"put it at {folder}/vae/config.json",
    )


def test_a_folder_whose_model_is_not_clear(folder: Path) -> None:
    (folder / "model.yaml").rename(folder / "model.txt")
    refused(lambda: WorldModel.load(folder), "no published file of that name", "put its public .yaml")
    (folder / "second.pth").write_bytes(b"")
    refused(lambda: WorldModel.load(folder), "has 2 *.pth files, expected one")


def offline(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder.parent / "hub"))


def test_without_weights_it_says_what_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch, folder)
    wanted = (
        "apple/starflow-v needs starflow-v_7B_t2v_caus_480p_v3.pth (13.8 GB in bfloat16, twice that in float32) of "
        "https://huggingface.co/apple/starflow, which is not in the Hub's cache and cannot be fetched"
    )
    place = (
        "put it at FOLDER/starflow-v_7B_t2v_caus_480p_v3.pth (vae/ of the codec beside it) and load FOLDER"
    )
    refused(lambda: WorldModel.load(NAME), wanted, "(HF_HUB_OFFLINE is set)", place)
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(published, "getproxies", dict)
    monkeypatch.setattr(hub.constants, "ENDPOINT", "https://nowhere.invalid")
    refused(lambda: WorldModel.load(NAME), wanted, "(nowhere.invalid is not reached: ", place)
    monkeypatch.setattr(published, "_unreachable", lambda: None)

    def unreachable(*_: object) -> None:
        raise ConnectionError("Name or service\nnot known")

    monkeypatch.setattr(hub, "hf_hub_download", unreachable)
    refused(lambda: WorldModel.load(NAME), wanted, "(Name or service not known)", place)


def test_what_the_hub_has_is_converted_under_the_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def fetch(repo: str, file: str) -> str:
        asked.append((repo, file))
        return str(folder / (file if file.startswith("vae/") else "model.pth"))

    release = published.Release("apple/starflow", "weights.pth", {**SMALL, "text": str(folder / "t5")})
    monkeypatch.setattr(published, "_unreachable", lambda: None)
    monkeypatch.setattr(hub, "hf_hub_download", fetch)
    monkeypatch.setitem(RELEASES, NAME, release)
    world = WorldModel.load(NAME)
    assert world.spec.name == NAME and world.flow.config.channels == 32
    assert asked == [
        ("apple/starflow", "weights.pth"),
        ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "vae/config.json"),
        ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "vae/diffusion_pytorch_model.safetensors"),
    ]
    WorldModel.load(NAME)
    assert len(asked) == 3 and (folder.parent / "cache" / "apple--starflow-v" / "world.json").is_file()


def test_too_little_memory_or_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(published.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
        refused(lambda: WorldModel.load(folder), "needs 0.0 GB in", "make room, or set WORLDMODEL_CACHE")
    world = obtain(folder)
    monkeypatch.setattr(planning, "_main_memory", lambda: (10**5, 10**9))
    refused(lambda: WorldModel.load(world), "take", "0.10 MB are free on cpu", "--plan")


def test_an_interrupted_conversion_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path, tensors: Any) -> None:
        next(iter(tensors))
        files.save_tensors(path, {"a": torch.zeros(3)})
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(published, "save_shards", interrupted)
        with pytest.raises(KeyboardInterrupt):
            obtain(folder)
    assert [p.name for p in (folder.parent / "cache").iterdir()] == ["licence-shown"]
    assert (obtain(folder) / "world.json").is_file()


# ---- the public configuration ------------------------------------------------------------------------------
def rewritten(folder: Path, **changes: Any) -> Path:
    entries = {
        k: v for e in yaml.safe_load((folder / "model.yaml").read_text())["arguments"] for k, v in e.items()
    }
    entries = {k: v for k, v in {**entries, **changes}.items() if v is not None}
    (folder / "model.yaml").write_text(yaml.safe_dump({"arguments": [{k: v} for k, v in entries.items()]}))
    return folder / "model.yaml"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"chanels": 3}, "unknown arguments chanels"),
        ({"channels": None}, "missing model arguments ['channels']"),
        ({"noise_std": None}, "missing argument 'noise_std'"),
        ({"vid_size": "81"}, "cannot be used"),
        ({"vae": "elsewhere/vae"}, "codec 'elsewhere/vae' is not known (Wan-AI/"),
        ({"nvp": 0}, "nvp is 0"),
        ({"shallow_block_local": None}, "shallow_block_local is False; STARFlow-V needs True"),
        ({"text": "elsewhere/t5"}, "text encoder 'elsewhere/t5' is not known"),
        ({"blocks": 5}, "num_blocks is 5 but layers_per_block has 3 entries"),
    ],
)
def test_a_configuration_that_is_not_starflow_v(folder: Path, changes: dict[str, Any], words: str) -> None:
    file = rewritten(folder, **changes)
    message = refused(lambda: read_published_yaml(file), words, kind=ConfigError)
    assert message.count(str(file)) == 1


def test_a_configuration_that_is_no_configuration(folder: Path) -> None:
    file = folder / "model.yaml"
    for text, kind in (("arguments: {a: 1}", ConfigError), ("a: [", CheckpointError), ("- 1", ConfigError)):
        file.write_text(text)
        refused(lambda: read_published_yaml(file), str(file), kind=kind)
    file.write_text("arguments: !!python/object/apply:os.system ['true']")
    refused(lambda: read_published_yaml(file), "cannot be read as YAML")


def test_the_full_size_state_dict_maps_with_nothing_missing_or_left_over() -> None:
    model = published_model(RELEASES[NAME].arguments, NAME)
    assert (model.frame_size, model.fps, model.later_scale) == ((480, 848), 16.0, 0.6)
    assert (model.flow.window, model.flow.context, model.flow.text_tokens) == (21, 16, 256)
    with torch.device("meta"):
        flow = Flow(model.flow)
    state = published_keys(flow)
    mapped = map_published(flow, state)
    assert len(mapped) == len(state) == len(flow.state_dict())
    assert all(mapped[k].shape == v.shape for k, v in flow.state_dict().items())
    assert f"{sum(v.numel() for v in mapped.values()) / 1e9:.2f}" == "6.89"
    with pytest.raises(CheckpointError, match="missing: blocks.0.proj_in.bias$"):
        map_published(flow, {k: v for k, v in state.items() if k != "blocks.0.proj_in.bias"})
