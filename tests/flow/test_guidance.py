"""The guided sampler has an exact density of its own, and prompts stream as they sample. Float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.flow.helpers import GRID, draw, flow64, jacobian
from worldmodel.flow.affine import standard_normal_log_prob
from worldmodel.flow.context import Context
from worldmodel.flow.flow import Flow
from worldmodel.flow.window import make_room

TOKENS, DIM, FRAMES, WEIGHT = 4, 2, 3, 2.5
FLOW = flow64(seed=9)
TEXT_FLOW = flow64(seed=9, text_tokens=3, text_dim=5, layers_per_block=(1, 2), window=4, context=2)
TEXT, UNCOND = draw(2, 3, 5, seed=41), draw(2, 3, 5, seed=42)
FEATURES = draw(2, 9, 3, seed=43)


def past(flow: Flow, rows: int = 1, frames: int = 2, text: bool = False) -> Context:
    context = flow.deep.start(
        rows, GRID, 4, TEXT[:rows] if text else None, UNCOND[:rows] if text else None, features=3
    )
    for t in range(frames):
        u = draw(rows, 1, TOKENS, DIM, seed=60 + t)
        context, _ = flow.deep.commit(flow.deep.reserve(context), u, FEATURES[:rows, t : t + 1])
    return context


@pytest.mark.parametrize("text", [False, True], ids=["action guidance", "prompt guidance"])
@pytest.mark.parametrize("weight", [0.7, WEIGHT])
def test_guided_density_is_the_change_of_variables_of_the_guided_sampler(text: bool, weight: float) -> None:
    """log p of the committed frame = log N(z) - slogdet of d sample / d z, by differentiating the sampler
    itself.
    """
    flow = TEXT_FLOW if text else FLOW
    context, action = past(flow, text=text), FEATURES[:1, 5:6]
    z = draw(1, TOKENS, DIM, seed=70)

    def sampler(w: Tensor) -> Tensor:
        guess = torch.zeros_like(w)
        for _ in range(TOKENS):
            guess = guided_update(flow, context, guess, w, action, weight)
        return guess

    u = sampler(z)
    reserved = flow.deep.reserve(context)
    for exact in (False, True):
        solved = flow.deep.solve(reserved, flow.deep.to_raster(z), action, weight, 0.0, exact)
        assert (flow.deep.to_own(solved.v) - u).abs().max() < 1e-9
    _, terms = flow.deep.commit(reserved, flow.deep.to_raster(u)[:, None], action, weight)
    back = terms.guided.forward(flow.deep.to_raster(u)[:, None])
    assert (back - flow.deep.to_raster(z)[:, None]).abs().max() < 1e-9  # commit inverts the guided sampler
    claimed = (standard_normal_log_prob(back) + terms.guided.log_det()).sum().item()
    sign, log_det = torch.linalg.slogdet(jacobian(sampler, z))
    expected = standard_normal_log_prob(z).sum().item() - log_det.item()
    assert sign == 1.0
    assert claimed == pytest.approx(expected, abs=1e-6)
    # and it differs from the unguided density of the same frame
    w = terms.model.forward(flow.deep.to_raster(u)[:, None])
    assert abs((standard_normal_log_prob(w) + terms.model.log_det()).sum().item() - claimed) > 1e-3


def guided_update(
    flow: Flow, context: Context, guess: Tensor, w: Tensor, action: Tensor, weight: float
) -> Tensor:
    """``mu + sigma w`` of the guided map, from the facts page: no cache, two passes over past and guess.

    The other pass lacks this action but has the past's, and where there is a prompt it has the empty one.
    """
    frames = context.frames[0]
    u = torch.cat((context.u[:, -frames:], flow.deep.to_raster(guess)[:, None]), dim=1)
    features = torch.cat((context.features[:, -frames:], action), dim=1)
    without = torch.cat((context.features[:, -frames:], torch.zeros_like(action)), dim=1)
    (mu_c, sigma_c), (mu_u, sigma_u) = (
        tuple(flow.deep.to_own(a[:, -1]) for a in flow.deep.clip_parameters(u, GRID, *condition))
        for condition in ((context.text, features), (context.uncond_text, without))
    )
    s = torch.minimum(sigma_c / sigma_u, torch.ones(())).square()
    d = 1 + weight - weight * s
    return ((1 + weight) * mu_c - weight * s * mu_u) / d + sigma_c / d.sqrt() * w


@pytest.mark.parametrize("text", [False, True], ids=["action guidance", "prompt guidance"])
def test_no_guidance_is_the_condition(text: bool) -> None:
    flow = TEXT_FLOW if text else FLOW
    noise = draw(2, FRAMES, TOKENS, DIM, seed=71)
    given = {"text": TEXT, "uncond_text": UNCOND} if text else {}
    plain = flow.sample(noise, GRID, features=FEATURES, tolerance=0.0, text=given.get("text"))
    assert torch.equal(
        plain, flow.sample(noise, GRID, features=FEATURES, tolerance=0.0, guidance=0.0, **given)
    )
    guided = flow.sample(noise, GRID, features=FEATURES, tolerance=0.0, guidance=WEIGHT, **given)
    assert (guided - plain).abs().max() > 1e-3


def test_guiding_by_the_condition_itself_changes_nothing() -> None:
    noise = draw(2, FRAMES, TOKENS, DIM, seed=71)
    plain = TEXT_FLOW.sample(noise, GRID, text=TEXT, tolerance=0.0)
    same = TEXT_FLOW.sample(noise, GRID, text=TEXT, uncond_text=TEXT, guidance=WEIGHT, tolerance=0.0)
    assert (same - plain).abs().max() < 1e-12
    actionless = FLOW.sample(noise, GRID, tolerance=0.0)
    guided = FLOW.sample(noise, GRID, guidance=WEIGHT, tolerance=0.0)
    assert (guided - actionless).abs().max() < 1e-12


@pytest.mark.parametrize("weight", [0.0, WEIGHT])
@pytest.mark.parametrize("keep", [2, None], ids=["reencode", "rolling"])
def test_prompted_sessions_stream_as_they_sample(weight: float, keep: int | None) -> None:
    """Frame by frame through the deep block's verbs, nine frames past a window of four."""
    noise = draw(2, 9, TOKENS, DIM, seed=72)
    context = TEXT_FLOW.deep.start(2, GRID, 4, TEXT, UNCOND if weight else None, features=3)
    u = []
    for t in range(9):
        action = FEATURES[:, t : t + 1]
        context = TEXT_FLOW.deep.reserve(make_room(TEXT_FLOW.deep, context, keep))
        solved = TEXT_FLOW.deep.solve(context, noise[:, t], action, weight, 0.0).v[:, None]
        context, terms = TEXT_FLOW.deep.commit(context, solved, action, weight)
        back = (terms.guided if weight else terms.model).forward(solved)
        assert (back[:, 0] - noise[:, t]).abs().max() < 1e-9  # commit yields exact terms
        u.append(solved)
    x, _ = TEXT_FLOW.shallow_inverse(torch.cat(u, dim=1), GRID, 0.0)
    if keep is not None:
        sampled = TEXT_FLOW.sample(
            noise, GRID, text=TEXT, uncond_text=UNCOND, features=FEATURES, guidance=weight, exact=True
        )
        assert (x - sampled).abs().max() < 1e-9
    if weight == 0.0 and keep is not None:
        within = TEXT_FLOW(x[:, :4], GRID, TEXT, FEATURES[:, :4])
        assert (within.z - noise[:, :4]).abs().max() < 1e-9


def test_the_prompt_matters_and_is_read_causally() -> None:
    x = draw(2, FRAMES, TOKENS, DIM, seed=73)
    before = TEXT_FLOW(x, GRID, TEXT)
    assert (TEXT_FLOW(x, GRID, UNCOND).z - before.z).abs().max() > 1e-3
    changed = TEXT.clone()
    changed[:, 2] += 1.0
    t = TEXT_FLOW.deep.transformer
    begun = [TEXT_FLOW.deep.begin(2, text, 0, 0).cohorts[0].segments[0].kv for text in (TEXT, changed)]
    assert torch.equal(begun[0][..., :2, :], begun[1][..., :2, :])  # prompt token j sees tokens <= j
    assert not torch.equal(begun[0][len(t.layers) - 1][..., 2, :], begun[1][len(t.layers) - 1][..., 2, :])


@pytest.mark.parametrize("given", [1, 2, 3])
def test_a_given_beginning_is_kept_and_continued(given: int) -> None:
    """Image-to-video and longer: the frames given come back as they are, and the rest has the noise that
    was drawn.
    """
    x, noise = draw(2, 4, TOKENS, DIM, seed=74), draw(2, 4, TOKENS, DIM, seed=75)
    out = TEXT_FLOW.sample(noise, GRID, text=TEXT, features=FEATURES, given=x[:, :given], tolerance=0.0)
    assert torch.equal(out[:, :given], x[:, :given])
    z = TEXT_FLOW(out, GRID, TEXT, FEATURES[:, :4]).z
    assert (z[:, given:] - noise[:, given:]).abs().max() < 1e-9
