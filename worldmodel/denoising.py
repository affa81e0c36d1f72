"""From the noisy tokens that a state remembers to the clean ones of its newest frame."""

from __future__ import annotations

import torch
from torch import Tensor

from worldmodel.flow.flow import Flow
from worldmodel.state import WorldState


def clean_frame(flow: Flow, grid: tuple[int, int], state: WorldState) -> Tensor:
    """The newest frame's tokens (B, 1, N, D) without noise.

    Where sessions of unlike lengths have prompts they are denoised apart: the distance between the condition and a
    frame counts, and must not depend on who shares the batch.
    """
    steps, text = state.steps.clamp(max=state.noisy.shape[1]), state.context.text
    features, device = state.context.features, state.noisy.device

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
    for length in sorted(set(steps.tolist())):
        rows = torch.nonzero(steps == length)[:, 0]
        clean[rows.to(device)] = denoise(rows)
    return clean
