"""Stable Diffusion's codec at a tiny size: what diffusers gives, scaled; and what is published is read or refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.toy import kl_config
from worldmodel.codec.kl import KLCodec, KLCodecConfig, autoencoder, present_names
from worldmodel.errors import ConfigError, InputError
from worldmodel.packed import pack

pytest.importorskip("diffusers")

CONFIG = kl_config(width=64)
PUBLISHED = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.4.2",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 256,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


@pytest.fixture(scope="module")
def codec() -> Iterator[KLCodec]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield KLCodec(CONFIG).requires_grad_(False)


def pictures(rows: int, frames: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, frames, 32, 64, 3), generator=generator, dtype=torch.uint8)


def test_latents_are_the_posteriors_mean_scaled(codec: KLCodec) -> None:
    frames = pictures(2)
    latents, state = codec.encode(frames, codec.initial_state(2))
    assert latents.shape == (2, 1, 3, 4, 8) and latents.dtype == torch.float32 and state == {}
    x = frames[:, 0].permute(0, 3, 1, 2).float() / 127.5 - 1
    posterior = codec.vae.encode(x).latent_dist
    assert (posterior.std > 0.1).all()  # a sample would be another
    torch.testing.assert_close(latents[:, 0], 0.18215 * posterior.mode(), rtol=0, atol=1e-6)


def test_pictures_are_what_diffusers_decodes(codec: KLCodec) -> None:
    z = torch.randn(2, 1, 3, 4, 8, generator=torch.Generator().manual_seed(1))
    frames, state = codec.decode(z, {})
    assert frames.shape == (2, 1, 32, 64, 3) and frames.dtype == torch.uint8 and state == {}
    pixels = codec.vae.decode(z[:, 0] / 0.18215).sample.permute(0, 2, 3, 1)
    expected = (127.5 * (pixels.clamp(-1, 1) + 1)).round()
    assert expected.std() > 5 and torch.equal(frames[:, 0].float(), expected)


def test_each_picture_is_coded_alone(codec: KLCodec) -> None:
    frames = pictures(2, 3)
    latents, _ = codec.encode(frames, {})
    decoded, _ = codec.decode(latents, {})
    for b in range(2):
        for t in range(3):
            alone, _ = codec.encode(frames[b : b + 1, t : t + 1], {})
            torch.testing.assert_close(alone[0, 0], latents[b, t], rtol=0, atol=1e-5)
            again, _ = codec.decode(latents[b : b + 1, t : t + 1], {})
            assert (again[0, 0].int() - decoded[b, t].int()).abs().max() <= 1


def test_packed_weights_give_the_same(codec: KLCodec) -> None:
    packed = KLCodec(CONFIG)
    packed.load_state_dict(codec.state_dict())
    pack(packed.requires_grad_(False))  # as `WorldModel.load` does
    frames = pictures(1)
    latents, _ = packed.encode(frames, {})
    torch.testing.assert_close(latents, codec.encode(frames, {})[0], rtol=0, atol=1e-5)
    mine, plain = (c.decode(latents, {})[0].int() for c in (packed, codec))
    assert (mine - plain).abs().max() <= 1


def test_a_picture_is_a_chunk_and_nothing_is_remembered(codec: KLCodec) -> None:
    assert (codec.temporal_stride, codec.first_frames, codec.spatial_stride, codec.latent_channels) == (
        1,
        1,
        8,
        3,
    )
    assert codec.initial_state(3) == {} and codec.begun({}) is None
    other = codec.at((16, 24))
    assert other.config.latent_shape == (3, 2, 3) and other.vae is codec.vae
    assert other.decode(torch.zeros(1, 1, 3, 2, 3), {})[0].shape == (1, 1, 16, 24, 3)


def test_bad_input_is_one_line(codec: KLCodec) -> None:
    for call, words in (
        (lambda: codec.encode(pictures(1)[:, :, :16], {}), r"expected \(batch, time, 32, 64, 3\)"),
        (lambda: codec.encode(pictures(1)[:, :0], {}), "expected"),
        (lambda: codec.encode(pictures(1).float(), {}), "uint8"),
        (lambda: codec.decode(torch.zeros(1, 1, 3, 4, 4), {}), "expected floating point"),
        (lambda: codec.decode(torch.zeros(1, 1, 3, 4, 8, dtype=torch.int64), {}), "expected floating point"),
    ):
        with pytest.raises(InputError, match=words) as error:
            call()
        assert "\n" not in str(error.value)


def test_the_published_configuration_is_read_and_checked() -> None:
    """An old one, without the scaling factor; diffusers' own default is the one it was trained with."""
    config = KLCodecConfig.from_diffusers(PUBLISHED, (256, 256))
    assert config == KLCodecConfig() and (config.stride, config.latent_shape) == (8, (4, 32, 32))
    assert config.scaling_factor == 0.18215
    assert KLCodecConfig.from_diffusers({**PUBLISHED, "scaling_factor": 0.5}, (8, 8)).scaling_factor == 0.5
    for change, words in (
        ({"_class_name": "AutoencoderKLWan"}, "is a AutoencoderKLWan, expected AutoencoderKL"),
        ({"act_fn": "relu"}, "act_fn is 'relu'"),
        ({"shift_factor": 0.1}, "shift_factor is 0.1"),
        ({"latents_mean": [0.0]}, "latents_mean"),
        ({"use_quant_conv": False}, "use_quant_conv is False"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 4}, "down_block_types"),
        ({"block_out_channels": [100]}, "multiples of norm_num_groups"),
        ({"block_out_channels": []}, "block_out_channels"),
        ({"scaling_factor": 0.0}, "scaling_factor is 0.0"),
        ({"latent_channels": 0}, "latent_channels is 0"),
    ):
        with pytest.raises(ConfigError, match=words) as error:
            KLCodecConfig.from_diffusers({**PUBLISHED, **change}, (256, 256))
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="lacks block_out_channels, layers_per_block"):
        KLCodecConfig.from_diffusers({"latent_channels": 4, "norm_num_groups": 32}, (256, 256))
    with pytest.raises(ConfigError, match="not multiples of stride 8"):
        KLCodecConfig.from_diffusers(PUBLISHED, (256, 250))


def test_the_names_of_old_files_are_understood() -> None:
    """Files of Stable Diffusion's time name the attention's maps otherwise; nothing else is renamed."""
    with torch.device("meta"):
        names = list(autoencoder(CONFIG).state_dict())
    old = [n.replace("to_q.", "query.").replace("to_k.", "key.").replace("to_v.", "value.") for n in names]
    old = [n.replace("to_out.0.", "proj_attn.") for n in old]
    assert len(set(old) - set(names)) == 16
    assert list(present_names(dict.fromkeys(old, torch.zeros(1)))) == names
    assert list(present_names(dict.fromkeys(names, torch.zeros(1)))) == names


def test_the_full_size_codec_has_the_published_weights() -> None:
    with torch.device("meta"):
        vae = autoencoder(KLCodecConfig())
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
