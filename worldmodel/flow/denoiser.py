"""The denoiser: a learned score that takes the noise off the flow's samples (flow-score matching, STARFlow-V sec. 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor, nn

from worldmodel.flow.block import Transformer
from worldmodel.flow.rope import Rotary, concat_rotary, frame_rotary, frame_turns, text_rotary, turns

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


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to logits for a boolean mask: 0 or -inf."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


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
        frames, tokens = noisy.shape[1:3]
        x, rotary, mask = self._sequence(noisy, grid, text, features, valid)
        out = self.transformer.head(self.transformer.run(x, rotary, mask))[:, -frames * tokens :]
        return rearrange(out, "b (t n) d -> b t n d", n=tokens)

    def newest_score(
        self,
        noisy: Tensor,
        grid: tuple[int, int],
        text: Tensor | None,
        features: Tensor | None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """The last frame of `score`, (B, 1, N, D): each layer computes only what the last frame depends on."""
        frames, tokens = noisy.shape[1:3]
        t, layers = self.transformer, len(self.transformer.layers)
        back = max(0, self.window - self.look_ahead + 1)
        reach = [min(frames, 1 + back * (layers - 1 - i)) * tokens for i in range(layers)]
        x, rotary, mask = self._sequence(noisy, grid, text, features, valid)
        if x.shape[1] > frames * tokens:  # the condition's rows look at the first frames
            reach = [x.shape[1]] * (layers - 1) + reach[-1:]
        out = t.newest(x, turns(rotary), _added(mask, x.dtype), reach) if layers else x
        return t.head(out[:, -tokens:])[:, None]

    @property
    def keeps(self) -> bool:
        """Whether `newest_and_kept` serves: the kernels do, and no frame looks ahead."""
        return self.look_ahead == 1 and self.transformer.native is not None

    def newest_and_kept(
        self,
        noisy: Tensor,
        grid: tuple[int, int],
        features: Tensor | None,
        counts: Sequence[int],
        kept: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """As `newest_score` without a condition, and the keys and values of the last ``window`` frames (B, layers, 2,
        window * N, W), before their rotation; given as ``kept`` in the next step, they spare all frames but the newest.

        The newest frame depends on the frames before it alone, so what was computed of them then is what would be now, bit
        for bit. ``counts``: frames of each session so far, the newest included.
        """
        t, layers = self.transformer, len(self.transformer.layers)
        assert t.native is not None
        frames = noisy.shape[1] if kept is None else 1
        noisy, features = noisy[:, -frames:], None if features is None else features[:, -frames:]
        turned = frame_turns(grid, 0, self.window + 1, self.scale, t.head_dim, noisy.device)
        within = frames if kept is None else self.window + 1
        asking = [min(frames, 1 + self.window * (layers - 1 - i)) for i in range(layers)]
        missing = [max(0, within - count) for count in counts]
        score, kept = t.native.newest(noisy, features, turned, missing, asking, self.window, kept)
        return score[:, None], kept

    def _sequence(
        self,
        noisy: Tensor,
        grid: tuple[int, int],
        text: Tensor | None,
        features: Tensor | None,
        valid: Tensor | None,
    ) -> tuple[Tensor, Rotary, Tensor]:
        """Embedded tokens (B, S, D), the condition's in front, their positions, and who sees whom."""
        t = self.transformer
        _, frames, tokens, _ = noisy.shape
        flat = rearrange(noisy, "b t n d -> b (t n) d")
        spread = None if features is None else features.repeat_interleave(tokens, dim=1)
        x = t.embed(flat, spread)
        rotary = frame_rotary(grid, 0, frames, self.scale, t.head_dim, x.device)
        length = 0
        if text is not None and t.proj_text is not None:
            length = text.shape[1]
            rotary = concat_rotary(text_rotary(length, 0, self.scale, t.head_dim, x.device), rotary)
            x = torch.cat((t.embed_text(text), x), dim=1)
        mask = frame_mask(frames, tokens, length, self.look_ahead, self.window, x.device)
        if valid is not None:
            keys = torch.cat(
                (valid.new_ones(len(valid), length), valid.repeat_interleave(tokens, dim=1)), dim=1
            )
            itself = torch.eye(mask.shape[0], dtype=torch.bool, device=mask.device)
            mask = ((mask & keys[:, None, :]) | itself)[:, None]
        return x, rotary, mask
