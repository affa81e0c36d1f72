"""The whole flow: noisy latents <-> noise, and the exact density in between.

    forward   x~ -> shallow blocks 0 .. K-2 (each frame alone) -> u -> deep block (all frames, condition) -> z
    inverse   z -> deep block -> u -> shallow blocks K-2 .. 0 -> x~, then the denoiser (where there is one) -> x

Axis letters: B batch, T latent frames, N tokens of a frame, D token dimension (p*p*C), C channels, h w latent grid,
L condition tokens, E action features. Tokens are in raster order between blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from worldmodel.errors import ConfigError, InputError
from worldmodel.files import require_at_least
from worldmodel.flow.affine import Affine, standard_normal_log_prob
from worldmodel.flow.block import Block, Transformer
from worldmodel.flow.context import Context
from worldmodel.flow.deep import Committed, DeepBlock
from worldmodel.flow.denoiser import SCORE_SCALE, Denoiser
from worldmodel.flow.jacobi import jacobi, sequential
from worldmodel.flow.native import NativeFlow
from worldmodel.flow.order import flips, patchify, unpatchify
from worldmodel.flow.window import make_room
from worldmodel.native import library
from worldmodel.packed import Packable


@dataclass(frozen=True)
class FlowConfig:
    """Shape of a STARFlow-V flow. Defaults are the published 7B model's where it fixes them.

    in_channels: latent channels C. patch_size: p. channels, top_channels: widths of the shallow blocks and the
    denoiser, and of the deep block. layers_per_block: one entry a block, the last is the deep block.
    text_tokens, text_dim: condition tokens L and their width, 0 for none. action_features: E, 0 for none.
    noise_std: sigma_n of the noise that the flow's density includes. window, context: latent frames kept, and kept
    when a full window is re-encoded. denoiser_layers: 0 for a flow without a learned denoiser, whose own score takes the
    noise off (`worldmodel.denoising`).
    """

    in_channels: int
    channels: int
    top_channels: int
    layers_per_block: tuple[int, ...]
    patch_size: int = 1
    head_dim: int = 64
    position_scale: float = 32.0
    text_tokens: int = 0
    text_dim: int = 0
    action_features: int = 0
    soft_clip: float = 4.0
    final_norm: bool = True
    noise_std: float = 0.5
    window: int = 21
    context: int = 16
    denoiser_channels: int = 0
    denoiser_layers: int = 8
    denoiser_window: int = 10
    denoiser_look_ahead: int = 2
    denoiser_conditional: bool = True

    def __post_init__(self) -> None:
        """Check what cannot be built.

        Raises:
            ConfigError: naming the field, what it is, and what it may be.
        """
        require_at_least(1, self, "in_channels", "channels", "top_channels", "layers_per_block", "patch_size")
        require_at_least(1, self, "head_dim", "window", "context", "denoiser_look_ahead")
        require_at_least(0, self, "text_tokens", "text_dim", "action_features", "soft_clip")
        require_at_least(0, self, "denoiser_channels", "denoiser_layers", "denoiser_window")
        checks = [
            (len(self.layers_per_block) >= 1, "layers_per_block", "at least one block"),
            (self.head_dim % 4 == 0 and self.head_dim >= 16, "head_dim", "a multiple of 4, at least 16"),
            (self.channels % self.head_dim == 0, "channels", "a multiple of head_dim"),
            (self.top_channels % self.head_dim == 0, "top_channels", "a multiple of head_dim"),
            (self.noise_std > 0, "noise_std", "positive"),
            (self.context < self.window or self.window == 1, "context", "below window"),
            ((self.text_tokens > 0) == (self.text_dim > 0), "text_dim", "set together with text_tokens"),
        ]
        for good, name, expected in checks:
            if not good:
                raise ConfigError(f"flow config: {name} is {getattr(self, name)}, expected {expected}")

    @property
    def token_dim(self) -> int:
        """D, dimensions of a token."""
        return self.in_channels * self.patch_size**2


class Density(NamedTuple):
    """Result of a forward pass over a clip of noisy latents.

    z: (B, T, N, D) noise tokens. u: (B, T, N, D) deep-block inputs. log_prob_elements: (B, T, N, D) nats on the raster
    grid, whose sum over everything but B is the log-density of the clip.
    """

    z: Tensor
    u: Tensor
    log_prob_elements: Tensor

    @property
    def log_prob(self) -> Tensor:
        """(B, T) nats per latent frame, given the frames before it."""
        return self.log_prob_elements.sum((-2, -1))


class Imagined(NamedTuple):
    """What `Flow.imagine` yields: the context after the frame, and as it was reserved for it; its noisy tokens x and
    deep-block inputs u, (B, 1, N, D); the elementwise log-determinant of the shallow blocks at x, and the deep block's maps
    at u; Jacobi sweeps (B,) of the deep block, and the residual (B,) of the last.
    """

    context: Context
    reserved: Context
    x: Tensor
    u: Tensor
    log_det: Tensor
    terms: Committed
    sweeps: Tensor
    residual: Tensor


ONE_BY_ONE = 8
"""Frames of at most so many tokens are inverted token by token: Jacobi takes about as many sweeps to the default
tolerance, each over the whole frame, and a commit after them."""


def _no_sweeps(w: Tensor) -> tuple[Tensor, Tensor]:
    """Passes and residual of a frame (B, N, D) that is inverted token by token: one for each, and none."""
    return torch.full((len(w),), w.shape[1], device=w.device), torch.zeros(len(w), device=w.device)


class Flow(Packable):
    """See the module's text."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = c = config
        text = c.text_dim
        order = flips(len(c.layers_per_block))
        self.shallow = nn.ModuleList(
            Block(
                Transformer(c.token_dim, 2 * c.token_dim, c.channels, n, c.head_dim, final_norm=c.final_norm),
                c.token_dim,
                flip,
                c.soft_clip,
                c.position_scale,
            )
            for n, flip in zip(c.layers_per_block[:-1], order[:-1], strict=True)
        )
        self.deep = DeepBlock(
            Transformer(
                c.token_dim,
                2 * c.token_dim,
                c.top_channels,
                c.layers_per_block[-1],
                c.head_dim,
                text,
                c.action_features,
                c.final_norm,
            ),
            c.token_dim,
            order[-1],
            c.soft_clip,
            c.position_scale,
        )
        self.denoiser: Denoiser | None = None
        if c.denoiser_layers:
            self.denoiser = Denoiser(
                Transformer(
                    c.token_dim,
                    c.token_dim,
                    c.denoiser_channels or c.channels,
                    c.denoiser_layers,
                    c.head_dim,
                    text if c.denoiser_conditional else 0,
                    c.action_features if c.denoiser_conditional else 0,
                    c.final_norm,
                ),
                c.denoiser_look_ahead,
                c.denoiser_window,
                c.position_scale,
            )

    # ---- tokens ---------------------------------------------------------------------------------------------------
    def grid(self, latent_size: tuple[int, int]) -> tuple[int, int]:
        """Tokens (h, w) of a latent grid.

        Raises:
            InputError: the grid does not divide by the patch size.
        """
        p = self.config.patch_size
        if latent_size[0] % p or latent_size[1] % p:
            raise InputError(f"latent grid {latent_size} does not divide by patch_size {p}")
        return latent_size[0] // p, latent_size[1] // p

    def tokens(self, x: Tensor) -> Tensor:
        """Latents (B, T, C, h, w) to tokens (B, T, N, D)."""
        return patchify(x, self.config.patch_size)

    def latents(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, T, N, D) to latents (B, T, C, h, w)."""
        return unpatchify(tokens, self.config.patch_size, grid)

    @property
    def shallow_blocks(self) -> list[Block]:
        """Blocks 0 .. K-2, in the order of the forward pass."""
        return [cast(Block, block) for block in self.shallow]

    # ---- shallow blocks: each frame alone -------------------------------------------------------------------------
    def shallow_forward(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Noisy tokens (B, T, N, D) to u and the elementwise log-determinant, both (B, T, N, D)."""
        v, shape = rearrange(x, "b t n d -> (b t) n d"), x.shape
        log_det = torch.zeros_like(v)
        for block in self.shallow_blocks:
            own = block.to_own(v)
            affine = block.frame_parameters(own, grid)
            v = block.to_raster(affine.forward(own))
            log_det = log_det + block.to_raster(affine.log_det())
        return v.reshape(shape), log_det.reshape(shape)

    def shallow_inverse(
        self, u: Tensor, grid: tuple[int, int], tolerance: float, exact: bool = False
    ) -> tuple[Tensor, Tensor]:
        """u (B, T, N, D) to noisy tokens, and the sweeps summed over blocks (B, T)."""
        w, shape = rearrange(u, "b t n d -> (b t) n d"), u.shape
        sweeps = torch.zeros(w.shape[0], dtype=torch.int64, device=w.device)
        for block in reversed(self.shallow_blocks):
            own = block.to_own(w)

            def parameters(v: Tensor, block: Block = block) -> Affine:
                return block.frame_parameters(v, grid)

            if exact:
                solved = sequential(parameters, own)
            else:
                solved, used, _ = jacobi(parameters, own, own, tolerance)
                sweeps = sweeps + used
            w = block.to_raster(solved)
        return w.reshape(shape), sweeps.reshape(shape[:2])

    # ---- a frame of a session ----
    def imagine(
        self,
        context: Context,
        w: Tensor,
        features: Tensor | None,
        guidance: float,
        tolerance: float,
        want_unconditional: bool = False,
    ) -> Imagined:
        """Noise w (B, N, D) to the next frame, committed; ``context`` has room for it. See `DeepBlock.commit`."""
        alone = w.shape[1] <= ONE_BY_ONE
        native = self.native if alone and context.uncond is None and guidance == 0 else None
        frames = 2 if alone and (native is None or w.dtype != torch.float32) else 1
        reserved = self.deep.reserve(context, frames)
        with self.deep.given_back(reserved, frames):
            if frames == 2:
                return self._one_by_one(reserved, w, features, guidance, want_unconditional)
            if native is not None:
                return self._natively(native, reserved, w, features, want_unconditional)
            solved = self.deep.solve(reserved, w, features, guidance, tolerance)
            x, _ = self.shallow_inverse(solved.v[:, None], context.grid, tolerance)
            u, log_det = self.shallow_forward(
                x, context.grid
            )  # of x as it came out: exact, whatever the tolerance
            after, terms = self.deep.commit(reserved, u, features, guidance, want_unconditional)
            return Imagined(after, reserved, x, u, log_det, terms, solved.sweeps, solved.residual)

    def _natively(
        self,
        native: NativeFlow,
        reserved: Context,
        w: Tensor,
        features: Tensor | None,
        want_unconditional: bool,
    ) -> Imagined:
        """`imagine` token by token, by the kernels."""
        acts = None if features is None else features[:, 0]
        past = self.deep.past(reserved, reserved.cache, 1)
        alone = [b.alone(len(w), reserved.grid) for b in reversed(self.shallow_blocks)]
        made = native.invert(past, w, acts, 2 if want_unconditional else 1, alone)
        x, u, log_det = (y[:, None] for y in (made.x, made.u, made.log_det))
        terms = Committed(Affine(*(each[:, :, None] for each in made.maps)))
        after = self.deep.extended(reserved, u, features)
        return Imagined(after, reserved, x, u, log_det, terms, *_no_sweeps(w))

    def _one_by_one(
        self,
        reserved: Context,
        w: Tensor,
        features: Tensor | None,
        guidance: float,
        want_unconditional: bool,
    ) -> Imagined:
        """`imagine` token by token, by torch."""
        after, u, terms = self.deep.invert(reserved, w, features, guidance, want_unconditional)
        x, log_det = u, torch.zeros_like(u)
        for block in reversed(self.shallow_blocks):
            x, term = block.invert_frame(x, reserved.grid)
            log_det = log_det + term
        return Imagined(after, reserved, x[:, None], u[:, None], log_det[:, None], terms, *_no_sweeps(w))

    @property
    def native(self) -> NativeFlow | None:
        """The blocks for the kernels of `worldmodel.native`, where they serve; laid out at first use."""
        if self._waiting:
            blocks = [self.deep, *reversed(self.shallow_blocks)]
            served = [(native, b.order) for b in blocks if (native := b.transformer.native) is not None]
            kernels = library() if len(served) == len(blocks) else None
            self._kernel = NativeFlow(kernels, served) if kernels else None
            self._waiting = False
        return cast("NativeFlow | None", self._kernel)

    # ---- density of a clip ----------------------------------------------------------------------------------------
    def forward(
        self, x: Tensor, grid: tuple[int, int], text: Tensor | None = None, features: Tensor | None = None
    ) -> Density:
        """Exact density of noisy tokens x (B, T, N, D) in one pass; text (B, L, text_dim), features (B, T, E)."""
        u, log_det = self.shallow_forward(x, grid)
        affine = self.deep.clip_parameters(u, grid, text, features)
        z = affine.forward(u)
        return Density(z, u, standard_normal_log_prob(z) + affine.log_det() + log_det)

    # ---- sampling a clip ------------------------------------------------------------------------------------------
    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        grid: tuple[int, int],
        *,
        text: Tensor | None = None,
        uncond_text: Tensor | None = None,
        features: Tensor | None = None,
        guidance: float = 0.0,
        given: Tensor | None = None,
        window: int | None = None,
        context: int | None = None,
        tolerance: float = 1e-12,
        exact: bool = False,
    ) -> Tensor:
        """Noise tokens (B, T, N, D) to noisy tokens, frame by frame, as a session of `WorldModel` would.

        ``given``: (B, G, N, D) noisy tokens that the clip begins with (their noise is ignored). ``window`` and
        ``context`` override the configuration. ``exact`` inverts token by token instead of by Jacobi.
        """
        c = self.config
        window, keep = window or c.window, context or c.context
        state = self.deep.start(
            len(noise), grid, window, text, uncond_text if guidance else None, c.action_features
        )
        frames = []
        for t in range(noise.shape[1]):
            state = self.deep.reserve(make_room(self.deep, state, keep))
            action = None if features is None else features[:, t : t + 1]
            if given is not None and t < given.shape[1]:
                u, _ = self.shallow_forward(given[:, t : t + 1], grid)
            else:
                u = self.deep.solve(state, noise[:, t], action, guidance, tolerance, exact).v[:, None]
            state, _ = self.deep.commit(state, u, action)
            frames.append(u)
        x, _ = self.shallow_inverse(torch.cat(frames, dim=1), grid, tolerance, exact)
        return x if given is None else torch.cat((given, x[:, given.shape[1] :]), dim=1)

    # ---- denoiser -------------------------------------------------------------------------------------------------
    @property
    def denoiser_reach(self) -> int:
        """Noisy frames that denoising the newest one needs, itself included; 1 without a denoiser."""
        return 1 if self.denoiser is None else self.denoiser.reach

    def denoise(
        self,
        x: Tensor,
        grid: tuple[int, int],
        text: Tensor | None = None,
        features: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Noisy tokens (B, T, N, D) to clean ones: ``x~ - 0.3 s(x~)``; only for a flow that has a denoiser, see
        `Denoiser.score`.
        """
        assert self.denoiser is not None
        return x - SCORE_SCALE * self.denoiser.score(x, grid, text, features, valid)

    @torch.no_grad()
    def denoise_newest(
        self,
        x: Tensor,
        grid: tuple[int, int],
        text: Tensor | None = None,
        features: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """The last frame of `denoise`, (B, 1, N, D)."""
        assert self.denoiser is not None
        return x[:, -1:] - SCORE_SCALE * self.denoiser.newest_score(x, grid, text, features, valid)
