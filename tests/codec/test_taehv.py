"""The fast decoder: the published keys, streams that equal whole clips, and a world that uses it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.toy import wan_config, write_wan_toy
from worldmodel.codec.taehv import FastDecoder, load_fast_decoder
from worldmodel.codec.wan import WanCodec
from worldmodel.errors import CheckpointError, InputError
from worldmodel.world import WorldModel

pytest.importorskip("diffusers")
SMALL = (8, 6, 4, 4)


def decoder(widths: tuple[int, ...] = SMALL, channels: int = 3) -> FastDecoder:
    torch.manual_seed(0)
    return FastDecoder(channels, widths).requires_grad_(False)


def written_out(state: dict[str, Tensor], z: Tensor) -> Tensor:
    """One latent clip (T, C, h, w) frame by frame, layer by layer, from the keys alone: pixels (3, 1 + 4 (T - 1), ...)."""

    def conv(key: str, x: Tensor) -> Tensor:
        weight = state[f"decoder.{key}.weight"]
        return F.conv2d(x, weight, state.get(f"decoder.{key}.bias"), padding=weight.shape[-1] // 2)

    frames = [F.relu(conv("1", 3 * torch.tanh(x / 3))) for x in z[:, None]]
    for first, grow, last in ((3, 7, 8), (9, 13, 14), (15, 19, 20)):
        for block in range(first, first + 3):
            past, out = torch.zeros_like(frames[0]), []
            for x in frames:
                y = F.relu(conv(f"{block}.conv.0", torch.cat((x, past), 1)))
                y = conv(f"{block}.conv.4", F.relu(conv(f"{block}.conv.2", y)))
                out.append(F.relu(y + x))
                past = x
            frames = out
        grown = []
        for x in frames:
            y = conv(f"{grow}.conv", F.interpolate(x, scale_factor=2.0))
            grown += [conv(str(last), part) for part in y.chunk(y.shape[1] // x.shape[1], dim=1)]
        frames = grown
    pixels = [F.pixel_shuffle(conv("22", F.relu(x)), 2)[0] for x in frames]
    return torch.stack(pixels[3:], dim=1)


def test_a_stream_is_the_whole_clip_as_written_out() -> None:
    codec = WanCodec(wan_config()).with_fast_decoder(decoder())
    z = torch.randn(1, 4, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    unscaled = torch.cat((z[:, :1], z[:, 1:] / 0.6), dim=1)[0]
    expected = (2 * written_out(decoder().state_dict(), unscaled) - 1).clamp(-1, 1)
    whole, _ = codec.decode_pixels(z, codec.initial_state(1))
    assert whole.shape == (1, 3, 13, 32, 32)
    torch.testing.assert_close(whole[0], expected, rtol=0, atol=1e-5)
    states, done = [codec.initial_state(1) for _ in range(3)], 0
    for t, frames in enumerate((1, 4, 4, 4)):
        for i in range(3):
            pixels, states[i] = codec.decode_pixels(z[:, t : t + 1], states[i])
            torch.testing.assert_close(pixels, whole[:, :, done : done + frames], rtol=0, atol=1e-5)
        done += frames


def test_the_published_keys_and_shapes() -> None:
    with torch.device("meta"):
        state = FastDecoder(48).state_dict()
    blocks = [*range(3, 6), *range(9, 12), *range(15, 18)]
    keys = {f"decoder.{i}.conv.{j}.{k}" for i in blocks for j in (0, 2, 4) for k in ("weight", "bias")}
    keys |= {f"decoder.{i}.{k}" for i in (1, 22) for k in ("weight", "bias")}
    keys |= {f"decoder.{i}.weight" for i in (8, 14, 20)} | {f"decoder.{i}.conv.weight" for i in (7, 13, 19)}
    assert set(state) == keys
    assert state["decoder.1.weight"].shape == (256, 48, 3, 3)
    assert state["decoder.13.conv.weight"].shape == (256, 128, 1, 1)
    assert state["decoder.22.weight"].shape == (12, 64, 3, 3)


def test_files_are_strict(tmp_path: Path) -> None:
    state, file = decoder().state_dict(), tmp_path / "taew2_2.pth"
    wide = torch.cat((torch.zeros(8, 8, 1, 1), state["decoder.7.conv.weight"]))
    torch.save({**state, "decoder.7.conv.weight": wide, "encoder.0.weight": torch.zeros(1)}, file)
    loaded = load_fast_decoder(file, 3, SMALL).state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in state.items())
    del state["decoder.1.bias"]
    torch.save({**state, "x": torch.zeros(1), "decoder.22.bias": torch.zeros(3)}, file)
    with pytest.raises(CheckpointError) as error:
        load_fast_decoder(file, 3, SMALL)
    for words in ("missing: decoder.1.bias", "unexpected: x", "wrong shape: decoder.22.bias"):
        assert words in str(error.value)
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="truncated"):
        load_fast_decoder(file, 3, SMALL)


def test_a_world_decodes_with_it(tmp_path: Path) -> None:
    world = WorldModel.load(write_wan_toy(tmp_path / "world"))
    torch.manual_seed(2)
    torch.save(FastDecoder(3).state_dict(), tmp_path / "taew2_2.pth")
    fast = world.with_fast_decoder(tmp_path / "taew2_2.pth")
    picture = np.random.default_rng(0).integers(0, 256, (2, 1, 32, 32, 3), dtype=np.uint8)
    results = {}
    for name, model in (("own", world), ("fast", fast)):
        state, seen = model.observe(model.initial_state([0, 1]), picture)
        state, chunk = model.step(state, np.zeros((2, 1), np.float32))
        results[name] = seen, chunk
    own, quick = results["own"], results["fast"]
    assert torch.equal(own[0].log_prob, quick[0].log_prob) and torch.equal(own[1].latent, quick[1].latent)
    assert quick[1].frames.shape == (2, 4, 32, 32, 3) and not torch.equal(own[1].frames, quick[1].frames)
    fast.save_state(state, tmp_path / "state.safetensors")
    again, _ = fast.step(fast.load_state(tmp_path / "state.safetensors"), np.ones((2, 1), np.float32))
    expected, _ = fast.step(state, np.ones((2, 1), np.float32))
    assert all(torch.equal(v, again.codec[k]) for k, v in expected.codec.items())
    with pytest.raises(CheckpointError, match="does not fit"):
        world.load_state(tmp_path / "state.safetensors")
    with pytest.raises(InputError, match="codec of its own"):
        WorldModel.load("pendulum").with_fast_decoder(tmp_path / "taew2_2.pth")
