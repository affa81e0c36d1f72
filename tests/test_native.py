"""The kernels compute what torch does: in every build that this processor runs, and a row whatever is beside it."""

from __future__ import annotations

import copy
import ctypes
import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.toy import randomise, toy_flow, toy_world
from worldmodel import native
from worldmodel.codec.conv import ConvCodec, ConvCodecConfig, channels_last
from worldmodel.errors import InputError, WorldModelError
from worldmodel.flow.cache import KVCache, Page
from worldmodel.flow.context import Context
from worldmodel.flow.flow import Flow, Imagined
from worldmodel.packed import Perceptron, narrow, pack
from worldmodel.world import WorldModel

BUILDS = {build for builds in native.LEVELS.values() for build in builds}


@pytest.fixture(params=sorted(BUILDS))
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """Each build in turn, in place of the best."""
    if request.param not in native.LEVELS.get(torch.backends.cpu.get_cpu_capability(), ()):
        pytest.skip("this processor does not run it")
    found = importlib.util.find_spec(f"worldmodel.native.{request.param}")
    if found is None or found.origin is None:
        pytest.skip("not built: no gcc when the package was installed")
    library = ctypes.CDLL(found.origin)
    if not library.worldmodel_usable():
        pytest.skip("this processor or system has no matrix unit for it")
    monkeypatch.setattr(native, "_found", lambda: (request.param, library))
    return library


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SHAPES = {
    "toy": {},
    "odd": {"in_channels": 5, "channels": 48, "top_channels": 80, "head_dim": 16, "denoiser_window": 2},
    "patches": {"in_channels": 2, "patch_size": 2, "layers_per_block": (2, 1, 1, 3), "denoiser_layers": 3},
    "bare": {"action_features": 0, "final_norm": False, "soft_clip": 0.0, "denoiser_layers": 1},
}


@torch.no_grad()
def round_to(module: nn.Module, stored: str) -> None:
    """Weights that this type represents, in place."""
    for weight in module.parameters():
        weight.copy_({"float32": weight, "float16": weight.half(), "bfloat16": narrow(weight)}[stored])


def both(seed: int, stored: str, **overrides: object) -> tuple[Flow, Flow]:
    """One flow for the kernels and for torch, its weights moderate."""
    plain = toy_flow(seed, **overrides)
    round_to(plain, stored)
    packed = copy.deepcopy(plain)
    pack(packed)
    assert packed.native is not None and packed.denoiser is not None and packed.denoiser.keeps
    return packed, plain


def size(flow: Flow) -> tuple[int, int]:
    """Tokens of a frame of 4 x 4 latent cells at most, and their dimensions."""
    return 4, flow.config.token_dim


def acts(flow: Flow, rows: int, frames: int, seed: int) -> Tensor | None:
    return draw(rows, frames, flow.config.action_features, seed=seed) if flow.config.action_features else None


def past(flow: Flow, lengths: list[int], fork: int = 1) -> Context:
    """Sessions of several lengths in one batch, their K/V written by this flow."""
    parts = []
    for row, length in enumerate(lengths):
        context = flow.deep.start(1, (2, 2), 6, features=flow.config.action_features)
        for t in range(length):
            u = draw(1, 1, *size(flow), seed=100 * row + t)
            context = flow.deep.append(flow.deep.reserve(context), u, acts(flow, 1, 1, 7 * row + t))
        parts.append(context)
    return Context.concat(parts).fork(fork)


def imagined(flow: Flow, lengths: list[int], fork: int = 1) -> Imagined:
    rows = len(lengths) * fork
    action = acts(flow, rows, 1, 51)
    w = draw(rows, *size(flow), seed=50)
    return flow.imagine(past(flow, lengths, fork), w, action, 0.0, 0.0, want_unconditional=action is not None)


def near(a: Tensor, b: Tensor, tolerance: float = 2e-4) -> bool:
    return bool(((a - b).abs() <= tolerance * (1 + b.abs())).all())


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("overrides", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    ("lengths", "fork"), [([0], 1), ([3, 3], 1), ([0, 2, 5, 1], 1), ([4], 3), ([1, 2], 2)], ids=str
)
@torch.no_grad()
def test_a_frame_is_torchs(
    kernels: ctypes.CDLL, stored: str, overrides: dict[str, object], lengths: list[int], fork: int
) -> None:
    packed, plain = both(3, stored, **overrides)
    ours, theirs = imagined(packed, lengths, fork), imagined(plain, lengths, fork)
    assert near(ours.u, theirs.u) and near(ours.x, theirs.x) and near(ours.log_det, theirs.log_det)
    assert all(near(a, b) for a, b in zip(ours.terms.maps, theirs.terms.maps, strict=True))
    assert ours.context.frames == theirs.context.frames == [n + 1 for n in lengths for _ in range(fork)]
    for a, b in zip(ours.context.cache.cohorts, theirs.context.cache.cohorts, strict=True):
        assert near(a.segments[-1].kv[..., -4:, :], b.segments[-1].kv[..., -4:, :])
    # and the frame goes back to its noise, through passes over known tokens
    u, log_det = packed.shallow_forward(ours.x, (2, 2))
    assert near(u, ours.u) and near(log_det, ours.log_det)
    action = acts(packed, len(ours.x), 1, 51)
    context = packed.deep.reserve(past(packed, lengths, fork))
    _, terms = packed.deep.commit(context, u, action, want_unconditional=action is not None)
    assert all(near(a, b) for a, b in zip(ours.terms.maps, terms.maps, strict=True))


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
@pytest.mark.parametrize("overrides", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_a_row_is_the_same_whatever_is_beside_it(
    kernels: ctypes.CDLL, threads: int, overrides: dict[str, object], stored: str
) -> None:
    flow, _ = both(3, stored, **overrides)
    w, action = draw(70, *size(flow), seed=1), acts(flow, 70, 1, 2)
    begin, clips, told = past(flow, [3]).fork(70), draw(70, 5, *size(flow), seed=3), acts(flow, 70, 5, 4)

    def made(rows: int) -> list[Tensor]:
        context = flow.deep.reserve(begin.select(range(rows)))
        known = None if action is None else action[:rows]
        one = flow.imagine(context, w[:rows], known, 0.0, 0.0, want_unconditional=known is not None)
        assert flow.denoiser is not None
        noisy = clips[:rows]
        moves = None if told is None else told[:rows]
        score, kept = flow.denoiser.newest_and_kept(noisy, (2, 2), moves, [5] * rows, None)
        maps = [m[:, :1] for m in one.terms.maps]
        return [one.x[:1], one.u[:1], *maps, score[:1], kept[:1]]

    alone = made(1)
    for rows in (2, 3, 4, 5, 11, 13, 16, 33, 70):
        assert all(torch.equal(a, b) for a, b in zip(alone, made(rows), strict=True)), rows


@pytest.mark.parametrize("overrides", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_the_denoiser_is_torchs_and_what_it_keeps_spares_the_frames_before(
    kernels: ctypes.CDLL, overrides: dict[str, object]
) -> None:
    flow, plain = both(5, "bfloat16", **overrides)
    assert flow.denoiser is not None and plain.denoiser is not None
    reach, counts = flow.denoiser_reach, [1, 2, 9]
    clips = draw(3, 9, *size(flow), seed=6)
    features = acts(flow, 3, 9, 7)
    kept = None
    for t in range(1, 10):
        seen = [min(t, count) for count in counts]  # the last frames of the clip, right-aligned
        frames = min(max(seen), reach)
        noisy = clips[:, t - frames : t]
        known = None if features is None else features[:, t - frames : t]
        anew, whole = flow.denoiser.newest_and_kept(noisy, (2, 2), known, seen, None)
        valid = torch.arange(frames)[None] >= frames - torch.tensor(seen)[:, None]
        assert near(anew, plain.denoiser.newest_score(noisy, (2, 2), None, known, valid))
        if kept is not None and seen[0] == t:
            score, after = flow.denoiser.newest_and_kept(noisy, (2, 2), known, seen, kept)
            assert torch.equal(score, anew) and torch.equal(after, whole)
        kept = whole
    long = flow.denoiser.newest_and_kept
    _, kept = long(clips[2:, 3 : 3 + reach], (2, 2), None, [9], None)
    for t in range(3 + reach, 9):
        window = clips[2:, t + 1 - reach : t + 1]
        score, kept = long(window, (2, 2), None, [9], kept)
        assert torch.equal(score, long(window, (2, 2), None, [9], None)[0])


CODECS = {
    "toy": {"height": 32, "width": 48, "widths": (8, 16), "encoder_blocks": (1, 1), "decoder_blocks": (1, 2)},
    "wide": {"widths": (40, 24, 72), "latent_channels": 3, "frames": 2, "decoder_blocks": (0, 1, 2)},
    "one level": {
        "height": 36,
        "width": 20,
        "widths": (16,),
        "patch": 2,
        "frames": 1,
        "encoder_blocks": (0,),
        "decoder_blocks": (1,),
    },
}


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("config", CODECS.values(), ids=CODECS)
@torch.no_grad()
def test_frames_are_torchs_but_for_ties(
    kernels: ctypes.CDLL, threads: int, config: dict[str, object], stored: str
) -> None:
    torch.manual_seed(0)
    plain = ConvCodec(ConvCodecConfig(**config)).requires_grad_(False).eval()
    randomise(plain, 0)
    plain.background.uniform_(0, 255, generator=torch.Generator().manual_seed(1))
    round_to(plain, stored)
    packed = channels_last(copy.deepcopy(plain))
    pack(packed)
    assert packed.native is not None
    latents = draw(9, 1, *plain.config.latent_shape, seed=2)
    ours, theirs = packed.decode(latents, {})[0], plain.decode(latents, {})[0]
    different = (ours.int() - theirs.int()).abs()
    assert ours.float().std() > 5 and different.max() <= 1 and (different > 0).float().mean() < 1e-3
    for rows in (1, 2, 5):
        assert torch.equal(packed.decode(latents[:rows], {})[0], ours[:rows])


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("config", CODECS.values(), ids=CODECS)
@torch.no_grad()
def test_latents_are_torchs(
    kernels: ctypes.CDLL, threads: int, config: dict[str, object], stored: str
) -> None:
    torch.manual_seed(0)
    plain = ConvCodec(ConvCodecConfig(**config)).requires_grad_(False).eval()
    randomise(plain, 0)
    generator = torch.Generator().manual_seed(1)
    plain.background.uniform_(0, 255, generator=generator)
    plain.latent_mean.uniform_(-1, 1, generator=generator)
    plain.latent_std.uniform_(0.5, 2, generator=generator)
    round_to(plain, stored)
    packed = channels_last(copy.deepcopy(plain))
    pack(packed)
    shape = 9, 2 * plain.config.frames, *plain.background.shape[1:], 3
    frames = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    ours, theirs = packed.encode(frames, {})[0], plain.encode(frames, {})[0]
    assert ours.shape == theirs.shape == (9, 2, *plain.config.latent_shape)
    assert near(ours, theirs, 5e-5) and ours.std() > 0.1
    for rows in (1, 2, 5):
        assert torch.equal(packed.encode(frames[:rows], {})[0], ours[:rows])


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@torch.no_grad()
def test_perceptrons(kernels: ctypes.CDLL, stored: str) -> None:
    torch.manual_seed(0)
    for sizes in ((7, 5), (1, 33, 2), (65, 40, 100, 3), (20_000, 3)):
        plain = Perceptron(*sizes).requires_grad_(False)
        round_to(plain, stored)
        expected = nn.Sequential(
            *[m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.SiLU())][:-1]
        ).requires_grad_(False)
        expected.load_state_dict(plain.state_dict())
        packed = copy.deepcopy(plain)
        pack(packed)
        for shape in ((1,), (3,), (40,), (2, 5), (100,), (0,)):
            x = 30 * draw(*shape, sizes[0])
            y = packed(x)
            rounding = 1e-5 + 1e-8 * sizes[0]
            assert y.shape == (*shape, sizes[-1])
            assert near(y, expected(x), rounding) and near(y, plain(x), rounding)
        assert packed.least_rows == 1
        if isinstance(packed._kernel, native.NativePerceptron):
            with pytest.raises(ValueError, match="expected"):
                packed._kernel(draw(2, sizes[0] + 1))


@torch.no_grad()
def test_extreme_inputs_do_not_overflow(kernels: ctypes.CDLL) -> None:
    packed, plain = both(3, "bfloat16", soft_clip=0.0)
    for flow in (packed, plain):
        flow.deep.transformer.proj_out.weight.mul_(30)
        flow.pack() if flow is packed else None
    packed = copy.deepcopy(packed)
    ours, theirs = imagined(packed, [2, 2]), imagined(plain, [2, 2])
    assert (
        torch.isfinite(ours.x).all() and (theirs.terms.maps.sigma.max() / theirs.terms.maps.sigma.min()) > 100
    )
    assert near(ours.terms.maps.sigma[:, :, :, :1], theirs.terms.maps.sigma[:, :, :, :1], 2e-3)


def test_a_world_without_kernels_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native.library() is None:
        pytest.skip("no kernels")
    folder = tmp_path_factory.mktemp("world")
    fast = toy_world(folder / "toy")
    state, _ = fast.reset([1, 2])
    action = draw(2, 1).clamp(-1, 1).numpy()
    after, chunk = fast.step(state, action)
    assert fast.flow.native is not None and after.denoiser is not None
    monkeypatch.setattr(native, "_found", lambda: None)
    slow = type(fast).load(folder / "toy")
    other, same = slow.step(replace(state, denoiser=None), action)
    assert slow.flow.native is None and other.denoiser is None
    assert near(chunk.latent, same.latent) and near(chunk.log_prob, same.log_prob)
    assert (chunk.frames.int() - same.frames.int()).abs().max() <= 1
    # a state goes from one to the other
    _, onward = slow.step(after, action)
    assert near(onward.latent, fast.step(after, action)[1].latent, 1e-3)


@pytest.mark.parametrize("where", ["proj_in", "qkv", "out", "up", "down", "proj_out", "K/V"])
def test_what_is_not_a_number_is_never_a_likelihood(kernels: ctypes.CDLL, tmp_path: Path, where: str) -> None:
    """A clamp, a comparison or a maximum could take NaN for a number."""
    toy_world(tmp_path / "toy")
    world = WorldModel.load(tmp_path / "toy")
    state, _ = world.reset([1, 2])
    world.step(state, np.zeros((2, 1), np.float32))
    if where == "K/V":
        state.context.cache.cohorts[0].segments[-1].kv[0, 0, 1, 0, 2, 5] = float("nan")
    else:
        world = WorldModel.load(tmp_path / "toy")
        (weight, *_) = (
            p
            for name, p in world.flow.deep.transformer.named_parameters()
            if name.endswith(f"{where}.weight")
        )
        weight[1, 1] = float("nan")
    assert world.flow.native is not None
    with pytest.raises(WorldModelError, match="not finite; the state is unchanged"):
        world.step(state, np.zeros((2, 1), np.float32))


@torch.no_grad()
def test_keys_and_values_of_another_shape_are_refused(kernels: ctypes.CDLL) -> None:
    """Memory is read by these shapes: a file that was tampered with must not choose which."""
    flow, _ = both(3, "bfloat16")
    good = flow.deep.reserve(past(flow, [2]))
    w, action = draw(1, *size(flow)), acts(flow, 1, 1, 1)
    cohort = good.cache.cohorts[0]
    kv = cohort.segments[-1].page.kv
    alone = [block.alone(1, (2, 2)) for block in reversed(flow.shallow_blocks)]
    for bad in (kv[:1], kv[:, :1], kv[..., :16], kv.half(), kv[..., :11, :], kv.repeat(1, 1, 2, 1, 1, 1)):
        segment = replace(cohort.segments[-1], page=Page(bad, bad.shape[-2]))
        context = replace(good, cache=KVCache((replace(cohort, segments=(segment,)),)))
        for run in (
            lambda c=context: flow.native.invert(flow.deep.past(c, c.cache, 1), w, action[:, 0], 1, alone),
            lambda c=context: flow.deep.commit(c, w[:, None], action),
        ):
            with pytest.raises(InputError, match="K/V"):
                run()


def test_kernels_of_other_sources_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.library() is None:
        pytest.skip("no kernels")
    monkeypatch.setattr(native, "INTERFACE", -1)
    native._found.cache_clear()
    try:
        with pytest.warns(UserWarning, match="reinstall"):
            assert native.library() is None and native.build() is None
    finally:
        monkeypatch.undo()
        native._found.cache_clear()
    assert native.build() in ("AMX", "AVX-512", "AVX2")


def test_wide_transformers_are_left_to_torch() -> None:
    flow = toy_flow(0, channels=544, top_channels=544)
    pack(flow)
    assert flow.native is None and flow.deep.transformer.native is None
