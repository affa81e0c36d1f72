"""Sessions under prompts: switches, windows past the first frame, the empty prompt's past, batches, files."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.sessions import same_chunk
from tests.toy import TEXT, TOLD, toy_world, write_toy
from worldmodel import prompted
from worldmodel.errors import CheckpointError, ConfigError, InputError
from worldmodel.files import read_json, write_json
from worldmodel.flow import window
from worldmodel.flow.affine import standard_normal_log_prob
from worldmodel.sampling import Sampling
from worldmodel.state import WorldState
from worldmodel.world import Chunk, WorldModel

pytest.importorskip("transformers")

GUIDED = Sampling(guidance=2.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> WorldModel:
    """Prompts only; windows of 6 chunks, re-encoded to 3."""
    return toy_world(tmp_path_factory.mktemp("told") / "toy", TEXT)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> WorldModel:
    """Prompts and a torque."""
    return toy_world(tmp_path_factory.mktemp("told") / "both", TOLD)


def run(
    world: WorldModel, state: WorldState, prompts: list[str | None], sampling: Sampling | None = None
) -> tuple[WorldState, list[Chunk]]:
    chunks = []
    for prompt in prompts:
        action = None if prompt is None else [prompt] * state.rows
        state, chunk = world.step(state, action, sampling)
        chunks.append(chunk)
    return state, chunks


def close(a: Chunk, b: Chunk, tolerance: float = 1e-4) -> None:
    for name in ("log_prob", "latent", "noise", "log_prob_map", "action_gain"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=tolerance, atol=tolerance)


def history(state: WorldState, frames: int) -> Tensor:
    return state.context.u[:, -frames:]


def densities(world: WorldModel, state: WorldState, caption: str, frames: int) -> float:
    """Nats of the last of a session's ``frames`` chunks given the others, in one pass over the clip."""
    assert world.prompts is not None
    u = history(state, frames)
    text = world.prompts([caption])
    x, log_det = world.flow.shallow_inverse(u, world.grid, 0.0, exact=True)[0], None
    _, log_det = world.flow.shallow_forward(x, world.grid)
    affine = world.flow.deep.clip_parameters(u, world.grid, text, None)
    elements = standard_normal_log_prob(affine.forward(u)) + affine.log_det() + log_det
    return float(elements[:, -1].double().sum())


def test_prompts_condition_what_comes(world: WorldModel) -> None:
    corgi, cat, none = (
        run(world, world.initial_state([0], [p]), [None])[1][0] for p in ("a corgi", "a cat", "")
    )
    assert not torch.equal(corgi.latent, cat.latent) and not torch.equal(corgi.latent, none.latent)
    assert same_chunk(none, run(world, world.initial_state([0]), [None])[1][0])
    again = run(world, world.initial_state([0], ["a corgi"]), ["a corgi"])[1][0]
    assert same_chunk(corgi, again)


def test_the_density_is_that_of_the_clip_under_its_prompt(world: WorldModel) -> None:
    state, chunks = run(world, world.initial_state([3], ["a corgi"]), [None] * 4)
    assert densities(world, state, "a corgi", 4) == pytest.approx(float(chunks[-1].log_prob), abs=1e-3)
    assert abs(densities(world, state, "a cat", 4) - float(chunks[-1].log_prob)) > 1e-3


@pytest.mark.parametrize("k", [1, 3, 5, 8])
@pytest.mark.parametrize("sampling", [Sampling(), GUIDED], ids=["plain", "guided"])
def test_a_switch_at_step_k_changes_nothing_before_k(world: WorldModel, k: int, sampling: Sampling) -> None:
    _, plain = run(world, world.initial_state([5], ["a corgi"]), ["a corgi"] * 9, sampling)
    state, before = run(world, world.initial_state([5], ["a corgi"]), ["a corgi"] * k, sampling)
    after, later = run(world, state, ["a red cat"] * (9 - k), sampling)
    assert all(same_chunk(a, b) for a, b in zip(plain, before, strict=False))
    assert not torch.equal(plain[k].latent, later[0].latent)
    assert state.prompts == ("a corgi",) and after.prompts == ("a red cat",)
    # and from k on the past is the last frames' u under the new prompt, with an exact likelihood
    kept = min(state.context.frames[0], 3)
    assert int(later[0].context_frames) == kept
    caption = "a red cat" if kept == k else "(extend) a red cat"
    new, _ = run(world, state, ["a red cat"], sampling)
    assert torch.equal(history(new, kept + 1)[:, :-1], history(state, kept))
    assert densities(world, new, caption, kept + 1) == pytest.approx(float(later[0].log_prob), abs=1e-3)


def test_the_same_prompt_again_costs_nothing(world: WorldModel, monkeypatch: pytest.MonkeyPatch) -> None:
    state, _ = run(world, world.initial_state([0, 1], ["a corgi", "a cat"]), [None] * 2)
    assert world.prompt(state, ["a corgi", "a cat"]) is state
    for module in (prompted, window):
        monkeypatch.setattr(module, "reencode", None)
    world.step(state, ["a corgi", "a cat"])


def test_a_switch_of_one_session_leaves_its_neighbours(world: WorldModel) -> None:
    state, _ = run(world, world.initial_state([0, 1, 2], ["a corgi", "a cat", "a dog"]), [None] * 2)
    switched = world.prompt(state, ["a corgi", "a red cat", "a dog"])
    assert switched.prompts == ("a corgi", "a red cat", "a dog")
    _, together = world.step(switched)
    _, untouched = world.step(state)
    for i in (0, 2):
        assert torch.allclose(together.latent[i], untouched.latent[i], atol=1e-5)
    _, alone = world.step(state.select([1]), ["a red cat"])
    assert torch.allclose(together.latent[1], alone.latent[0], atol=1e-5)
    assert not torch.allclose(together.latent[1], untouched.latent[1], atol=1e-3)


@pytest.mark.parametrize("context", ["reencode", "rolling"])
def test_windows_without_the_first_frame_say_so(world: WorldModel, context: Any) -> None:
    assert world.prompts is not None
    state, _ = run(world, world.initial_state([0], ["a corgi"]), [None] * 6, Sampling(context=context))
    assert torch.equal(state.context.text, world.prompts(["a corgi"]))
    later, _ = run(world, state, [None], Sampling(context=context))
    assert torch.equal(later.context.text, world.prompts(["(extend) a corgi"]))
    assert later.prompts == ("a corgi",) and world.prompt(later, ["a corgi"]) is later
    if context == "reencode":
        assert densities(world, later, "(extend) a corgi", 4) == pytest.approx(
            float(later.log_prob - state.log_prob), abs=1e-3
        )


def test_a_world_that_never_saw_the_prefix_does_without(tmp_path: Path) -> None:
    path = write_toy(tmp_path / "toy", TEXT)
    data = read_json(path / "world.json")
    write_json(path / "world.json", {**data, "text": {**data["text"], "extend": False}})
    other = WorldModel.load(path)
    assert other.prompts is not None
    state, _ = run(other, other.initial_state([0], ["a corgi"]), [None] * 7)
    assert torch.equal(state.context.text, other.prompts(["a corgi"]))


def test_the_past_under_the_empty_prompt_written_late_is_the_one_kept_all_along(world: WorldModel) -> None:
    always = world.with_sampling(GUIDED)
    early = always.initial_state([4], ["a corgi"])
    late = world.initial_state([4], ["a corgi"])
    assert early.context.uncond is not None and late.context.uncond is None
    pictures = np.random.default_rng(0).integers(0, 256, (1, 8, *world.frames_shape), dtype=np.uint8)
    early, _ = always.observe_clip(early, pictures, None)
    late, _ = world.observe_clip(late, pictures, None)
    a, b = always.step(early)[1], world.step(late, None, GUIDED)[1]
    close(a, b)
    assert a.guided_log_prob is not None and float(a.action_gain) != 0.0


def test_a_guided_sampler_scores_and_observes_as_it_steps(both: WorldModel) -> None:
    action = {"prompt": ["a corgi"], "action": np.ones((1, 1), np.float32)}
    state, _ = both.step(both.initial_state([0], ["a corgi"]), action)  # no past under the empty prompt
    exact = replace(GUIDED, tolerance=0.0)
    stepped, chunk = both.step(state, action, exact)
    noise = both.infer_noise(state, chunk.latent, action, exact)
    again, _ = both.step(state, action, exact, noise=noise)
    torch.testing.assert_close(
        again.noisy[:, -1:], both.flow.tokens(chunk.latent[:, None]), rtol=0, atol=1e-4
    )
    observed, seen = both.observe(state, chunk.frames, action, exact)
    WorldState.concat([stepped, observed])  # of one form
    ready = both.with_sampling(exact).adopt(state)
    _, known = both.observe(ready, chunk.frames, action, exact)
    close(seen, known)


@pytest.mark.parametrize("told", [False, True], ids=["prompt", "prompt and action"])
def test_the_gain_is_over_the_empty_prompt_and_no_action(
    world: WorldModel, both: WorldModel, told: bool
) -> None:
    chosen = (both if told else world).with_sampling(GUIDED)
    torques = np.random.default_rng(0).uniform(-2, 2, (4, 1, 1)).astype(np.float32)

    def action(t: int, prompt: str) -> Any:
        return {"prompt": [prompt], "action": torques[t]} if told else [prompt]

    state, bare = chosen.initial_state([4], ["a corgi"]), chosen.initial_state([4], [""])
    pictures = np.random.default_rng(1).integers(0, 256, (4, 1, *chosen.frames_shape), dtype=np.uint8)
    for t in range(4):
        last = t == 3
        state, chunk = chosen.observe(state, pictures[t], action(t, "a corgi"))
        bare, plain = chosen.observe(bare, pictures[t], None if last else action(t, ""))
    assert float(chunk.action_gain) == pytest.approx(float(chunk.log_prob - plain.log_prob), abs=1e-3)
    assert abs(float(chunk.action_gain)) > 1e-2


def test_without_guidance_the_gain_of_a_prompt_is_not_computed(world: WorldModel, both: WorldModel) -> None:
    _, (chunk,) = run(world, world.initial_state([0], ["a corgi"]), ["a cat"])
    assert chunk.action_gain.tolist() == [0.0] and chunk.guided_log_prob is None
    action = {"prompt": ["a corgi"], "action": np.ones((1, 1), np.float32)}
    state, first = both.step(both.initial_state([0], ["a corgi"]), action)
    _, quiet = both.step(both.initial_state([0], ["a corgi"]), None, noise=first.noise)
    assert float(first.action_gain) != 0.0 and float(quiet.action_gain) == 0.0


def test_sessions_of_unlike_lengths_and_prompts_share_a_batch(world: WorldModel) -> None:
    always = world.with_sampling(GUIDED)
    states = [
        run(always, always.initial_state([i], [p]), [None] * n)[0]
        for i, (p, n) in enumerate([("a corgi", 1), ("", 5), ("a cat", 7)])
    ]
    joined = WorldState.concat(states)
    assert joined.prompts == ("a corgi", "", "a cat")
    for _ in range(2):
        joined, chunk = always.step(joined)
        for i in range(3):
            states[i], alone = always.step(states[i])
            picked = Chunk(**{f.name: getattr(chunk, f.name)[i : i + 1] for f in fields(Chunk)})
            close(picked, alone)


def test_guided_and_unguided_sessions_do_not_join(world: WorldModel) -> None:
    plain = world.initial_state([0])
    guided = world.with_sampling(GUIDED).initial_state([0])
    with pytest.raises(InputError, match="past under the empty prompt.*step the others with guidance"):
        WorldState.concat([plain, guided])
    ready = world.adopt(guided)
    assert WorldState.concat([plain, ready]).rows == 2
    assert world.with_sampling(GUIDED).adopt(plain).context.uncond is not None
    assert world.adopt(plain) is plain


def test_fork_select_save_and_load(world: WorldModel, tmp_path: Path) -> None:
    always = world.with_sampling(GUIDED)
    state, _ = run(always, always.initial_state([0, 1], ["a corgi", "a cat"]), [None] * 2)
    children = state.fork(2)
    assert children.prompts == ("a corgi", "a corgi", "a cat", "a cat")
    assert children.select([3, 0]).prompts == ("a cat", "a corgi")
    world.save_state(state, tmp_path / "state")
    loaded = always.load_state(tmp_path / "state")
    assert loaded.prompts == state.prompts
    for prompts in (["a corgi", "a cat"], ["a dog", "a cat"]):
        assert same_chunk(always.step(loaded, prompts)[1], always.step(state, prompts)[1])
    assert world.load_state(tmp_path / "state").context.uncond is None  # this world's sampler does without
    world.save_state(replace(state, prompts=("a corgi",)), tmp_path / "bad")
    with pytest.raises(CheckpointError, match="not a saved world state"):
        world.load_state(tmp_path / "bad")


def test_score_and_observe_take_prompts_and_change_nothing(world: WorldModel) -> None:
    state, chunks = run(world, world.initial_state([0], ["a corgi"]), [None] * 2)
    frames = chunks[-1].frames
    text = state.context.text
    corgi, cat = world.score(state, frames, ["a corgi"]), world.score(state, frames, ["a cat"])
    assert torch.equal(state.context.text, text) and state.prompts == ("a corgi",)
    assert float(corgi.log_prob) != float(cat.log_prob)
    after, chunk = world.observe(state, frames, ["a cat"])
    assert after.prompts == ("a cat",) and float(chunk.log_prob) == pytest.approx(
        float(cat.log_prob), abs=1e-4
    )


def test_the_banks_captions_hold_unless_others_are_given(world: WorldModel, both: WorldModel) -> None:
    state, _ = world.reset([0, 1], starts=[2, 3])
    assert state.prompts == tuple(world.starts["actions"][2:4, -1])
    assert world.reset([0], prompts=["a corgi"])[0].prompts == ("a corgi",)
    assert both.reset([0, 1], prompts=["a corgi", "a cat"])[0].prompts == ("a corgi", "a cat")
    state, _ = both.reset([0])
    assert state.prompts is not None and state.prompts[0] in both.starts["actions/prompt"][:, -1]


BAD: list[tuple[Any, str]] = [
    ("a corgi", "of type str, expected 1 prompts"),
    ([3], "expected 1 prompts"),
    (["a", "b"], "2 prompts for 1 sessions"),
    (["x" * 65], "65 characters, expected at most 64"),
    (np.zeros((1, 1), np.float32), "expected 1 prompts"),
]


@pytest.mark.parametrize(("action", "message"), BAD)
def test_bad_prompts_are_one_line_errors(world: WorldModel, action: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        world.step(world.initial_state([0]), action)
    assert "\n" not in str(error.value)


def test_bad_actions_with_prompts(both: WorldModel) -> None:
    state = both.initial_state([0])
    for action in ({"action": np.zeros((1, 1))}, ["a"], {"prompt": ["a"]}):
        with pytest.raises(InputError, match="dict with keys"):
            both.step(state, action)


def test_prompts_need_a_world_that_takes_them(tmp_path: Path, world: WorldModel) -> None:
    plain = toy_world(tmp_path / "plain")
    with pytest.raises(InputError, match="takes no prompts"):
        plain.initial_state([0], ["a corgi"])
    with pytest.raises(InputError, match="takes no prompts"):
        plain.prompt(plain.initial_state([0]), ["a corgi"])
    with pytest.raises(InputError, match="a sequence of 1 strings"):
        world.initial_state([0], "a corgi")
    path = write_toy(tmp_path / "mute", TEXT)
    data = read_json(path / "world.json")
    write_json(path / "world.json", {**data, "text": None})
    with pytest.raises(ConfigError, match="text"):
        WorldModel.load(path)
