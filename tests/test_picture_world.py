"""A world of pictures at a small size, with the real classes: text to a picture, its likelihood, and nothing after it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from envs import WorldModelEnv
from tests.sessions import same_chunk
from tests.toy import TEXT_TOKENS, write_picture_toy
from worldmodel.cli import app
from worldmodel.codec.kl import KLCodec
from worldmodel.denoising import by_score
from worldmodel.errors import InputError
from worldmodel.media import write_picture
from worldmodel.plan import plan
from worldmodel.sampling import Sampling
from worldmodel.state import WorldState
from worldmodel.tasks import Brief, chunks_for, run
from worldmodel.world import WorldModel

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
PROMPTS = ("a red corgi", "the cat sleeps", "")
GUIDED = Sampling(guidance=2.0)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_picture_toy(tmp_path_factory.mktemp("pictures") / "world")


@pytest.fixture(scope="module")
def world(path: Path) -> WorldModel:
    return WorldModel.load(path)


def pictures(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, 1, 32, 32, 3), dtype=np.uint8)


def test_a_chunk_is_a_picture(world: WorldModel) -> None:
    assert isinstance(world.codec, KLCodec) and world.flow.denoiser is None
    assert (world.first_frames, world.frames_shape, world.grid) == (1, (1, 32, 32, 3), (4, 4))
    state, chunk = world.step(world.initial_state([0, 1, 2], PROMPTS))
    assert chunk.frames.shape == (3, 1, 32, 32, 3) and chunk.frames.dtype == torch.uint8
    assert chunk.latent.shape == (3, 3, 4, 4) and chunk.frames.float().std() > 1
    assert torch.isfinite(chunk.log_prob).all() and (chunk.sweeps > 0).all()
    assert state.codec == {} and state.noisy.shape == (3, 1, 16, 3)
    assert torch.equal(chunk.frames, world.codec.decode(chunk.latent[:, None], {})[0])


def test_the_prompt_and_the_guidance_count(world: WorldModel) -> None:
    state = world.initial_state([7, 7, 7], PROMPTS)
    _, plain = world.step(state)
    _, guided = world.step(state, None, GUIDED)
    assert guided.guided_log_prob is not None and (guided.guided_log_prob != guided.log_prob)[:2].all()
    assert not torch.equal(plain.latent[0], plain.latent[1])
    moved = (plain.latent - guided.latent).abs().amax((1, 2, 3))
    assert (moved[:2] > 1e-3).all()
    assert moved[2] < 1e-4  # under the empty prompt there is nothing to guide away from


def test_an_imagined_picture_is_as_likely_as_it_says(world: WorldModel) -> None:
    """Its noise gives it again, and its density is that of the flow at the noisy latent."""
    begin = world.initial_state([1, 2], PROMPTS[:2])
    after, chunk = world.step(begin)
    _, again = world.step(begin, noise=chunk.noise)
    torch.testing.assert_close(again.latent, chunk.latent, rtol=0, atol=1e-3)
    assert world.prompts is not None
    density = world.flow(after.noisy, world.grid, world.prompts(PROMPTS[:2]))
    torch.testing.assert_close(density.log_prob[:, 0].double(), chunk.log_prob, rtol=0, atol=1e-2)


def test_a_given_picture_has_a_likelihood_under_a_prompt(world: WorldModel) -> None:
    begin, given = world.initial_state([1, 2], PROMPTS[:2]), pictures(2)
    score = world.score(begin, given, draws=3)
    assert score.log_prob.shape == (2,) and torch.isfinite(score.log_prob).all()
    assert score.log_prob_map.shape == (2, 4, 4)
    after, chunk = world.observe(begin, given)
    assert torch.equal(chunk.log_prob, world.score(begin, given).log_prob)
    assert torch.equal(chunk.frames, torch.from_numpy(given)) and after.steps.tolist() == [1, 1]
    latent, _ = world.codec.encode(torch.from_numpy(given), {})
    assert torch.equal(chunk.latent, latent[:, 0])
    other = world.score(world.initial_state([1, 2], PROMPTS[1::-1]), given)
    assert (other.log_prob != score.log_prob).all()


def test_nothing_comes_after_a_picture(world: WorldModel) -> None:
    state, chunk = world.step(world.initial_state([0], PROMPTS[:1]))
    before = state.log_prob.clone()
    for call in (
        lambda: world.step(state),
        lambda: world.observe(state, pictures(1)),
        lambda: world.score(state, pictures(1)),
        lambda: world.score(state, chunk.latent),
        lambda: world.step(WorldState.concat((state, world.initial_state([1], PROMPTS[:1])))),
        lambda: world.rollout(world.initial_state([0], PROMPTS[:1]), np.array([["a", "b"]])),
    ):
        with pytest.raises(
            InputError, match="kl-toy makes pictures: nothing comes after one; begin another"
        ) as e:
            call()
        assert "\n" not in str(e.value)
    assert torch.equal(state.log_prob, before)


def test_a_session_is_like_any_other(world: WorldModel, tmp_path: Path) -> None:
    begin = world.initial_state([4], PROMPTS[:1])
    world.save_state(begin, tmp_path / "state")
    _, chunk = world.step(begin)
    _, loaded = world.step(world.load_state(tmp_path / "state"))
    same_chunk(chunk, loaded)
    _, forked = world.step(begin.fork(3))
    torch.testing.assert_close(forked.latent[:1], chunk.latent, rtol=0, atol=1e-4)
    assert (forked.latent[1:] - chunk.latent).abs().amax((1, 2, 3)).min() > 1e-2
    with_others, _ = world.step(world.initial_state([9, 4, 8], (PROMPTS[1], PROMPTS[0], PROMPTS[2])))
    torch.testing.assert_close(with_others.latent[1:2], chunk.latent, rtol=0, atol=1e-4)


def test_noise_is_taken_off(world: WorldModel) -> None:
    """Pixels are those of the latent without noise, towards where the picture is likelier."""
    begin = world.initial_state([1], PROMPTS[:1])
    after, chunk = world.step(begin)
    clean = by_score(world.flow, world.grid, after)
    torch.testing.assert_close(world.flow.tokens(chunk.latent[:, None]), clean, rtol=0, atol=1e-6)
    text = after.context.text
    there, here = (world.flow(x, world.grid, text).log_prob.item() for x in (clean, after.noisy))
    assert there > here + 1


def test_other_sizes(world: WorldModel) -> None:
    wide = world.at((16, 48))
    assert wide.grid == (2, 6)
    _, chunk = wide.step(wide.initial_state([0], PROMPTS[:1]))
    assert chunk.frames.shape == (1, 1, 16, 48, 3)


def test_as_an_environment_it_shows_a_picture_and_goes_no_further(world: WorldModel) -> None:
    env = WorldModelEnv(world)
    observation, info = env.reset(seed=0, options={"prompt": PROMPTS[0]})
    assert observation.shape == (1, 32, 32, 3) and np.isfinite(info["log_prob"])
    with pytest.raises(InputError, match="nothing comes after one"):
        env.step(PROMPTS[1])
    again, _ = env.reset(seed=0, options={"prompt": PROMPTS[0]})
    assert np.array_equal(again, observation)


# ---- tasks, commands, plan ---------------------------------------------------------------------------------
def test_text_to_image_is_the_only_task(world: WorldModel) -> None:
    frames, record = run(world, Brief("a red corgi", seed=2))
    assert frames.shape == (1, 32, 32, 3) and record["task"] == "text-to-image" and record["complete"]
    assert len(record["chunks"]) == 1 and json.loads(json.dumps(record, allow_nan=False)) == record
    for brief in (
        Brief(image=pictures(1)[0, 0]),
        Brief(clip=pictures(1)[0]),
        Brief(source=pictures(1)[0]),
        Brief(chunks=2),
    ):
        with pytest.raises(InputError, match="makes one picture of a prompt"):
            run(world, brief)
    with pytest.raises(InputError, match="no video"):
        chunks_for(world, 1.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--out", "x.mp4"), "x.mp4: expected a name that ends in one of .png, .jpg"),
        (("--image", "given.png"), "leave --image, --video and --v2v out"),
        (("--video", "given.png"), "leave --image, --video and --v2v out"),
        (("--chunks", "2"), "makes one picture of a prompt"),
        (("--seconds", "2"), "is no video"),
    ],
)
def test_the_command_refuses_what_is_no_picture(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_picture(tmp_path / "given.png", pictures(1)[0, 0])
    done = CliRunner().invoke(app, ["generate", str(path), "--prompt", "a cat", *arguments])
    assert isinstance(done.exception, InputError) and words in str(done.exception)
    assert [p.name for p in tmp_path.iterdir()] == ["given.png"]


def test_what_is_planned_is_what_is_taken(path: Path, world: WorldModel) -> None:
    counted = plan(world.spec)
    assert sum(counted.weights.values()) == sum(
        t.nbytes for m in (world.flow, world.codec) for t in m.state_dict().values()
    )
    state, _ = world.step(world.initial_state([0], PROMPTS[:1]))
    assert state.context.cache.nbytes == counted.kv_window
    kept = (state.noisy, state.latent, state.context.u, state.context.text)
    assert sum(t.nbytes for t in kept if t is not None) == counted.denoiser_state
    assert counted.codec_state == counted.reencoding == 0
    shown = CliRunner().invoke(app, ["info", str(path), "--plan"])
    assert shown.exit_code == 0 and "to differentiate the density, in place of a denoiser" in shown.output


@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.75), ("bfloat16", 0.5)])
def test_the_score_keeps_about_what_is_planned(tmp_path: Path, dtype: str, least: float) -> None:
    """Bytes that autograd holds on to for the backward pass, the weights apart. In bfloat16 CPUs need less than GPUs."""
    wide = {"channels": 128, "top_channels": 256, "head_dim": 64}
    world = WorldModel.load(write_picture_toy(tmp_path / "wide", dtype=dtype, **wide)).at((128, 128))
    assert world.flow.config.text_tokens == TEXT_TOKENS
    state, _ = world.observe(
        world.initial_state([0], PROMPTS[:1]), np.zeros((1, 1, 128, 128, 3), dtype=np.uint8)
    )
    weights = {p.untyped_storage().data_ptr() for p in world.flow.parameters()}
    held: dict[int, torch.UntypedStorage] = {}

    def hold(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x):
        by_score(world.flow, world.grid, state)
    measured, planned = sum(s.nbytes() for s in held.values()), plan(world.spec).score
    assert least * planned < measured < 1.25 * planned, (measured, planned)
