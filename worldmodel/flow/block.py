"""The transformer behind every block and the denoiser, and the autoregressive block built on it.

A token's way: projection in -> pre-norm layers (rotary attention, GELU MLP) -> RMSNorm -> head -> affine map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from worldmodel.flow.affine import Affine, affine_from_head
from worldmodel.flow.attention import Attention, Room, Run, plan_run
from worldmodel.flow.cache import Cohort, KVShape
from worldmodel.flow.native import LayerParts, NativeTransformer, Order, Past, TransformerParts
from worldmodel.flow.order import reorder
from worldmodel.flow.rope import Rotary, frame_rotary, frame_turns
from worldmodel.native import library
from worldmodel.packed import Linear, Packable


class MLP(nn.Module):
    """Pre-norm GELU (exact) MLP of 4x width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = Linear(width, 4 * width)
        self.down = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D), the residual included."""
        return self.down.plus(self.up.gelu(self.norm(x)), x)


class Layer(nn.Module):
    """Attention and MLP, each with a residual."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.attention = Attention(width, head_dim)
        self.mlp = MLP(width)


class FinalNorm(nn.Module):
    """RMSNorm in float32 (eps 1e-6) whose weight is an offset: ``x / rms(x) * (1 + w)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        y = x if x.dtype == torch.float64 else x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)
        return (y * (1.0 + self.weight.to(y.dtype))).to(x.dtype)


WIDEST = 512
"""Wider transformers are left to torch, which spreads one sequence over several threads; the kernels spread sequences."""


class Transformer(Packable):
    """Tokens (B, S, ``inputs``) to (B, S, ``outputs``); optional condition tokens in front, optional action features added.

    Hidden states have the dtype of the weights (bfloat16 for the published models); tokens, statistics of the norms,
    rotations and the head's outputs are float32, so solves and densities are.

    ``text_dim`` > 0 adds the projection of condition tokens; ``action_dim`` > 0 a zero-initialised projection of
    action features, so that a model without actions is unchanged when they are added.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        width: int,
        layers: int,
        head_dim: int,
        text_dim: int = 0,
        action_dim: int = 0,
        final_norm: bool = True,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.proj_in = Linear(inputs, width)
        self.proj_text = Linear(text_dim, width) if text_dim else None
        self.proj_action = Linear(action_dim, width, bias=False) if action_dim else None
        self.layers = nn.ModuleList(Layer(width, head_dim) for _ in range(layers))
        self.final_norm = FinalNorm(width) if final_norm else nn.Identity()
        self.proj_out = Linear(width, outputs)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)
        if self.proj_action is not None:
            nn.init.zeros_(self.proj_action.weight)

    @property
    def native(self) -> NativeTransformer | None:
        """The same weights for the kernels of `worldmodel.native`, where they serve; laid out at first use."""
        if self._waiting:
            kernels = library()
            self._kernel = (
                NativeTransformer(kernels, self._parts()) if kernels and self._native_serves() else None
            )
            self._waiting = False
        return cast("NativeTransformer | None", self._kernel)

    def _parts(self) -> TransformerParts:
        layers = []
        for module in self.layers:
            attention, mlp = cast(Layer, module).attention, cast(Layer, module).mlp
            maps = attention.qkv, attention.out, mlp.up, mlp.down
            layers.append(LayerParts((attention.norm, mlp.norm), maps))
        gain = 1.0 + self.final_norm.weight if isinstance(self.final_norm, FinalNorm) else None
        return TransformerParts(layers, self.proj_in, self.proj_action, self.proj_out, gain, self.head_dim)

    def _native_serves(self) -> bool:
        """Plain linear maps, whole heads of a width that vectors divide, and not wide."""
        width = self.proj_in.out_features
        layers = [cast(Layer, module) for module in self.layers]
        maps = [self.proj_in, self.proj_out]
        maps += [
            m
            for layer in layers
            for m in (layer.attention.qkv, layer.attention.out, layer.mlp.up, layer.mlp.down)
        ]
        return (
            all(type(each) is Linear for each in maps)
            and all(layer.attention.heads * self.head_dim == width for layer in layers)
            and self.head_dim % 16 == 0
            and width <= WIDEST
            and self.proj_in.in_features <= 4 * width
        )

    def embed(self, tokens: Tensor, actions: Tensor | None) -> Tensor:
        """Projected tokens (B, S, D), plus the embedding of action features (B, S, E) where the model has them."""
        dtype = self.proj_in.weight.dtype
        x = self.proj_in(tokens.to(dtype))
        if self.proj_action is not None and actions is not None:
            x = x + self.proj_action(actions.to(dtype))
        return x

    def embed_text(self, text: Tensor) -> Tensor:
        """Condition tokens (B, L, text_dim) to (B, L, D); only for a transformer that has them."""
        assert self.proj_text is not None
        return self.proj_text(text.to(self.proj_text.weight.dtype))

    def run(self, x: Tensor, rotary: Rotary, mask: Tensor | str = "causal") -> Tensor:
        """The layers alone, over whole sequences: hidden states (B, S, D) to (B, S, D). ``mask``: see `Attention`."""
        for module in self.layers:
            layer = cast(Layer, module)
            x = layer.mlp(layer.attention(x, rotary, mask))
        return x

    def newest(self, x: Tensor, turns: Tensor, mask: Tensor, asking: Sequence[int]) -> Tensor:
        """The layers alone, for the last tokens of whole sequences (B, S, D): each layer goes on with its last
        ``asking`` ones. turns (S, K / 2), ``mask`` (..., S, S): see `Attention.newest`. Inference only.
        """
        for module, count in zip(self.layers, asking, strict=True):
            layer = cast(Layer, module)
            x = layer.mlp(layer.attention.newest(x, turns[-x.shape[1] :], mask, count))
        return x

    def extend(self, x: Tensor, run: Run) -> Tensor:
        """The layers alone, over a run behind a cached past: hidden states (B, R, D) to (B, R, D)."""
        for index, module in enumerate(self.layers):
            layer = cast(Layer, module)
            x = layer.mlp(layer.attention.extend(x, run, index))
        return x

    def head(self, x: Tensor) -> Tensor:
        """Hidden states (B, S, D) to outputs (B, S, ``outputs``), in at least float32."""
        x, out = self.final_norm(x), self.proj_out
        if x.dtype in (
            torch.bfloat16,
            torch.float16,
        ):  # the outputs move tokens: 8 bits of mantissa are too few
            return F.linear(x.float(), out.weight.float(), out.bias.float())
        return out(x)


class Block(nn.Module):
    """One autoregressive affine block: ``mu_i, sigma_i = Transformer(SOS, v_1 .. v_{i-1})``.

    Used as it is for the shallow blocks (each frame alone). The deep block adds the past and the conditions: `deep.py`.
    Tokens come and go in raster order; inside, in the block's own order.
    """

    def __init__(
        self, transformer: Transformer, dim: int, flip: bool, soft_clip: float, scale: float
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.scale = scale
        self.sos = nn.Parameter(torch.randn(dim) * 0.02)
        self.flip = flip
        self.soft_clip = soft_clip

    def shifted(self, v: Tensor, before: Tensor | None = None) -> Tensor:
        """Inputs of a run in own order: the token before it (SOS, or ``before`` (B, 1, D)), then all but the last."""
        first = self.sos.to(v.dtype).expand(v.shape[0], 1, -1) if before is None else before
        return torch.cat((first, v[:, :-1]), dim=1)

    @property
    def order(self) -> Order:
        """What the kernels have to know of the block beside its transformer."""
        return Order(self.sos, self.flip, self.soft_clip)

    def alone(self, rows: int, grid: tuple[int, int]) -> Past:
        """No past: of a frame that is seen alone."""
        turns = frame_turns(grid, 0, 1, self.scale, self.transformer.head_dim, self.sos.device)
        return Past((Cohort(rows, 0, 0, ()),), (turns,), None)

    def frame_parameters(self, v: Tensor, grid: tuple[int, int]) -> Affine:
        """Affine parameters (B, N, D) of one frame alone, from its own tokens (B, N, D), all in own order."""
        native = self.transformer.native
        if (
            native is not None
            and v.dtype == torch.float32
            and not (v.requires_grad and torch.is_grad_enabled())
        ):
            raster = native.extend(self.order, self.alone(len(v), grid), self.to_raster(v), None, 1)
            return Affine(*map(self.to_own, raster))
        rotary = frame_rotary(grid, 0, 1, self.scale, self.transformer.head_dim, v.device)
        x = self.transformer.run(self.transformer.embed(self.shifted(v), None), rotary)
        return affine_from_head(self.transformer.head(x), self.soft_clip)

    def kv_shape(self) -> KVShape:
        """The shape of this block's K/V pages."""
        t = self.transformer
        own = cast(Layer, t.layers[0]).attention.heads  # this process's, where heads are spread over several
        return KVShape(len(t.layers), own, t.head_dim, self.sos.dtype, self.sos.device)

    def invert_frame(self, w: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Invert one frame alone, token by token: w (B, N, D) to v and the elementwise log-determinant, all raster."""
        t = self.transformer
        rows, tokens = w.shape[:2]
        rooms = [Room(Cohort(rows, 0, 0, ()).reserve(self.kv_shape(), tokens, tokens), tokens, clear=True)]
        turns = frame_turns(grid, 0, 1, self.scale, t.head_dim, w.device)
        own, token = self.to_own(w), self.sos.to(w.dtype).expand(rows, 1, -1)
        solved, sigmas = [], []
        for i in range(tokens):
            run = plan_run(rooms, turns[i : i + 1], tokens, 1, i, i + 1)
            affine = affine_from_head(t.head(t.extend(t.embed(token, None), run)), self.soft_clip)
            token = affine.inverse(own[:, i : i + 1])
            solved.append(token)
            sigmas.append(affine.sigma)
        v, sigma = (self.to_raster(torch.cat(each, dim=1)) for each in (solved, sigmas))
        return v, -torch.log(sigma)

    def to_own(self, tokens: Tensor) -> Tensor:
        """Raster order (..., N, D) to the block's own."""
        return reorder(tokens, self.flip)

    to_raster = to_own
