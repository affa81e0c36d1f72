"""Published names: a strict key map, and the 7B configuration on the meta device."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from worldmodel.errors import CheckpointError, ConfigError
from worldmodel.flow.flow import Flow
from worldmodel.flow.published import DEAD_BUFFERS, config_from_published, load_published

GOLDEN = Path(__file__).parents[1] / "golden"
NAME = "small_tc1_patch2"
ARGUMENTS = json.loads((GOLDEN / f"{NAME}.json").read_text())["arguments"]

SEVEN_B = {
    "in_channels": 48,
    "img_size": 32,
    "patch_size": 1,
    "channels": 3072,
    "top_block_channels": 4096,
    "num_blocks": 6,
    "layers_per_block": [2, 2, 2, 2, 2, 24],
    "head_dim": 64,
    "rope": True,
    "pt_seq_len": 32,
    "sos": True,
    "txt_size": 256,
    "txt_dim": 2048,
    "cond_top_only": True,
    "use_softplus": True,
    "use_final_norm": True,
    "soft_clip": 4,
    "seq_order": "L2R",
    "learnable_self_denoiser": True,
    "conditional_denoiser": True,
    "temporal_causal": 2,
    "shallow_block_local": True,
    "denoiser_window": 10,
}


@pytest.fixture
def weights() -> dict[str, Tensor]:
    return {k: v.float() for k, v in load_file(GOLDEN / f"{NAME}.weights.safetensors").items()}


def new_flow(**overrides: object) -> Flow:
    torch.manual_seed(0)
    return Flow(config_from_published(ARGUMENTS, **overrides))


def test_loads_every_weight(weights: dict[str, Tensor]) -> None:
    flow = new_flow()
    load_published(flow, weights)
    ours = flow.state_dict()
    assert sum(v.numel() for v in ours.values()) == sum(v.numel() for v in weights.values())
    assert sorted(v.double().sum().item() for v in ours.values()) == pytest.approx(
        sorted(v.double().sum().item() for v in weights.values())
    )


def test_the_four_dead_buffers_are_ignored_by_name(weights: dict[str, Tensor]) -> None:
    assert set(DEAD_BUFFERS) == {"attn_mask", "var", "freqs_cos", "freqs_sin"}
    carried = {
        "blocks.0.attn_mask": torch.zeros(3, 3),
        "blocks.3.attn_mask": torch.zeros(3, 3),
        "var": torch.ones(5),
        "feature.freqs_cos": torch.ones(5),
        "freqs_sin": torch.ones(5),
    }
    load_published(new_flow(), {**weights, **carried})
    for name in ("blocks.0.attn_masks", "variance", "freqs", "blocks.0.freqs_cos.weight"):
        with pytest.raises(CheckpointError, match=f"unexpected: {name}"):
            load_published(new_flow(), {**weights, name: torch.ones(1)})


def test_every_problem_is_listed_and_nothing_is_loaded(weights: dict[str, Tensor]) -> None:
    flow = new_flow()
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    del weights["blocks.1.sos_embed"], weights["blocks.3.attn_blocks.0.mlp.main.2.bias"]
    weights["blocks.9.proj_in.weight"] = torch.zeros(2)
    weights["module.blocks.0.proj_in.weight"] = torch.zeros(2)
    weights["blocks.0.proj_in.bias"] = torch.zeros(7)
    with pytest.raises(CheckpointError) as error:
        load_published(flow, weights)
    message = str(error.value)
    assert "\n" not in message
    missing, unexpected, shape = message.split("; ")[1:]
    assert missing.startswith("missing: ") and unexpected.startswith("unexpected: ")
    assert missing == "missing: blocks.1.sos_embed, blocks.3.attn_blocks.0.mlp.main.2.bias"
    assert "blocks.9.proj_in.weight" in unexpected and "module.blocks.0.proj_in.weight" in unexpected
    assert shape.startswith("wrong shape: blocks.0.proj_in.bias (7,) (expected (")
    assert all(torch.equal(v, before[k]) for k, v in flow.state_dict().items())


@pytest.mark.parametrize("part", ["deep", "denoiser"])
def test_each_missing_key_is_an_error(weights: dict[str, Tensor], part: str) -> None:
    prefix = "blocks.3." if part == "deep" else "learnable_self_denoiser."
    keys = [k for k in weights if k.startswith(prefix)]
    assert len(keys) > 15
    for key in keys:
        with pytest.raises(CheckpointError, match=f"missing: {key}$"):
            load_published(new_flow(), {k: v for k, v in weights.items() if k != key})


def test_action_weights_are_ours_and_stay_zero(weights: dict[str, Tensor]) -> None:
    plain, acting = new_flow(), new_flow(action_features=4)
    load_published(plain, weights)
    load_published(acting, weights)
    assert not acting.deep.transformer.proj_action.weight.any()
    x, text = torch.randn(1, 2, 6, 16), torch.randn(1, 4, 8)
    before = plain(x, (2, 3), text).z
    assert torch.equal(before, acting(x, (2, 3), text, torch.randn(1, 2, 4)).z)


def test_unknown_and_unused_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown model arguments \['chanels', 'x'\]"):
        config_from_published({**ARGUMENTS, "x": 1, "chanels": 2})
    for name, value in (
        ("rope", False),
        ("sos", False),
        ("cond_top_only", False),
        ("use_softplus", False),
        ("seq_order", "R2L"),
        ("shallow_block_local", False),
    ):
        with pytest.raises(ConfigError, match=f"{name} is {value!r}") as error:
            config_from_published({**ARGUMENTS, name: value})
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="num_blocks is 9"):
        config_from_published({**ARGUMENTS, "num_blocks": 9})


def test_without_a_learned_denoiser_there_is_none(weights: dict[str, Tensor]) -> None:
    flow = Flow(config_from_published({**ARGUMENTS, "learnable_self_denoiser": False}))
    assert flow.denoiser is None
    load_published(flow, {k: v for k, v in weights.items() if not k.startswith("learnable_self_denoiser.")})
    with pytest.raises(CheckpointError, match="unexpected: learnable_self_denoiser"):
        load_published(flow, weights)


@pytest.mark.parametrize("name", ["in_channels", "channels", "layers_per_block"])
def test_missing_arguments_are_named(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        config_from_published({k: v for k, v in ARGUMENTS.items() if k != name})


def published_keys(flow: Flow) -> dict[str, Tensor]:
    """The state dict under the published names, written down from the facts page."""
    names = {
        "attention.norm": "attention.norm",
        "attention.qkv": "attention.qkv",
        "attention.out": "attention.proj",
        "mlp.norm": "mlp.norm",
        "mlp.up": "mlp.main.0",
        "mlp.down": "mlp.main.2",
        "proj_text": "proj_txt",
    }
    state = {}
    for key, value in flow.state_dict().items():
        owner, _, rest = key.partition(".transformer.")
        if not rest:
            owner, _, rest = key.rpartition(".")
        deep = len(flow.config.layers_per_block) - 1
        owner = {"deep": f"blocks.{deep}", "denoiser": "learnable_self_denoiser"}.get(
            owner, owner.replace("shallow", "blocks")
        )
        for mine, theirs in names.items():
            rest = rest.replace(mine, theirs)
        state[f"{owner}.{rest}".replace(".layers.", ".attn_blocks.").replace(".sos", ".sos_embed")] = value
    return state


def test_the_7b_model_on_the_meta_device(capsys: pytest.CaptureFixture[str]) -> None:
    """The public configuration builds without storage, at the published size."""
    config = config_from_published(SEVEN_B)
    assert (config.noise_std, config.window, config.context, config.denoiser_layers) == (0.5, 21, 16, 8)
    begin = time.monotonic()
    with torch.device("meta"):
        flow = Flow(config)
    counts = {
        name: sum(p.numel() for p in part.parameters()) / 1e9
        for name, part in (("deep", flow.deep), ("shallow", flow.shallow), ("denoiser", flow.denoiser))
    }
    total = sum(p.numel() for p in flow.parameters())
    with capsys.disabled():
        print(f"\n7B on the meta device: {total:,} parameters, {time.monotonic() - begin:.1f} s")
    assert f"{total / 1e9:.2f}" == "6.89"
    assert {k: f"{v:.2f}" for k, v in counts.items()} == {
        "deep": "4.84",
        "shallow": "1.14",
        "denoiser": "0.91",
    }
    assert all(p.is_meta for p in flow.parameters())
    state = published_keys(flow)
    assert state["blocks.5.attn_blocks.23.attention.qkv.weight"].shape == (3 * 4096, 4096)
    assert state["blocks.5.proj_txt.weight"].shape == (4096, 2048)
    assert state["learnable_self_denoiser.attn_blocks.7.mlp.main.0.weight"].shape == (4 * 3072, 3072)
    assert state["blocks.0.proj_out.weight"].shape == (96, 3072)
    load_published(flow, state)
    with pytest.raises(CheckpointError, match=r"missing: blocks.5.attn_blocks.23.attention.qkv.weight$"):
        load_published(
            flow, {k: v for k, v in state.items() if k != "blocks.5.attn_blocks.23.attention.qkv.weight"}
        )


def test_the_golden_names_are_the_published_ones(weights: dict[str, Tensor]) -> None:
    """The names written down above are those of the golden weights (sos apart from its shape)."""
    mine = published_keys(new_flow())
    assert set(mine) == set(weights)
    assert all(mine[k].numel() == weights[k].numel() for k in mine)
