"""STARFlow-V sampled the plain way, as its public code does it, on the same weights; and the exact inverse.

Written afresh from a description of that code, small and without any of this project's accelerations: Jacobi over
blocks of 32 tokens in the first frame and of 128 in later ones until the mean squared change *over the batch*,
relative to the mean square, is below 1e-3; the K/V kept are those of the iterate before the last update (no commit);
keys are cached before RoPE and the whole cache is rotated at every call; attention under a dense boolean mask; the
cache is allocated at full length. That code makes clips: it takes a past and returns frames, and keeps nothing. As a
world it has to fill its cache anew at every chunk (`Baseline.observe`), or is given the state that it lacks, and has to
re-run the denoiser over its window and to decode the window's latents as a clip at every step. It yields no likelihood.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from worldmodel.flow.affine import Affine, affine_from_head, guide
from worldmodel.flow.block import Block, Layer
from worldmodel.flow.flow import Flow
from worldmodel.flow.rope import Rotary, frame_rotary, rotate

THRESHOLD = 1e-3
FIRST_BLOCK, BLOCK = 32, 128


def _linear(module: torch.nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, module.weight, module.bias)


class Stream:
    """The plain sampler's cache of one block: unrotated keys and values, (layers, 2, B, H, capacity, K)."""

    def __init__(self, block: Block, rows: int, capacity: int, grid: tuple[int, int], frames: int) -> None:
        t = block.transformer
        width = t.proj_in.out_features
        shape = (len(t.layers), 2, rows, width // t.head_dim, capacity, t.head_dim)
        self.block, self.kv, self.length = block, torch.zeros(shape, device=block.sos.device), 0
        self.rotary = frame_rotary(grid, 0, frames, block.scale, t.head_dim, block.sos.device)

    def run(self, inputs: Tensor, actions: Tensor | None) -> Affine:
        """Parameters of a run whose inputs (B, R, D) follow what is cached; its K/V are written behind it."""
        t, run = self.block.transformer, inputs.shape[1]
        total = self.length + run
        x = _linear(t.proj_in, inputs)
        if t.proj_action is not None and actions is not None:
            x = x + _linear(t.proj_action, actions)
        mask = torch.ones(run, total, dtype=torch.bool, device=x.device).tril(total - run)
        now = Rotary(*(table[self.length : total] for table in self.rotary))
        whole = Rotary(*(table[:total] for table in self.rotary))
        for index, module in enumerate(t.layers):
            layer = cast(Layer, module)
            attention, mlp = layer.attention, layer.mlp
            qkv = rearrange(
                _linear(attention.qkv, attention.norm(x)),
                "b s (three h k) -> three b h s k",
                three=3,
                h=attention.heads,
            )
            self.kv[index, :, :, :, self.length : total] = qkv[1:]
            k, v = self.kv[index, :, :, :, :total]
            y = F.scaled_dot_product_attention(rotate(qkv[0], now), rotate(k, whole), v, attn_mask=mask)
            x = x + _linear(attention.out, rearrange(y, "b h s k -> b s (h k)"))
            x = x + _linear(mlp.down, F.gelu(_linear(mlp.up, mlp.norm(x))))
        return affine_from_head(_linear(t.proj_out, t.final_norm(x)), self.block.soft_clip)


def solve(
    stream: Stream,
    w: Tensor,
    before: Tensor,
    actions: Tensor | None,
    start: Tensor,
    size: int,
    guidance: float,
    uncond: Stream | None = None,
) -> tuple[Tensor, int]:
    """Jacobi over blocks of ``size`` tokens of one frame, all in own order: v (B, N, D), and the sweeps spent."""
    v, sweeps, tokens = start.clone(), 0, w.shape[1]
    for begin in range(0, tokens, size):
        part = slice(begin, min(begin + size, tokens))
        first = before if begin == 0 else v[:, begin - 1 : begin]
        acts = None if actions is None else actions.expand(-1, part.stop - part.start, -1)
        for _ in range(part.stop - part.start):
            inputs = torch.cat((first, v[:, begin : part.stop - 1]), dim=1)
            affine = stream.run(inputs, acts)
            if uncond is not None:
                affine = guide(affine, uncond.run(inputs, None), guidance)
            update = affine.inverse(w[:, part])
            change = (update - v[:, part]).square().mean() / update.square().mean()
            v[:, part] = update
            sweeps += 1
            if change < THRESHOLD:
                break
        for s in (stream, uncond):
            if s is not None:
                s.length += part.stop - part.start
    return v, sweeps


class Baseline:
    """A clip sampled frame by frame. ``window`` frames of room; it does not restart."""

    def __init__(
        self, flow: Flow, rows: int, grid: tuple[int, int], window: int, guidance: float = 0.0
    ) -> None:
        self.flow, self.grid, self.guidance = flow, grid, guidance
        tokens = grid[0] * grid[1]
        self.deep = Stream(flow.deep, rows, window * tokens, grid, window)
        self.uncond = Stream(flow.deep, rows, window * tokens, grid, window) if guidance else None
        self.u: Tensor | None = None
        self.noisy: list[Tensor] = []
        self.features: list[Tensor] = []
        self.sweeps = 0

    def _solve_deep(
        self, w: Tensor, before: Tensor, features: Tensor | None, start: Tensor, size: int
    ) -> Tensor:
        v, used = solve(self.deep, w, before, features, start, size, self.guidance, self.uncond)
        self.sweeps += used
        return v

    @torch.no_grad()
    def observe(self, u: Tensor, noisy: Tensor, features: Tensor | None) -> None:
        """Take known frames into the cache in one pass: u and noisy (B, T, N, D), raster, features (B, T, E)."""
        deep, tokens = self.flow.deep, u.shape[2]
        own = rearrange(deep.to_own(u), "b t n d -> b (t n) d")
        inputs = torch.cat((self._before(own), own[:, :-1]), dim=1)
        spread = None if features is None else features.repeat_interleave(tokens, dim=1)
        for stream, actions in ((self.deep, spread), (self.uncond, None)):
            if stream is not None:
                stream.run(inputs, actions)
                stream.length += own.shape[1]
        for t in range(u.shape[1]):
            self._append(u[:, t], noisy[:, t], None if features is None else features[:, t : t + 1])

    def _append(self, u: Tensor, noisy: Tensor, features: Tensor | None) -> None:
        self.u = u
        self.noisy.append(noisy)
        if features is not None:
            self.features.append(features)

    def _before(self, like: Tensor) -> Tensor:
        deep = self.flow.deep
        return deep.sos.expand(len(like), 1, -1) if self.u is None else deep.to_own(self.u)[:, -1:]

    @torch.no_grad()
    def step(self, w: Tensor, features: Tensor | None) -> None:
        """Noise w (B, N, D), raster, to the next frame of noisy tokens; features (B, 1, E)."""
        deep, first = self.flow.deep, self.u is None
        own = deep.to_own(w)
        start = own if self.u is None else deep.to_own(self.u)
        v = self._solve_deep(own, self._before(own), features, start, FIRST_BLOCK if first else BLOCK)
        u = x = deep.to_raster(v)
        for block in reversed(self.flow.shallow_blocks):
            stream = Stream(block, len(x), x.shape[1], self.grid, 1)
            noise = block.to_own(x)
            sos = block.sos.expand(len(x), 1, -1)
            x = block.to_raster(solve(stream, noise, sos, None, noise, BLOCK, 0.0)[0])
        self._append(u, x, features)

    @torch.no_grad()
    def clean(self) -> Tensor:
        """The whole window through the denoiser, (B, T, N, D)."""
        clip = torch.stack(self.noisy, dim=1)
        history = torch.cat(self.features, dim=1) if self.features else None
        return self.flow.denoise(clip, self.grid, None, history)

    def decode(self, codec: object, clean: Tensor) -> Tensor:
        """The whole window's latents (B, T, N, D) as one clip of frames."""
        latents = self.flow.latents(clean, self.grid)
        return codec.decode(latents, codec.initial_state(len(latents)))[0]  # type: ignore[attr-defined]


@torch.no_grad()
def exact(
    flow: Flow, context: object, w: Tensor, features: Tensor | None, guidance: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The token-by-token inverse of one frame behind an exact context: u and noisy tokens (B, 1, N, D)."""
    reserved = flow.deep.reserve(context)  # type: ignore[arg-type]
    u = flow.deep.solve(reserved, w, features, guidance, 0.0, exact=True).v[:, None]
    flow.deep.release(reserved)
    return u, flow.shallow_inverse(u, reserved.grid, 0.0, exact=True)[0]
