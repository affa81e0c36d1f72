"""Training the codec on a moving square: it learns, resumes, exports, and encodes a dataset."""

import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces

from worldmodel.codec.conv import ConvCodec, ConvCodecConfig
from worldmodel.condition.spaces import space_to_json
from worldmodel.errors import ConfigError, DataError
from worldmodel.files import load_tensors, write_json
from worldmodel.training.codec import (
    CodecStage,
    CodecTraining,
    encode_dataset,
    load_latents,
    load_trained_codec,
    measure_codec,
    median_background,
    pendulum_codec,
    train_codec,
)
from worldmodel.training.episodes import Episode, EpisodeDataset, episode_path, save_episode
from worldmodel.training.loop import Interrupted, LoopConfig

TINY = CodecTraining(
    model=ConvCodecConfig(
        16, 16, latent_channels=4, widths=(16, 32), encoder_blocks=(1, 1), decoder_blocks=(1, 1)
    ),
    loop=LoopConfig(steps=150, lr=3e-3, warmup=10),
    batch=16,
    bf16=False,
    threads=1,
)


def square(index: int, chunks: int = 6) -> Episode:
    """A dark square that goes around the picture."""
    rng = np.random.default_rng(index)
    angle = rng.uniform(0, 6.28) + rng.uniform(-0.4, 0.4) * np.arange(1 + 4 * chunks)
    frames = np.full((len(angle), 16, 16, 3), 240, dtype=np.uint8)
    for frame, a in zip(frames, angle, strict=True):
        row, column = int(7 + 5 * np.sin(a)), int(7 + 5 * np.cos(a))
        frame[row : row + 3, column : column + 3] = 30
    zeros = np.zeros(chunks, dtype=bool)
    actions = rng.normal(size=(chunks, 1)).astype(np.float32)
    return Episode(frames, actions, actions[:, 0], zeros, zeros, angle[:, None].astype(np.float32), {})


def write_dataset(folder: Path, episodes: int, chunks: int = 6) -> EpisodeDataset:
    for index in range(episodes):
        save_episode(episode_path(folder, index), square(index, chunks))
    info = {
        "format_version": 1,
        "episodes": episodes,
        "frame_skip": 4,
        "frame_size": [16, 16],
        "fps": 20.0,
        "complete": True,
    }
    write_json(folder / "dataset.json", info | {"action_space": space_to_json(spaces.Box(-9, 9, (1,)))})
    return EpisodeDataset.open(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("squares"), 30).folder


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train_codec(TINY, data, folder)
    return folder


def test_it_learns_past_the_background_and_bears_noise(data: Path, trained: Path) -> None:
    split = EpisodeDataset.open(data).split("test")
    background = median_background(split)
    assert (background == 240).all()
    frames = np.concatenate([split.episode(i).frames for i in split.indices]).astype(np.float64)
    nothing = 10 * np.log10(255**2 / np.square(frames - 240).mean())
    quality = measure_codec(load_trained_codec(trained), split)
    assert quality["psnr"] > nothing + 3
    assert (
        quality["psnr"] + 0.2 >= quality["psnr_noise_0.05"] >= quality["psnr_noise_0.1"] - 0.1 > nothing + 2
    )
    assert 0 < quality["motion"] < 2


def test_episodes_of_one_chunk_have_no_motion_to_measure(trained: Path, tmp_path: Path) -> None:
    """It was NaN, which no JSON holds, so a trained codec could not be written."""
    codec, dataset = load_trained_codec(trained), write_dataset(tmp_path, 20)
    alone = measure_codec(codec, dataset.split("test"))["motion"]
    save_episode(episode_path(tmp_path, 18), square(99, chunks=1))
    save_episode(episode_path(tmp_path, 19), square(19))
    two = measure_codec(codec, dataset.split("test"))
    save_episode(episode_path(tmp_path, 18), square(19))
    assert two["motion"] == measure_codec(codec, dataset.split("test"))["motion"] != alone
    for index in (18, 19):
        save_episode(episode_path(tmp_path, index), square(99, chunks=1))
    none = measure_codec(codec, dataset.split("test"))
    assert "motion" not in none and np.isfinite(list(none.values())).all() and none["chunks"] == 2


def test_the_export_is_half_precision_and_standardised(data: Path, trained: Path) -> None:
    stored = load_tensors(trained / "codec.safetensors")
    assert {t.dtype for n, t in stored.items() if n.endswith(("weight", "bias"))} == {torch.float16}
    codec, dataset = load_trained_codec(trained), EpisodeDataset.open(data)
    encode_dataset(codec, dataset, trained / "latents.safetensors")
    episodes = load_latents(trained / "latents.safetensors")
    assert len(episodes) == 30
    latents = torch.stack([episode.latents for episode in episodes])
    assert latents.shape == (30, 6, 4, 2, 2) and latents.dtype == torch.float32
    assert latents[:27].mean(dim=(0, 1)).abs().max() < 0.2 and abs(latents[:27].square().mean() - 1) < 0.1
    direct, _ = codec.encode(torch.from_numpy(dataset.episode(7).frames[None, 5:9]), {})
    assert torch.allclose(direct[0, 0], episodes[7].latents[1], atol=1e-4)
    assert np.array_equal(episodes[7].actions, dataset.episode(7).actions)
    assert np.array_equal(episodes[7].rewards, dataset.episode(7).rewards)
    assert episodes[7].terminated.dtype == torch.bool


def test_an_interrupted_training_goes_on_to_the_same_weights(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(TINY, loop=replace(TINY.loop, steps=6))
    whole = train_codec(short, data, tmp_path / "whole")
    backward, calls = CodecStage.backward, [0]

    def interrupting(self: CodecStage, *arguments: object) -> object:
        calls[0] += 1
        if calls[0] == 3:
            signal.raise_signal(signal.SIGTERM)
        return backward(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(CodecStage, "backward", interrupting)
    with pytest.raises(Interrupted):
        train_codec(short, data, tmp_path / "parts")
    assert not (tmp_path / "parts" / "codec.safetensors").exists()
    assert train_codec(short, data, tmp_path / "parts")["test"] == whole["test"]
    weights = [load_tensors(tmp_path / name / "codec.safetensors") for name in ("whole", "parts")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_pairs_are_one_frame_apart_and_a_function_of_the_rng(data: Path) -> None:
    stage = CodecStage(replace(TINY, still=0.0), EpisodeDataset.open(data).split("train"))
    first, second = stage.pairs(np.random.default_rng(0)).chunk(2)
    assert torch.equal(first[:, 1:], second[:, :-1])
    assert torch.equal(stage.pairs(np.random.default_rng(0)), torch.cat((first, second)))
    still = CodecStage(replace(TINY, still=1.0), stage.split).pairs(np.random.default_rng(0))
    assert all(torch.equal(still[:, 0], still[:, i]) for i in range(4))


def test_chunks_in_which_more_moves_are_drawn_more_often(data: Path) -> None:
    stage = CodecStage(
        replace(TINY, batch=400, still=0.0, motion=0.5), EpisodeDataset.open(data).split("train")
    )
    rng = np.random.default_rng(0)

    def change(frames: torch.Tensor) -> float:
        return float((frames[:, 1:].int() - frames[:, :-1].int()).abs().float().mean())

    mixed, even = stage.pairs(rng), CodecStage(replace(stage.config, motion=0.0), stage.split).pairs(rng)
    assert change(mixed[100:200]) > 1.1 * change(
        mixed[:100]
    )  # the second half of each half is drawn by motion
    assert change(mixed[:100]) == pytest.approx(change(even), rel=0.2)
    with pytest.raises(ConfigError, match="motion is -1"):
        replace(TINY, motion=-1.0)


def test_a_run_begins_with_the_codec_it_is_given(data: Path, tmp_path: Path) -> None:
    train_codec(TINY, data, tmp_path / "first")
    short = replace(TINY, loop=replace(TINY.loop, steps=1, lr=1e-6))
    train_codec(short, data, tmp_path / "second", load_trained_codec(tmp_path / "first"))
    first, second = (dict(load_trained_codec(tmp_path / n).named_parameters()) for n in ("first", "second"))
    assert all(torch.allclose(first[name], second[name], atol=1e-3) for name in first)
    other = replace(TINY, model=replace(TINY.model, latent_channels=3))
    with pytest.raises(ConfigError, match="codec to start with"):
        train_codec(other, data, tmp_path / "third", load_trained_codec(tmp_path / "first"))


def test_what_does_not_fit_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="change the codec's configuration"):
        train_codec(pendulum_codec(), data, tmp_path)
    with pytest.raises(ConfigError, match="batch must be even"):
        replace(TINY, batch=3)


def test_an_interrupted_encoding_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write_dataset(tmp_path / "data", 4, 40)  # longer than what is encoded at once
    codec, encode, calls = ConvCodec(TINY.model).eval(), ConvCodec.encode, []

    def stopping(self: ConvCodec, frames: torch.Tensor, state: dict) -> tuple:
        calls.append(frames.shape[1])
        if len(calls) == 7:
            raise KeyboardInterrupt
        return encode(self, frames, state)

    encode_dataset(codec, dataset, tmp_path / "whole.safetensors")
    monkeypatch.setattr("worldmodel.training.codec.SAVE_SECONDS", -1.0)
    monkeypatch.setattr(ConvCodec, "encode", stopping)
    with pytest.raises(KeyboardInterrupt):
        encode_dataset(codec, dataset, tmp_path / "again.safetensors")
    encode_dataset(codec, dataset, tmp_path / "again.safetensors")
    assert calls == [64, 64, 32] * 2 + [64] + [64, 64, 32] * 2
    whole, again = (load_tensors(tmp_path / f"{n}.safetensors") for n in ("whole", "again"))
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)
    assert not (tmp_path / "again.parts").exists()
    episode = dataset.episode(3).frames[None, 1:]
    together, _ = encode(codec, torch.from_numpy(episode), {})
    torch.testing.assert_close(whole["000003/latents"], together[0])


def told_by_one_linear_map(folder: Path, dataset: EpisodeDataset) -> float:
    """Share of the variance of the squares' places that is read off unseen latents, by least squares on the others."""
    encode_dataset(load_trained_codec(folder), dataset, folder / "latents.safetensors")
    latents = (
        torch.stack([e.latents for e in load_latents(folder / "latents.safetensors")]).flatten(2).double()
    )
    angles = torch.stack(
        [torch.from_numpy(dataset.episode(i).observations[4::4]) for i in range(30)]
    ).double()
    x = torch.cat((latents, torch.ones(*latents.shape[:2], 1)), dim=2)
    fit = torch.linalg.lstsq(x[:27].flatten(0, 1), angles[:27].flatten(0, 1)).solution
    missed = (x[27:] @ fit - angles[27:]).square().mean()
    return float(1 - missed / angles[27:].var())


def test_latents_tell_the_observation_where_that_is_asked(data: Path, trained: Path, tmp_path: Path) -> None:
    config, dataset = replace(TINY, observed=1.0, noise=0.3), EpisodeDataset.open(data)
    train_codec(config, data, tmp_path)
    stored = load_tensors(tmp_path / "codec.safetensors")
    assert set(stored) == set(load_tensors(trained / "codec.safetensors"))  # the readout stays behind
    assert told_by_one_linear_map(tmp_path, dataset) > told_by_one_linear_map(trained, dataset) + 0.05


def test_pictures_that_stand_still_tell_no_observation(data: Path, tmp_path: Path) -> None:
    stage = CodecStage(replace(TINY, observed=1.0, still=1.0), EpisodeDataset.open(data).split("train"))
    assert stage.readout is not None
    generator = torch.Generator().manual_seed(0)
    assert stage.backward(np.random.default_rng(0), generator, 0.0)["observed"] == 1.0
    for index in range(3):
        blind = square(index)._replace(observations=np.zeros((25, 0), dtype=np.float32))
        save_episode(episode_path(tmp_path, index), blind)
    write_json(tmp_path / "dataset.json", EpisodeDataset.open(data).info | {"episodes": 3})
    with pytest.raises(DataError, match="no observations"):
        CodecStage(replace(TINY, observed=1.0), EpisodeDataset.open(tmp_path).split("train"))
