"""Attention: over whole sequences, and of a run of new tokens over a cached past, with no copy of what is shared.

A run is one pass of new tokens through the layers. Its tokens may lie in several *streams*, which share the past and
not each other: the same tokens under the action and under none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from worldmodel.flow.cache import Cohort
from worldmodel.flow.rope import Rotary, rotate, rotate_halves
from worldmodel.packed import Linear

MERGED_RUN = 64
"""Runs of at least so many tokens attend to the past without a mask, and the two softmaxes are merged."""


@lru_cache(maxsize=128)
def lower_right_causal(run: int, total: int, device: torch.device) -> Tensor:
    """Boolean (run, total): query i sees keys ``0 .. total - run + i``. True = attend."""
    return torch.ones(run, total, dtype=torch.bool, device=device).tril(total - run)


@lru_cache(maxsize=512)
def stream_mask(
    past: int, tokens: int, streams: int, start: int, stop: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """What is added to logits (streams * R, past + streams * tokens), 0 or -inf, for tokens ``start:stop`` (R of them).

    Slots are stream-major. A token sees the past and, in its own stream, itself and what is before it.
    """
    own = torch.ones(tokens, tokens, dtype=torch.bool).tril()[start:stop]
    sees = torch.block_diag(*([own] * streams)).bool()
    sees = torch.cat((torch.ones(len(sees), past, dtype=torch.bool), sees), dim=1)
    return torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, float("-inf")).to(device)


class Room:
    """The K/V of one cohort as runs see them: shared segments, and the past plus ``slots`` reserved slots of its own.

    Where passes fill the slots bit by bit, ``clear`` them first: a masked key counts nothing, unless it is not a number.
    """

    def __init__(self, cohort: Cohort, slots: int, clear: bool = False) -> None:
        *shared, tail = cohort.segments
        self.rows, self.past = cohort.rows, tail.tokens
        kv = tail.page.kv[:, :, :, :, tail.start : tail.stop + slots]
        self.own = [layer.unbind(0) for layer in kv.unbind(0)]
        self.slots = kv[..., tail.tokens :, :]
        if clear:
            self.slots.zero_()
        self.shared = [(s.fold, [layer.unbind(0) for layer in s.kv.unbind(0)]) for s in shared]


@dataclass(frozen=True)
class Part:
    """A run's rows of one cohort. slots: per layer (2, B, H, streams, R, K), where K/V go. mask: see `stream_mask`;
    None for a causal run at the end of the reserved slots.
    """

    room: Room
    slots: Sequence[Tensor]
    mask: Tensor | None


@dataclass(frozen=True)
class Run:
    """Tokens ``start:stop`` of every stream of a frame or more. turns: unit complex numbers (R, K / 2) or
    (B, R, K / 2), see `rope.turns`.
    """

    parts: Sequence[Part]
    turns: Tensor
    streams: int


def plan_run(rooms: Sequence[Room], turns: Tensor, tokens: int, streams: int, start: int, stop: int) -> Run:
    """The pass over tokens ``start:stop`` of ``tokens`` in each of ``streams`` streams."""
    parts = []
    for room in rooms:
        slots = room.slots.unflatten(-2, (streams, tokens))[..., start:stop, :].unbind(0)
        k = room.own[0][0]
        whole = streams == 1 and start == 0 and stop == tokens
        mask = None
        if not whole or tokens < MERGED_RUN:
            mask = stream_mask(room.past, tokens, streams, start, stop, k.dtype, k.device)
        parts.append(Part(room, slots, mask))
    turns = turns.repeat((1,) * (turns.ndim - 2) + (streams, 1)) if streams > 1 else turns
    return Run(parts, turns[..., None, None, :], streams)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _partial(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention over some of the keys, (B, H, R, K), and its log-sum-exp (B, H, R, 1)."""
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask
        )
        return out, lse[..., None]
    if mask is None and q.dtype in (torch.bfloat16, torch.float16):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
        return out, lse[..., None]
    logits = _at_least_float32(q @ k.mT) * q.shape[-1] ** -0.5
    if causal:
        logits = logits.masked_fill(~lower_right_causal(q.shape[2], k.shape[2], q.device), float("-inf"))
    elif mask is not None:
        logits = logits + mask
    lse = logits.logsumexp(-1, keepdim=True)
    return (logits - lse).exp().to(v.dtype) @ v, lse


def _merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One softmax over the keys of both."""
    share = torch.sigmoid(b[1] - a[1])
    return torch.lerp(a[0].to(share.dtype), b[0].to(share.dtype), share), torch.logaddexp(a[1], b[1])


def _attend(q_BHRK: Tensor, part: Part, layer: int) -> Tensor:
    """Queries of one cohort's run over its past and itself, (B, H, R, K)."""
    room = part.room
    k, v = room.own[layer]
    q = q_BHRK.to(k.dtype)
    if not room.shared and part.mask is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=part.mask)
    if part.mask is not None:
        result = _partial(q, k, v, part.mask)
    else:
        result = _partial(q, k[:, :, room.past :], v[:, :, room.past :], None, causal=True)
        if room.past:
            result = _merge(result, _partial(q, k[:, :, : room.past], v[:, :, : room.past], None))
    for fold, layers in room.shared:
        folded = rearrange(q, "(b f) h n k -> b h (f n) k", f=fold)
        k_past, v_past = layers[layer]
        out, lse = _partial(folded, k_past, v_past, None)
        back = [rearrange(x, "b h (f n) k -> (b f) h n k", f=fold) for x in (out, lse)]
        result = _merge(result, (back[0], back[1]))
    return result[0]


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention by two matrix products: on CPUs its backward pass is 2 to 4 times faster than the fused one's, and
    on GPUs it adds up in one order.
    """
    logits = (q @ k.mT) * q.shape[-1] ** -0.5
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    return logits.softmax(dim=-1).to(v.dtype) @ v


class Attention(nn.Module):
    """Pre-norm multi-head attention with biases, its residual included; RoPE on q and k after projection; scale
    ``K ** -0.5``.
    """

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.heads = width // head_dim
        self.norm = nn.LayerNorm(width)
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)

    def forward(self, x_BSD: Tensor, rotary: Rotary, mask: Tensor | str) -> Tensor:
        """Whole sequences (B, S, D). ``mask`` is "causal", "full", or a boolean (S, S), True = attend."""
        learns = torch.is_grad_enabled() and self.qkv.weight.requires_grad
        q, k, v = (self.learned_heads if learns else self.plain_heads)(self.norm(x_BSD), rotary)
        causal = isinstance(mask, str) and mask == "causal"
        dense = mask if isinstance(mask, Tensor) else None
        if q.requires_grad and (q.device.type == "cpu" or not learns):
            run = q.shape[2]
            q, k, v = (q, k, v) if learns else map(_at_least_float32, (q, k, v))
            seen = lower_right_causal(run, run, q.device) if causal else dense
            out = _plain_attention(q, k, v, seen).to(x_BSD.dtype)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=dense, is_causal=causal)
        return self.out.plus(rearrange(out, "b h s k -> b s (h k)"), x_BSD)

    def plain_heads(self, x_BSD: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Turned queries and keys, and values, (B, H, S, K)."""
        q, k, v = rearrange(self.qkv(x_BSD), "b s (three h k) -> three b h s k", three=3, h=self.heads)
        return rotate(q, rotary), rotate(k, rotary), v

    def learned_heads(self, x_BSD: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """As `plain_heads`, with the channels of q and k in the order of `rotate_halves`, in which their products are the
        same: to lay out weights in each training step costs less than to turn adjacent channels of all tokens.
        """

        def laid_out(p: Tensor) -> Tensor:
            pairs = p.unflatten(0, (3, self.heads, -1, 2))
            return torch.cat((pairs[:2].transpose(2, 3).flatten(0, 3), pairs[2].flatten(0, 2)))

        y = F.linear(x_BSD, laid_out(self.qkv.weight), laid_out(self.qkv.bias))
        q, k, v = rearrange(y, "b s (three h k) -> three b h s k", three=3, h=self.heads)
        return rotate_halves(q, rotary), rotate_halves(k, rotary), v

    def newest(self, x_BSD: Tensor, turns_SK: Tensor, mask: Tensor, asking: int) -> Tensor:
        """The last ``asking`` tokens, (B, asking, D), after they attended to all of x. Inference only.

        turns (S, K / 2): see `rope.turns`. ``mask`` (..., S', S'), added to logits, of a sequence that ends as x does.
        """
        rows, tokens = x_BSD.shape[:2]
        y = _at_least_float32(self.qkv(self.norm(x_BSD))).view(rows, tokens, 3, self.heads, -1, 2)
        torch.view_as_complex(y)[:, :, :2].mul_(turns_SK[:, None, None])
        q, k, v = y.flatten(-2).to(x_BSD.dtype).permute(2, 0, 3, 1, 4)
        seen = mask[..., -asking:, -tokens:]
        out = F.scaled_dot_product_attention(q[:, :, -asking:], k, v, attn_mask=seen)
        return self.out.plus(out.transpose(1, 2).flatten(2), x_BSD[:, -asking:].contiguous())

    def extend(self, x_BRD: Tensor, run: Run, layer: int) -> Tensor:
        """A run (B, streams * R, D) behind the cached past; its K/V go into the run's slots. Inference only."""
        rows, tokens = x_BRD.shape[:2]
        y = self.qkv(self.norm(x_BRD)).view(rows, tokens, 3, self.heads, -1, 2)
        turned, v = _at_least_float32(y[:, :, :2]), y[:, :, 2].flatten(-2)
        torch.view_as_complex(turned).mul_(run.turns)
        q, k = turned.flatten(-2).unbind(2)
        q = q.transpose(1, 2)
        k, v = (x.unflatten(1, (run.streams, -1)).permute(0, 3, 1, 2, 4) for x in (k, v))
        sizes = [part.room.rows for part in run.parts]
        outs = []
        for part, *new in zip(run.parts, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
            for slots, x in zip(part.slots[layer], new[1:], strict=True):
                slots.copy_(x)
            outs.append(_attend(new[0], part, layer))
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return self.out.plus(out.transpose(1, 2).flatten(2).to(x_BRD.dtype), x_BRD)
