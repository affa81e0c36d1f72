"""STARFlow 3B, pictures from text, as it is published: converted at a small size, mapped at the full one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.flow.test_published import published_keys
from tests.test_published_world import offline, refused, respoil, rewritten
from tests.toy import kl_config, randomise, wan_config, write_t5
from worldmodel import published
from worldmodel.cli import app
from worldmodel.codec.kl import KLCodecConfig, autoencoder
from worldmodel.codec.wan import autoencoder as wan_autoencoder
from worldmodel.condition.text import TextConfig
from worldmodel.errors import CheckpointError, ConfigError
from worldmodel.files import config_from_dict, config_to_dict
from worldmodel.flow.flow import Flow
from worldmodel.flow.published import map_published, published_model, read_published_yaml
from worldmodel.plan import plan
from worldmodel.published import RELEASES, planned_spec
from worldmodel.sampling import Sampling
from worldmodel.world import WorldModel

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
NAME = "apple/starflow"
PUBLIC = {
    "no_flip": 1,
    "fsdp": 1,
    "fsdp_text_encoder": 1,
    "img_size": 256,
    "txt_size": 128,
    "channel_size": 4,
    "patch_size": 1,
    "channels": 3072,
    "blocks": 6,
    "layers_per_block": "2 2 2 2 2 24",
    "noise_std": 0.3,
    "batch_size": 1024,
    "lr": 6.4e-5,
    "min_lr": "1e-6",
    "nvp": 1,
    "rope": 1,
    "adaln": 0,
    "sos": 1,
    "seq_order": "L2R",
    "wds": 1,
    "use_softplus": 1,
    "cond_top_only": 1,
    "use_final_norm": 1,
    "gradient_checkpoint": 0,
    "vae": "stabilityai/sd-vae-ft-ema",
    "text": "google/flan-t5-xl",
    "cfg": 2.5,
    "drop_label": 0.1,
    "sample_freq": 10,
    "soft_clip": 4,
    "latent_norm_regularization": "1e-4",
}
"""All that the public YAML says."""
SMALL = {
    **PUBLIC,
    "img_size": 32,
    "txt_size": 4,
    "channels": 32,
    "head_dim": 32,
    "blocks": 3,
    "layers_per_block": "1 1 2",
}
VAE = "diffusion_pytorch_model.safetensors"


def write_yaml(path: Path, arguments: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump({"arguments": [{k: v} for k, v in arguments.items()]}))
    return path


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user who downloads everything has: the .pth, the .yaml, vae/, and here a tiny text encoder."""
    folder = tmp_path_factory.mktemp("published") / "folder"
    folder.mkdir()
    arguments = {**SMALL, "text": str(write_t5(folder / "t5"))}
    write_yaml(folder / "model.yaml", arguments)
    torch.manual_seed(0)
    flow = Flow(published_model(arguments, "test").flow)
    randomise(flow, 0)
    state = {k: v[None, None] if k.endswith("sos_embed") else v for k, v in published_keys(flow).items()}
    torch.save({**state, "var": torch.ones(3)}, folder / "model.pth")
    vae = autoencoder(kl_config(latent_channels=4))
    randomise(vae, 1)
    vae.save_pretrained(folder / "vae")
    return folder


@pytest.fixture
def folder(tmp_path: Path, original: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to spoil, and an empty cache."""
    monkeypatch.setenv("WORLDMODEL_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(original, tmp_path / "folder"))


# ---- what is published is what is loaded -------------------------------------------------------------------
def test_a_folder_becomes_a_world_of_pictures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = WorldModel.load(folder)
    assert "Stability AI's sd-vae-ft-ema is under MIT" in capsys.readouterr().err
    given = torch.load(folder / "model.pth", weights_only=True)
    expected, ours = map_published(world.flow, given), world.flow.state_dict()
    assert set(expected) == set(ours) and world.flow.denoiser is None
    assert all(torch.equal(ours[k], v.to(torch.bfloat16)) for k, v in expected.items())
    spec = world.spec
    assert (spec.frame_size, spec.fps, spec.heads, spec.bank) == ((32, 32), 0.0, None, False)
    assert (spec.flow.window, spec.flow.noise_std, spec.flow.position_scale) == (1, 0.3, 4)
    assert spec.flow.top_channels == spec.flow.channels == 32 and spec.flow.denoiser_layers == 0
    assert spec.codec == kl_config(latent_channels=4) and spec.sampling == Sampling(3.6, tolerance=1e-3)
    stored = load_file(folder / "vae" / VAE)
    assert all(torch.equal(world.codec.state_dict()[f"vae.{k}"], v) for k, v in stored.items())
    assert config_from_dict(type(spec), config_to_dict(spec), "spec") == spec


def test_the_prompt_is_the_caption_alone(folder: Path) -> None:
    world = WorldModel.load(folder)
    text = world.spec.text
    assert text is not None and not (text.fps or text.noise_level or text.aspect or text.extend)
    assert world.prompts is not None
    assert [world.prompts.text(caption) for caption in ("a corgi", "")] == ["a corgi", ""]


def test_it_generates_a_picture_from_the_command_line(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "corgi.png"
    arguments = ["generate", str(folder), "--prompt", "a corgi", "--seed", "3", "--out", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    record = json.loads(out.with_name("corgi.png.json").read_text())
    assert record["task"] == "text-to-image" and record["text"] == "a corgi" and len(record["chunks"]) == 1
    chunk = record["chunks"][0]
    assert (
        f"corgi.png: a picture of 32 x 32, {chunk['log_prob']:.1f} nats (of the noised latent)" in done.output
    )
    assert chunk["frames"] == 1 and chunk["guided_log_prob"] != chunk["log_prob"]
    world = WorldModel.load(folder)
    _, expected = world.step(world.initial_state([3], ["a corgi"]))
    read = cv2.cvtColor(cv2.imread(str(out)), cv2.COLOR_BGR2RGB)
    assert read.std() > 1 and torch.equal(torch.from_numpy(read), expected.frames[0, 0])
    assert chunk["log_prob"] == pytest.approx(float(expected.log_prob))
    shown = CliRunner().invoke(app, ["info", str(folder)])
    assert shown.exit_code == 0 and "32 x 32 uint8 RGB, one a session" in shown.output


def test_an_old_codec_file_loads_as_a_new_one(folder: Path) -> None:
    """Stable Diffusion's: the attention's maps under other names, and no scaling factor in config.json."""
    before = WorldModel.load(folder).codec
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(folder / "vae" / VAE)
    for new, old in older.items():
        tensors = {k.replace(f".{new}.", f".{old}."): v for k, v in tensors.items()}
    assert sum("proj_attn" in k for k in tensors) == 4
    save_file(tensors, folder / "vae" / VAE)
    config = json.loads((folder / "vae" / "config.json").read_text())
    structure = (
        "_class_name",
        "block_out_channels",
        "layers_per_block",
        "norm_num_groups",
        "latent_channels",
    )
    (folder / "vae" / "config.json").write_text(json.dumps({k: config[k] for k in structure}))
    shutil.rmtree(folder.parent / "cache")
    after = WorldModel.load(folder).codec
    assert after.config == before.config and after.config.scaling_factor == 0.18215
    ours = before.state_dict()
    assert all(torch.equal(ours[k], v) for k, v in after.state_dict().items())


# ---- what is refused, and why ------------------------------------------------------------------------------
def test_keys_that_do_not_fit_are_listed(folder: Path) -> None:
    denoiser = "learnable_self_denoiser.proj_in.bias"
    respoil(
        folder, lambda state: (state.update({denoiser: torch.zeros(2)}), state.pop("blocks.1.proj_in.bias"))
    )
    refused(
        lambda: WorldModel.load(folder),
        "missing: blocks.1.proj_in.bias",
        f"unexpected: {denoiser}",
    )


def test_another_codec(folder: Path) -> None:
    shutil.rmtree(folder / "vae")
    wan_autoencoder(wan_config()).save_pretrained(folder / "vae")
    refused(lambda: WorldModel.load(folder), "AutoencoderKLWan, expected AutoencoderKL", kind=ConfigError)
    shutil.rmtree(folder / "vae")
    autoencoder(kl_config(latent_channels=4, layers_per_block=2)).save_pretrained(folder / "vae")
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps({**config, "layers_per_block": 1}))
    refused(lambda: WorldModel.load(folder), VAE, "unexpected: vae.")


def test_a_codec_with_other_channels_than_the_flow(folder: Path) -> None:
    shutil.rmtree(folder / "vae")
    autoencoder(kl_config(latent_channels=3)).save_pretrained(folder / "vae")
    refused(lambda: WorldModel.load(folder), "the codec has 3 channels, the flow 4", kind=ConfigError)


def test_without_the_codec_it_says_what_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(folder / "vae")
    offline(monkeypatch, folder)
    refused(
        lambda: WorldModel.load(folder),
        "needs config.json (0.3 GB) of https://huggingface.co/stabilityai/sd-vae-ft-ema",
        f"put it at {folder}/vae/config.json (vae/ of the codec beside it) and load {folder}",
    )
    refused(
        lambda: WorldModel.load(NAME),
        "apple/starflow needs starflow_3B_t2i_256x256.pth (7.7 GB in bfloat16, twice that in float32)",
    )


def test_what_the_hub_has_is_converted_under_the_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def fetch(repo: str, file: str) -> str:
        asked.append((repo, file))
        return str(
            folder / ("vae" if "sd-vae" in repo else ".") / (file if "sd-vae" in repo else "model.pth")
        )

    release = published.Release("apple/starflow", "weights.pth", {**SMALL, "text": str(folder / "t5")})
    monkeypatch.setattr(published, "_unreachable", lambda: None)
    monkeypatch.setattr(hub, "hf_hub_download", fetch)
    monkeypatch.setitem(RELEASES, NAME, release)
    assert WorldModel.load(NAME).spec.name == NAME
    codec = "stabilityai/sd-vae-ft-ema"
    assert asked == [("apple/starflow", "weights.pth"), (codec, "config.json"), (codec, VAE)]


# ---- the full size -----------------------------------------------------------------------------------------
def test_the_public_configuration_is_read_as_it_is(tmp_path: Path) -> None:
    model = read_published_yaml(write_yaml(tmp_path / "model.yaml", PUBLIC))
    assert model == published_model(RELEASES[NAME].arguments, NAME)
    assert (model.frame_size, model.fps, model.guidance) == ((256, 256), 0.0, 3.6)
    c = model.flow
    assert (c.channels, c.top_channels, c.head_dim, c.in_channels, c.patch_size) == (3072, 3072, 64, 4, 1)
    assert (c.text_tokens, c.text_dim, c.position_scale, c.noise_std, c.soft_clip) == (128, 2048, 32, 0.3, 4)
    assert (c.layers_per_block, c.window, c.denoiser_layers) == ((2, 2, 2, 2, 2, 24), 1, 0)
    assert model.text == TextConfig(
        "google/flan-t5-xl", fps=False, noise_level=False, aspect=False, extend=False
    )
    assert model.vae == "stabilityai/sd-vae-ft-ema" and model.later_scale == 1.0


def test_a_denoiser_may_be_learned_for_pictures_too(folder: Path) -> None:
    model = read_published_yaml(rewritten(folder, learnable_self_denoiser=1, pt_seq_len=16))
    assert model.flow.denoiser_layers == 8 and model.flow.position_scale == 16


def test_the_full_size_state_dict_maps_with_nothing_missing_or_left_over(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Names and shapes written down from the facts of the 7B model, less a denoiser."""
    with torch.device("meta"):
        flow = Flow(published_model(RELEASES[NAME].arguments, NAME).flow)
    state = published_keys(flow)
    mapped = map_published(flow, state)
    assert len(mapped) == len(state) == len(flow.state_dict())
    counts = {
        part: sum(p.numel() for p in module.parameters())
        for part, module in (("all", flow), ("deep", flow.deep), ("shallow", flow.shallow))
    }
    with capsys.disabled():
        print(f"\n3B on the meta device: {', '.join(f'{k} {v:,}' for k, v in counts.items())} parameters")
    assert counts["all"] == counts["deep"] + counts["shallow"]
    assert {k: f"{v / 1e9:.3f}" for k, v in counts.items()} == {
        "all": "3.858",
        "deep": "2.725",
        "shallow": "1.133",
    }
    assert {k.split(".")[0] for k in state} == {"blocks"} and {k.split(".")[1] for k in state} == set(
        "012345"
    )
    assert state["blocks.5.attn_blocks.23.attention.qkv.weight"].shape == (3 * 3072, 3072)
    assert state["blocks.5.proj_txt.weight"].shape == (3072, 2048)
    assert state["blocks.0.proj_in.weight"].shape == (3072, 4)
    assert state["blocks.0.proj_out.weight"].shape == (8, 3072)
    with pytest.raises(CheckpointError, match=r"missing: blocks.0.sos_embed$"):
        map_published(flow, {k: v for k, v in state.items() if k != "blocks.0.sos_embed"})


def test_the_plan_needs_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLDMODEL_CACHE", str(tmp_path))
    spec = planned_spec(NAME)
    assert spec.codec == KLCodecConfig()
    counted = plan(spec)
    assert counted.weights["flow"] == 2 * counted.parameters == 2 * 3_858_281_544
    assert counted.weights["codec"] == 4 * 83_653_863
    assert counted.streams == 2 and counted.kv_window == 2 * 2 * 24 * 3072 * (128 + 1024) * 2
    assert counted.reencoding == counted.codec_state == 0 and counted.score > 2e9
    assert not list(tmp_path.iterdir())
