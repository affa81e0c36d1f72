"""The Wan2.2 codec at a tiny size: streamed equals the whole clip, and its state is like any other state."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.toy import wan_config
from worldmodel.codec.wan import WanCodec, WanCodecConfig, cache_layouts
from worldmodel.errors import ConfigError, InputError

pytest.importorskip("diffusers")

CONFIG = wan_config(height=32, width=64)


@pytest.fixture(scope="module")
def codec() -> Iterator[WanCodec]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield WanCodec(CONFIG).requires_grad_(False)


def video(seed: int, latent_frames: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        0, 256, (1, 1 + 4 * (latent_frames - 1), 32, 64, 3), generator=generator, dtype=torch.uint8
    )


def chunks(frames: Tensor) -> list[Tensor]:
    return list(frames.split([1] + [4] * ((frames.shape[1] - 1) // 4), dim=1))


def whole_encode(codec: WanCodec, frames: Tensor) -> Tensor:
    """diffusers' own encoding of a whole clip, standardised and scaled by hand."""
    x = frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    mean = codec.vae.encode(x).latent_dist.mode()
    z = (mean - torch.tensor(CONFIG.latents_mean)[:, None, None, None]) / torch.tensor(CONFIG.latents_std)[
        :, None, None, None
    ]
    z[:, :, 1:] *= 0.6
    return z.permute(0, 2, 1, 3, 4)


def whole_decode(codec: WanCodec, latents: Tensor) -> Tensor:
    z = latents.permute(0, 2, 1, 3, 4).clone()
    z[:, :, 1:] /= 0.6
    z = z * torch.tensor(CONFIG.latents_std)[:, None, None, None]
    z = z + torch.tensor(CONFIG.latents_mean)[:, None, None, None]
    return codec.vae.decode(z).sample


def test_three_interleaved_streams_encode_as_the_whole_clips(codec: WanCodec) -> None:
    clips = [video(seed) for seed in range(3)]
    expected = [whole_encode(codec, clip) for clip in clips]
    assert expected[0].shape == (1, 5, 3, 2, 4)
    states = [codec.initial_state(1) for _ in clips]
    for t in range(5):
        for i, clip in enumerate(clips):
            latent, states[i] = codec.encode(chunks(clip)[t], states[i])
            assert latent.dtype == torch.float32
            torch.testing.assert_close(latent[:, 0], expected[i][:, t], rtol=0, atol=1e-5)


def test_three_interleaved_streams_decode_as_the_whole_clips(codec: WanCodec) -> None:
    generator = torch.Generator().manual_seed(1)
    clips = [torch.randn(1, 5, 3, 2, 4, generator=generator) for _ in range(3)]
    expected = [whole_decode(codec, clip) for clip in clips]
    assert expected[0].shape == (1, 3, 17, 32, 64) and expected[0].std() > 0.01
    states, done = [codec.initial_state(1) for _ in clips], 0
    for t, frames in enumerate((1, 4, 4, 4, 4)):
        for i, clip in enumerate(clips):
            pixels, states[i] = codec.decode_pixels(clip[:, t : t + 1], states[i])
            assert pixels.shape[2] == frames
            torch.testing.assert_close(pixels, expected[i][:, :, done : done + frames], rtol=0, atol=1e-5)
        done += frames


def test_several_chunks_at_once_are_the_same(codec: WanCodec) -> None:
    clip = video(4)
    latents, _ = codec.encode(clip, codec.initial_state(1))
    torch.testing.assert_close(latents, whole_encode(codec, clip), rtol=0, atol=1e-5)
    frames, state = codec.decode(latents[:, :2], codec.initial_state(1))
    more, _ = codec.decode(latents[:, 2:], state)
    assert frames.dtype == torch.uint8 and frames.shape == (1, 5, 32, 64, 3)
    whole, _ = codec.decode(latents, codec.initial_state(1))
    assert (torch.cat((frames, more), dim=1).int() - whole.int()).abs().max() <= 1


def test_a_batch_is_its_rows(codec: WanCodec) -> None:
    clips = [video(seed, 3) for seed in range(3)]
    together, _ = codec.encode(torch.cat(clips), codec.initial_state(3))
    for clip, row in zip(clips, together, strict=True):
        alone, _ = codec.encode(clip, codec.initial_state(1))
        torch.testing.assert_close(alone[0], row, rtol=0, atol=1e-5)


def test_the_state_is_tensors_of_one_shape_and_begins_without_memory(codec: WanCodec) -> None:
    before = codec.initial_state(2)
    _, after = codec.encode(video(0, 2).expand(2, -1, -1, -1, -1), before)
    _, after = codec.decode(torch.zeros(2, 2, 3, 2, 4), after)
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    assert sum(t.untyped_storage().nbytes() for t in before.values()) < 1000
    assert not any(t.any() for t in before.values()) and all(t.any() for t in after.values())
    layouts = cache_layouts(CONFIG)
    assert len(layouts["encoder"].resampling) == len(layouts["decoder"].resampling) == 2
    assert layouts["encoder"].shapes[0] == (12, 2, 16, 32)


def test_a_call_changes_no_state_given_to_it(codec: WanCodec) -> None:
    _, state = codec.encode(video(0, 2), codec.initial_state(1))
    kept = {k: v.clone() for k, v in state.items()}
    first, _ = codec.encode(chunks(video(1))[2], state)
    again, _ = codec.encode(chunks(video(1))[2], state)
    assert torch.equal(first, again) and all(torch.equal(kept[k], v) for k, v in state.items())


def test_decoding_in_bfloat16_is_close_and_encoding_stays_float32(codec: WanCodec) -> None:
    half = WanCodec(wan_config(width=64, decode_dtype="bfloat16")).requires_grad_(False)
    half.load_state_dict({k: v.to(half.state_dict()[k].dtype) for k, v in codec.state_dict().items()})
    assert {p.dtype for p in half.vae.encoder.parameters()} == {torch.float32}
    assert {p.dtype for p in half.vae.decoder.parameters()} == {torch.bfloat16}
    z = torch.randn(1, 3, 3, 2, 4, generator=torch.Generator().manual_seed(3))
    exact, _ = codec.decode_pixels(z, codec.initial_state(1))
    rough, state = half.decode_pixels(z, half.initial_state(1))
    assert state["decoder.0"].dtype == torch.bfloat16
    assert (exact - rough).abs().max() < 0.1 < exact.abs().max()


def test_bad_input_is_one_line(codec: WanCodec) -> None:
    new = codec.initial_state(1)
    _, begun = codec.encode(video(0, 1), new)
    joined = {k: torch.cat((v, begun[k])) for k, v in new.items()}
    for call, words in (
        (lambda: codec.encode(video(0)[:, :3], new), r"1 \+ 4 n"),
        (lambda: codec.encode(video(0)[:, :3], begun), r"\(batch, 4 n"),
        (lambda: codec.encode(video(0).float(), new), "uint8"),
        (lambda: codec.decode(torch.zeros(1, 1, 3, 4, 4), new), "expected floating point"),
        (lambda: codec.encode(video(0, 1).expand(2, -1, -1, -1, -1), joined), "select\\(\\) them apart"),
    ):
        with pytest.raises(InputError, match=words) as error:
            call()
        assert "\n" not in str(error.value)


def test_the_diffusers_configuration_is_read_and_checked() -> None:
    published = {
        "_class_name": "AutoencoderKLWan",
        "_diffusers_version": "0.35.0.dev0",
        "base_dim": 160,
        "decoder_base_dim": 256,
        "z_dim": 48,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_scales": [],
        "temperal_downsample": [False, True, True],
        "dropout": 0.0,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_temporal": 4,
        "scale_factor_spatial": 16,
        "latents_mean": [0.0] * 48,
        "latents_std": [1.0] * 48,
    }
    config = WanCodecConfig.from_diffusers(published, (480, 848))
    assert (config.frames, config.stride, config.latent_shape) == (4, 16, (48, 30, 53))
    assert config.arguments().items() <= published.items()
    for change, words in (
        ({"_class_name": "AutoencoderKL"}, "is a AutoencoderKL, expected AutoencoderKLWan"),
        ({"is_residual": False}, "is_residual is False"),
        ({"attn_scales": [0.5]}, "attn_scales"),
        ({"latents_std": [1.0] * 16}, "48 channels"),
    ):
        with pytest.raises(ConfigError, match=words):
            WanCodecConfig.from_diffusers({**published, **change}, (480, 848))
    with pytest.raises(ConfigError, match="lacks latents_mean"):
        WanCodecConfig.from_diffusers({k: v for k, v in published.items() if k != "latents_mean"}, (480, 848))
    with pytest.raises(ConfigError, match="not multiples of stride 16"):
        WanCodecConfig.from_diffusers(published, (480, 850))
