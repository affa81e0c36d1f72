"""From the noisy tokens that a state remembers to the clean ones of its newest frame.

A flow has learned a denoiser, or its own score takes the noise off, in one step of Tweedie's formula (TarFlow, arXiv
2412.06329, "score-based denoising"; Efron, JASA 2011):

    E[x | x~, c] = x~ + sigma_n^2 grad_x~ log p(x~ | c)

which holds where p is the density of clean data plus noise of variance sigma_n^2: of the flow itself, under its past
and its condition. The guided map is a sampler of its own, sharper than any data with that noise on it; its score is no
posterior mean. So guidance decides where x~ lies, and the conditional density, unguided, which way the noise is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from worldmodel.flow.affine import Affine, standard_normal_log_prob
from worldmodel.flow.denoiser import SCORE_SCALE
from worldmodel.flow.flow import Flow
from worldmodel.state import WorldState


def clean_frame(flow: Flow, grid: tuple[int, int], state: WorldState) -> tuple[Tensor, Tensor | None]:
    """The newest frame's tokens (B, 1, N, D) without noise, and what the denoiser keeps for the next step, which is to be
    the `WorldState.denoiser` of the state; None where it keeps nothing. The state's own is of the frames before.
    """
    if flow.denoiser is None:
        return by_score(flow, grid, state), None
    if not flow.denoiser.keeps or state.context.text is not None or state.noisy.dtype != torch.float32:
        return by_denoiser(flow, grid, state), None
    counts, features = state.steps.tolist(), state.context.features
    frames = min(max(counts), state.noisy.shape[1])
    known = None if features is None else features[:, -frames:]
    remembers = (
        state.noisy.shape[1] >= flow.denoiser_reach
    )  # else what is kept would know more than the state
    score, kept = flow.denoiser.newest_and_kept(
        state.noisy[:, -frames:], grid, known, counts, state.denoiser if remembers else None
    )
    return state.noisy[:, -1:] - SCORE_SCALE * score, kept if remembers else None


def by_denoiser(flow: Flow, grid: tuple[int, int], state: WorldState) -> Tensor:
    """As `clean_frame`, by the flow's denoiser.

    Where sessions of unlike lengths have prompts they are denoised apart: the distance between the condition and a
    frame counts, and must not depend on who shares the batch.
    """
    reach, text, features = state.noisy.shape[1], state.context.text, state.context.features
    lengths = {min(count, reach) for count in state.steps.tolist()}
    if len(lengths) == 1:
        (back,) = lengths
        known = None if features is None else features[:, -back:]
        return flow.denoise_newest(state.noisy[:, -back:], grid, text, known)
    steps, device = state.steps.clamp(max=reach), state.noisy.device

    def denoise(rows: Tensor) -> Tensor:
        here, counts = rows.to(device), steps[rows]
        back = int(counts.max())
        valid = torch.arange(back)[None] >= back - counts[:, None]
        return flow.denoise_newest(
            state.noisy[here, -back:],
            grid,
            None if text is None else text[here],
            None if features is None else features[here, -back:],
            None if bool(valid.all()) else valid.to(device),
        )

    if text is None:
        return denoise(torch.arange(state.rows))
    clean = torch.empty_like(state.noisy[:, -1:])
    for length in sorted(lengths):
        rows = torch.nonzero(steps == length)[:, 0]
        clean[rows.to(device)] = denoise(rows)
    return clean


def by_score(flow: Flow, grid: tuple[int, int], state: WorldState) -> Tensor:
    """As `clean_frame`, by the gradient of the newest frame's exact log-density, given the frames before it in the window
    and the condition, through the whole flow. A window that rolled counts as one that has just been encoded.

    Sessions are denoised one by one: none depends on another, and no more than one's activations are held (see
    `worldmodel.plan`). Four to five times a commit's time on a CPU. Attention is spelt out, see `Attention.forward`: the
    fused kernels' backward passes add up in any order on a GPU, and a replay would be another picture.
    """
    context, clean = state.context, []
    for row, count in enumerate(context.frames):
        here = slice(row, row + 1)
        with torch.inference_mode(False), torch.enable_grad():
            past = context.u[here, context.window - count : -1].clone()
            text = None if context.text is None else context.text[here].clone()
            features = None if context.features is None else context.features[here, -count:].clone()
            x = state.noisy[here, -1:].clone().requires_grad_()
            u, log_det = flow.shallow_forward(x, grid)
            deep = flow.deep.clip_parameters(torch.cat((past, u), dim=1), grid, text, features)
            newest = Affine(deep.mu[:, -1:], deep.sigma[:, -1:])
            nats = standard_normal_log_prob(newest.forward(u)) + newest.log_det() + log_det
            (score,) = torch.autograd.grad(nats.sum(), x)
        clean.append(x.detach() + flow.config.noise_std**2 * score)
    return torch.cat(clean)
