"""Every transform is a bijection with the log-determinant it claims, triangular in its own order. Float64.

Axis letters: B rows, T frames, N tokens, D token dimension; tokens (B, T, N, D) in raster order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from einops import rearrange
from torch import Tensor

from tests.flow.helpers import GRID, draw, flow64, jacobian, lower_triangular
from worldmodel.flow.affine import Affine
from worldmodel.flow.flow import Flow
from worldmodel.flow.jacobi import jacobi, sequential

FRAMES, TOKENS, DIM = 3, 4, 2
FLOW = flow64()
TEXT_FLOW = flow64(seed=3, text_tokens=3, text_dim=5, layers_per_block=(1, 2))
FEATURES = draw(2, FRAMES, 3, seed=5)
TEXT = draw(2, 3, 5, seed=6)


@dataclass(frozen=True)
class Transform:
    """parameters: tokens (B, S, D) in own order to the affine map; to_own: a clip (B, T, N, D) to such
    tokens.
    """

    parameters: Callable[[Tensor], Affine]
    to_own: Callable[[Tensor], Tensor]


def shallow(index: int) -> Transform:
    block = FLOW.shallow[index]
    return Transform(
        lambda v: block.frame_parameters(v, GRID),
        lambda x: block.to_own(rearrange(x, "b t n d -> (b t) n d")),
    )


def deep(flow: torch.nn.Module, text: Tensor | None, features: Tensor | None) -> Transform:
    block = flow.deep

    def to_own(x: Tensor) -> Tensor:
        return rearrange(block.to_own(x), "b t n d -> b (t n) d")

    def parameters(v: Tensor) -> Affine:
        u = block.to_raster(rearrange(v, "b (t n) d -> b t n d", n=TOKENS))
        rows = len(u)
        affine = block.clip_parameters(
            u, GRID, None if text is None else text[:rows], None if features is None else features[:rows]
        )
        return Affine(*map(to_own, affine))

    return Transform(parameters, to_own)


TRANSFORMS = {
    "shallow block 0 (backwards)": shallow(0),
    "shallow block 1 (forwards)": shallow(1),
    "deep block": deep(FLOW, None, None),
    "deep block, actions": deep(FLOW, None, FEATURES),
    "deep block, text": deep(TEXT_FLOW, TEXT, None),
    "deep block, text and actions": deep(TEXT_FLOW, TEXT, FEATURES),
}
each = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)


@each
def test_inverse_of_forward(transform: Transform) -> None:
    v = transform.to_own(draw(2, FRAMES, TOKENS, DIM))
    with torch.no_grad():
        affine = transform.parameters(v)
        w = affine.forward(v)
        assert (w - v).abs().max() > 0.1  # it is not the identity
        assert (affine.inverse(w) - v).abs().max() < 1e-12
        solved = jacobi(transform.parameters, w, torch.zeros_like(w), tolerance=0.0)
        assert (solved.v - v).abs().max() < 1e-9
        assert (sequential(transform.parameters, w) - v).abs().max() < 1e-9


@each
def test_log_determinant_and_triangular_jacobian(transform: Transform) -> None:
    v = transform.to_own(draw(1, FRAMES, TOKENS, DIM))[:1]
    matrix = jacobian(lambda x: transform.parameters(x).forward(x), v)
    assert lower_triangular(matrix, DIM)
    claimed = transform.parameters(v).log_det()
    assert torch.linalg.slogdet(matrix)[1].item() == pytest.approx(claimed.sum().item(), abs=1e-6)
    assert torch.allclose(matrix.diagonal().log(), claimed.flatten(), atol=1e-9)
    # and it does depend on the past: a block that ignores its input would pass all of the above
    below = torch.ones_like(matrix).tril(-DIM).bool()
    assert (matrix[below] != 0).float().mean() > 0.2


def test_blocks_read_frames_in_alternating_order() -> None:
    """With 3 blocks: shallow 0 backwards, shallow 1 forwards, deep backwards."""
    x = draw(1, 1, TOKENS, DIM)

    def raster(index: int) -> Tensor:
        block = (*FLOW.shallow, FLOW.deep)[index]
        if index == 2:
            return jacobian(lambda v: block.clip_parameters(v, GRID, None, None).forward(v), x)

        def forward(v: Tensor) -> Tensor:
            own = block.to_own(v[0])
            return block.to_raster(block.frame_parameters(own, GRID).forward(own))

        return jacobian(forward, x)

    backwards = [lower_triangular(raster(i).flip(0, 1), DIM) for i in range(3)]
    forwards = [lower_triangular(raster(i), DIM) for i in range(3)]
    assert backwards == [True, False, True]
    assert forwards == [False, True, False]


WHOLE = {
    "plain": (FLOW, None, None),
    "actions": (FLOW, None, FEATURES),
    "text and actions": (TEXT_FLOW, TEXT, FEATURES),
}
whole = pytest.mark.parametrize(("flow", "text", "features"), WHOLE.values(), ids=WHOLE)


@whole
@pytest.mark.parametrize("exact", [False, True], ids=["jacobi", "sequential"])
def test_whole_flow_inverse_of_forward(
    flow: torch.nn.Module, text: Tensor | None, features: Tensor | None, exact: bool
) -> None:
    """The streaming sampler (K/V cache, frame by frame) inverts the one-pass forward."""
    x = draw(2, FRAMES, TOKENS, DIM)
    z = flow(x, GRID, text, features).z
    back = flow.sample(z, GRID, text=text, features=features, tolerance=0.0, exact=exact)
    assert (back - x).abs().max() < 1e-9
    assert (z - x).abs().max() > 0.1


@whole
def test_whole_flow_log_prob_is_the_change_of_variables(
    flow: torch.nn.Module, text: Tensor | None, features: Tensor | None
) -> None:
    x = draw(1, FRAMES, TOKENS, DIM)
    text, features = (None if a is None else a[:1] for a in (text, features))
    density = flow(x, GRID, text, features)
    matrix = jacobian(lambda v: flow(v, GRID, text, features).z, x)
    sign, log_det = torch.linalg.slogdet(matrix)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(density.z).sum() + log_det
    assert sign == 1.0
    assert density.log_prob.sum().item() == pytest.approx(expected.item(), abs=1e-6)
    assert density.log_prob.shape == (1, FRAMES)
    # frames come in order: block triangular over frames, so log_prob of frame t is conditional on the past
    assert lower_triangular_over_frames(matrix)


def lower_triangular_over_frames(matrix: Tensor) -> bool:
    size = TOKENS * DIM
    blocks = matrix.reshape(FRAMES, size, FRAMES, size).transpose(1, 2)
    return bool((blocks[torch.ones(FRAMES, FRAMES).triu(1).bool()] == 0).all())


def test_log_prob_of_a_frame_is_its_own_conditional_density() -> None:
    """log p(x_t | past) from the t-th diagonal block of the Jacobian, frame by frame."""
    x = draw(1, FRAMES, TOKENS, DIM)
    density = FLOW(x, GRID, None, FEATURES[:1])
    size = TOKENS * DIM
    matrix = jacobian(lambda v: FLOW(v, GRID, None, FEATURES[:1]).z, x)
    for t in range(FRAMES):
        own = matrix[t * size : (t + 1) * size, t * size : (t + 1) * size]
        prior = torch.distributions.Normal(0.0, 1.0).log_prob(density.z[0, t]).sum()
        expected = (prior + torch.linalg.slogdet(own)[1]).item()
        assert density.log_prob[0, t].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("t", [1, 2])
def test_no_future_frame_changes_a_past_one(t: int) -> None:
    x = draw(2, FRAMES, TOKENS, DIM)
    changed = x.clone()
    changed[:, t:] += 10.0
    before, after = FLOW(x, GRID, None, FEATURES), FLOW(changed, GRID, None, FEATURES)
    assert torch.equal(before.z[:, :t], after.z[:, :t])
    assert torch.equal(before.log_prob_elements[:, :t], after.log_prob_elements[:, :t])
    assert not torch.equal(before.z[:, t:], after.z[:, t:])


@pytest.mark.parametrize("t", [0, 1, 2])
def test_action_t_changes_nothing_before_chunk_t(t: int) -> None:
    x = draw(2, FRAMES, TOKENS, DIM)
    changed = FEATURES.clone()
    changed[:, t] += 1.0
    before, after = FLOW(x, GRID, None, FEATURES), FLOW(x, GRID, None, changed)
    assert torch.equal(before.z[:, :t], after.z[:, :t])
    assert torch.equal(before.log_prob[:, :t], after.log_prob[:, :t])
    # and everything from chunk t on, from the first token of the frame it causes
    moved = (before.z != after.z).any(-1)
    assert moved[:, t:].all()


def test_action_embedding_starts_at_zero() -> None:
    """With its initial (zero) projection an action changes nothing: a published checkpoint is unchanged."""
    flow = flow64(seed=2)
    for part in (flow.deep, flow.denoiser):
        torch.nn.init.zeros_(part.transformer.proj_action.weight)
    x = draw(2, FRAMES, TOKENS, DIM)
    assert torch.equal(flow(x, GRID).z, flow(x, GRID, None, FEATURES).z)
    assert torch.equal(flow.denoise(x, GRID), flow.denoise(x, GRID, None, FEATURES))
    noise = draw(2, FRAMES, TOKENS, DIM, seed=4)
    assert torch.equal(flow.sample(noise, GRID), flow.sample(noise, GRID, features=FEATURES))


def test_a_new_flow_has_zero_action_embeddings_and_identity_blocks() -> None:
    flow = Flow(FLOW.config).double()
    assert not flow.deep.transformer.proj_action.weight.any()
    assert not flow.denoiser.transformer.proj_action.weight.any()
    x = draw(1, FRAMES, TOKENS, DIM)
    density = flow(x, GRID, None, FEATURES[:1])
    assert torch.allclose(density.z, x, atol=1e-12)  # zero-initialised heads: sigma = 1, mu = 0
    assert torch.equal(flow.denoise(x, GRID), x)


def test_frames_do_not_mix_in_shallow_blocks() -> None:
    x = draw(1, FRAMES, TOKENS, DIM)
    u, log_det = FLOW.shallow_forward(x, GRID)
    for t in range(FRAMES):
        alone, alone_det = FLOW.shallow_forward(x[:, t : t + 1], GRID)
        assert (u[:, t : t + 1] - alone).abs().max() < 1e-12
        assert (log_det[:, t : t + 1] - alone_det).abs().max() < 1e-12
