"""The convolutional codec: shapes, purity, size, and what it writes to disk."""

from pathlib import Path

import pytest
import torch

from worldmodel.codec.base import Codec
from worldmodel.codec.conv import ConvCodec, ConvCodecConfig, load_codec, round_weights, save_codec
from worldmodel.errors import CheckpointError, ConfigError, InputError
from worldmodel.files import load_tensors, save_tensors

SMALL = ConvCodecConfig(32, 48, widths=(16, 16, 32))


def codec(config: ConvCodecConfig = SMALL) -> ConvCodec:
    torch.manual_seed(0)
    made = ConvCodec(config).requires_grad_(False).eval()
    made.background.uniform_(0, 255)
    made.latent_std.uniform_(0.5, 2)
    return made


def clip(batch: int, frames: int, height: int = 32, width: int = 48) -> torch.Tensor:
    shape = (batch, frames, height, width, 3)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def test_it_keeps_the_interface() -> None:
    made: Codec = codec()
    assert (made.temporal_stride, made.first_frames, made.spatial_stride, made.latent_channels) == (
        4,
        4,
        16,
        8,
    )
    assert made.initial_state(3) == {}


def test_shapes_and_types() -> None:
    made = codec()
    latents, state = made.encode(clip(2, 12), {})
    assert latents.shape == (2, 3, 8, 2, 3) and latents.dtype == torch.float32 and state == {}
    frames, _ = made.decode(latents, state)
    assert frames.shape == (2, 12, 32, 48, 3) and frames.dtype == torch.uint8


def test_a_chunk_is_coded_alone_and_nothing_is_remembered() -> None:
    made, frames = codec(), clip(2, 12)
    whole, _ = made.encode(frames, {})
    parts = torch.cat([made.encode(frames[:, i : i + 4], {})[0] for i in (0, 4, 8)], dim=1)
    assert torch.allclose(whole, parts, atol=1e-5)
    before = {k: v.clone() for k, v in made.state_dict().items()}
    assert torch.equal(made.encode(frames, {})[0], whole)
    assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())


def test_an_untrained_codec_shows_nearly_the_background() -> None:
    made = codec()
    frames, _ = made.decode(torch.zeros(1, 1, 8, 2, 3), {})
    shown = frames[0, 0].permute(2, 0, 1).float()
    assert (shown - made.background).abs().max() < 4


def test_the_shipped_size_fits_and_larger_frames_work() -> None:
    assert sum(p.numel() for p in ConvCodec(ConvCodecConfig()).parameters()) <= 2_200_000
    large = ConvCodec(ConvCodecConfig(128, 128, widths=(16, 16, 16))).requires_grad_(False)
    latents, _ = large.encode(clip(1, 4, 128, 128), {})
    assert latents.shape == (1, 1, 8, 8, 8)
    assert large.decode(latents, {})[0].shape == (1, 4, 128, 128, 3)


def test_disk_round_trip_is_exact_after_rounding(tmp_path: Path) -> None:
    made = codec()
    round_weights(made)
    save_codec(tmp_path / "c", made)
    stored = load_tensors(tmp_path / "c")
    assert {str(t.dtype) for n, t in stored.items() if n.endswith("weight")} == {"torch.float16"}
    assert stored["background"].dtype == torch.float32
    loaded = load_codec(tmp_path / "c", SMALL)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in made.state_dict().items())
    assert not any(p.requires_grad for p in loaded.parameters())


def test_a_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    tensors = dict(codec().state_dict())
    tensors["extra"] = tensors.pop("latent_std")
    save_tensors(tmp_path / "c", tensors)
    with pytest.raises(CheckpointError, match=r"missing \['latent_std'\], unknown \['extra'\]"):
        load_codec(tmp_path / "c", SMALL)
    with pytest.raises(CheckpointError, match="misshapen"):
        load_codec(tmp_path / "c", ConvCodecConfig(32, 32, widths=(16, 16, 32)))


@pytest.mark.parametrize(
    "frames",
    [clip(1, 4, 32, 32), clip(1, 3), clip(1, 4)[0], clip(1, 4).float()],
    ids=["size", "count", "rank", "dtype"],
)
def test_wrong_frames_are_refused(frames: torch.Tensor) -> None:
    with pytest.raises(InputError, match="frames have"):
        codec().encode(frames, {})


def test_wrong_latents_are_refused() -> None:
    for latents in (torch.zeros(1, 1, 8, 2, 2), torch.zeros(1, 1, 8, 2, 3, dtype=torch.int64)):
        with pytest.raises(InputError, match="latents have"):
            codec().decode(latents, {})


def test_wrong_configurations_are_refused() -> None:
    with pytest.raises(ConfigError, match="multiples of stride 16"):
        ConvCodecConfig(60, 64)
    with pytest.raises(ConfigError, match="one entry a level"):
        ConvCodecConfig(widths=(16, 16))
