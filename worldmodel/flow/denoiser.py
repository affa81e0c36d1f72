"""The denoiser: a learned score that takes the noise off the flow's samples (flow-score matching, STARFlow-V sec. 3.2)."""

from __future__ import annotations

from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor, nn

from worldmodel.flow.block import Transformer
from worldmodel.flow.rope import concat_rotary, frame_rotary, text_rotary

SCORE_SCALE = 0.3
"""``x = x~ - 0.3 s(x~)``: the training loss is scaled by ``sigma_n / 0.3``, so this is Tweedie's step
``sigma_n^2 grad log p``."""


@lru_cache(maxsize=64)
def frame_mask(
    frames: int, tokens: int, text: int, look_ahead: int, window: int, device: torch.device
) -> Tensor:
    """Boolean (S, S), S = text + frames * tokens, True = attend.

    A token of frame n sees the condition and frames ``n + A - 1 - window .. n + A - 1`` (A = ``look_ahead``, i.e.
    ``temporal_causal``); condition rows see the condition and frames ``0 .. A - 1``.
    """
    index = torch.arange(frames).repeat_interleave(tokens)
    newest = index + look_ahead - 1
    among = (index[None] <= newest[:, None]) & (index[None] >= newest[:, None] - window)
    mask = torch.ones(text + frames * tokens, text + frames * tokens, dtype=torch.bool)
    mask[text:, text:] = among
    mask[:text, text:] = index[None] <= look_ahead - 1
    return mask.to(device)


class Denoiser(nn.Module):
    """``s(x~; condition)`` over noisy tokens of a clip, with the sign and scale of the training loss."""

    def __init__(self, transformer: Transformer, look_ahead: int, window: int, scale: float) -> None:
        super().__init__()
        self.transformer = transformer
        self.look_ahead = look_ahead
        self.window = window
        self.scale = scale

    @property
    def reach(self) -> int:
        """Frames that can influence the newest one, itself included, when the past is not looked at from ahead."""
        return 1 + len(self.transformer.layers) * self.window

    def score(
        self,
        noisy: Tensor,
        grid: tuple[int, int],
        text: Tensor | None,
        features: Tensor | None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Score (B, T, N, D) of noisy tokens (B, T, N, D); text (B, L, text_dim); features (B, T, E).

        ``valid`` (B, T) bool marks the frames that exist in a right-aligned batch of unequal lengths.
        """
        t = self.transformer
        _, frames, tokens, _ = noisy.shape
        flat = rearrange(noisy, "b t n d -> b (t n) d")
        spread = None if features is None else features.repeat_interleave(tokens, dim=1)
        x = t.embed(flat, spread)
        rotary = frame_rotary(grid, 0, frames, self.scale, t.head_dim, x.device)
        length = 0 if text is None else text.shape[1]
        if text is not None and t.proj_text is not None:
            rotary = concat_rotary(text_rotary(length, 0, self.scale, t.head_dim, x.device), rotary)
            x = torch.cat((t.embed_text(text), x), dim=1)
        mask = frame_mask(frames, tokens, length, self.look_ahead, self.window, x.device)
        if valid is not None:
            keys = torch.cat(
                (valid.new_ones(len(valid), length), valid.repeat_interleave(tokens, dim=1)), dim=1
            )
            itself = torch.eye(mask.shape[0], dtype=torch.bool, device=mask.device)
            mask = ((mask & keys[:, None, :]) | itself)[:, None]
        out = t.head(t.run(x, rotary, mask))[:, length:]
        return rearrange(out, "b (t n) d -> b t n d", n=tokens)
