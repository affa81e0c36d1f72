"""The deep block: the one autoregressive map that looks across frames and at conditions.

Ways through it, one set of weights: a whole clip in one pass (training, density); with the past in the K/V cache, a
frame of few tokens inverted one by one, whose K/V are then exact as they stand (`invert`), or a frame of many tokens
solved by Jacobi (`solve`) followed by one causal pass over the accepted tokens that writes exact K/V (`commit`).
`Context` is everything the block remembers; what happens when its window is full is in `window.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from worldmodel.flow.affine import Affine, affine_from_head, guide
from worldmodel.flow.attention import Room, plan_run
from worldmodel.flow.block import Block
from worldmodel.flow.cache import Cohort, KVCache
from worldmodel.flow.context import Context, appended
from worldmodel.flow.jacobi import Solution, jacobi, sequential
from worldmodel.flow.native import Past
from worldmodel.flow.rope import (
    Rotary,
    concat_rotary,
    frame_rotary,
    frame_turns,
    text_rotary,
    turns,
)
from worldmodel.records import replace


def _spread(features: Tensor | None, tokens: int) -> Tensor | None:
    """Features of frames (B, T, E) to the positions that predict them (B, T * N, E)."""
    return None if features is None else features.repeat_interleave(tokens, dim=1)


@dataclass(frozen=True)
class Committed:
    """Affine maps (S, B, frames, N, D), raster order, of accepted tokens: S of them, under the condition, then under none
    (where the pass was needed), then of the guided sampler (where there is guidance).
    """

    maps: Affine

    @staticmethod
    def of(model: Affine, unconditional: Affine | None, guided: Affine | None) -> Committed:
        """From maps (B, frames, N, D)."""
        known = [affine for affine in (model, unconditional, guided) if affine is not None]
        return Committed(Affine(*(torch.stack(each) for each in zip(*known, strict=True))))

    def _at(self, index: int) -> Affine | None:
        mu, sigma = self.maps
        return Affine(mu[index], sigma[index]) if index < len(mu) else None

    @property
    def model(self) -> Affine:
        """(B, frames, N, D), under the condition."""
        return Affine(self.maps.mu[0], self.maps.sigma[0])

    @property
    def unconditional(self) -> Affine | None:
        """(B, frames, N, D), under none."""
        return self._at(1)

    @property
    def guided(self) -> Affine | None:
        """(B, frames, N, D), of the guided sampler."""
        return self._at(2)


Parameters = Callable[[], Affine]
Pair = Callable[[Parameters, Parameters], tuple[Affine, Affine]]


def in_turn(model: Parameters, uncond: Parameters) -> tuple[Affine, Affine]:
    """Both maps, one after the other."""
    last = uncond()
    return model(), last


class DeepBlock(Block):
    """See the module's text. Tokens are in the block's own order inside these methods unless said otherwise.

    ``pair`` evaluates the two maps that guidance needs; `worldmodel.parallel` gives each to a process of its own.
    """

    pair: Pair = staticmethod(in_turn)

    # ---- a whole clip in one pass -------------------------------------------------------------------------------
    def clip_parameters(
        self, u: Tensor, grid: tuple[int, int], text: Tensor | None, features: Tensor | None
    ) -> Affine:
        """Affine parameters (B, T, N, D) of a clip u (B, T, N, D), both in raster order."""
        t = self.transformer
        frames, tokens = u.shape[1:3]
        v = rearrange(self.to_own(u), "b t n d -> b (t n) d")
        rotary = frame_rotary(grid, 0, frames, self.scale, t.head_dim, u.device)
        x = t.embed(self.shifted(v), _spread(features, tokens))
        if text is not None:
            rotary, x = self._with_text(rotary, x, text)
        out = t.head(t.run(x, rotary)[:, -v.shape[1] :])
        return self._raster(affine_from_head(out, self.soft_clip), tokens)

    def _raster(self, affine: Affine, tokens: int) -> Affine:
        """(B, T * N, D) in own order to (B, T, N, D) in raster order."""
        return Affine(*(self.to_raster(rearrange(a, "b (t n) d -> b t n d", n=tokens)) for a in affine))

    def _with_text(self, rotary: Rotary, x: Tensor, text: Tensor) -> tuple[Rotary, Tensor]:
        t = self.transformer
        table = text_rotary(text.shape[1], 0, self.scale, t.head_dim, x.device)
        return concat_rotary(table, rotary), torch.cat((t.embed_text(text), x), dim=1)

    # ---- with the past in the cache -------------------------------------------------------------------------------
    def start(
        self,
        rows: int,
        grid: tuple[int, int],
        window: int,
        text: Tensor | None = None,
        uncond_text: Tensor | None = None,
        features: int = 0,
    ) -> Context:
        """An empty context of ``rows`` sequences; condition tokens, if any, are already in the caches."""
        tokens = grid[0] * grid[1]
        room = (window + 1) * tokens
        new_zeros = self.sos.to(torch.promote_types(self.sos.dtype, torch.float32)).new_zeros
        return Context(
            grid,
            self.begin(rows, text, 0, room),
            None if uncond_text is None else self.begin(rows, uncond_text, 0, room),
            new_zeros(rows, window, tokens, self.sos.shape[-1]),
            new_zeros(rows, window, features) if features else None,
            text,
            uncond_text,
        )

    def begin(self, rows: int, text: Tensor | None, first: int, room: int) -> KVCache:
        """K/V of ``rows`` sequences without frames: condition tokens (B, L, text_dim) at positions that end before
        frame ``first``, and free slots for ``room`` tokens.
        """
        cohort = Cohort(rows, 0, first, ())
        if text is None:
            return KVCache((cohort,))
        length = text.shape[1]
        cohort = cohort.reserve(self.kv_shape(), length, length + room)
        t = self.transformer
        rotary = text_rotary(length, first, self.scale, t.head_dim, text.device)
        t.extend(t.embed_text(text), plan_run([Room(cohort, length)], turns(rotary), length, 1, 0, length))
        return KVCache((replace(cohort.extended(length, 0), prefix=length),))

    def reserve(self, context: Context, frames: int = 1) -> Context:
        """The context with free K/V slots for ``frames`` more frames behind every cohort."""
        shape, per_frame = self.kv_shape(), context.u.shape[2]

        def grow(cohort: Cohort) -> Cohort:
            windows = 2 if cohort.first else 1  # one that rolls moves a whole length before it is copied
            room = cohort.prefix + (windows * context.window + 1) * per_frame
            if cohort.segments and cohort.segments[-1].fold > 1:  # a branch: what is left of the window
                room = (context.window + 1 - cohort.frames) * per_frame
            return cohort.reserve(shape, frames * per_frame, room)

        return replace(
            context,
            cache=KVCache(tuple(map(grow, context.cache.cohorts))),
            uncond=None if context.uncond is None else KVCache(tuple(map(grow, context.uncond.cohorts))),
        )

    @contextmanager
    def given_back(self, reserved: Context, frames: int = 1) -> Iterator[None]:
        """`release` where what is done meanwhile fails: the state that was to go on is then as it was."""
        try:
            yield
        except BaseException:
            self.release(reserved, frames)
            raise

    def release(self, context: Context, frames: int = 1) -> None:
        """Give back what `reserve` claimed."""
        for cache in (context.cache, context.uncond):
            for cohort in cache.cohorts if cache is not None else ():
                cohort.release(frames * context.u.shape[2])

    def _turns(self, context: Context, cache: KVCache, frames: int) -> Tensor:
        """Rotations of the next ``frames`` frames: (frames * N, K / 2), or with a leading B where rows differ."""
        head_dim, device = self.transformer.head_dim, context.u.device
        tables = [
            frame_turns(context.grid, c.next_position, frames, self.scale, head_dim, device)
            for c in cache.cohorts
        ]
        if all(table is tables[0] for table in tables):
            return tables[0]
        return torch.stack([x for x, c in zip(tables, cache.cohorts, strict=True) for _ in range(c.rows)])

    def _run(self, v: Tensor, context: Context, cache: KVCache, features: Tensor | None) -> Affine:
        """Affine parameters of a run v (B, frames * N, D) behind the cached past."""
        t = self.transformer
        per_frame, tokens = context.u.shape[2], v.shape[1]
        if t.native is not None and v.dtype == torch.float32:
            frames = tokens // per_frame

            def turned(x: Tensor) -> Tensor:  # each frame from own order to raster, or back
                return self.to_own(x.unflatten(1, (frames, per_frame))).flatten(1, 2)

            affine = t.native.extend(
                self.order, self.past(context, cache, frames), turned(v), features, frames
            )
            return Affine(*map(turned, affine))
        rooms = [Room(c, tokens) for c in cache.cohorts]
        run = plan_run(rooms, self._turns(context, cache, tokens // per_frame), tokens, 1, 0, tokens)
        x = t.embed(self.shifted(v, self._before(context)), _spread(features, per_frame))
        return affine_from_head(t.head(t.extend(x, run)), self.soft_clip)

    def past(self, context: Context, cache: KVCache, frames: int) -> Past:
        """What a run of ``frames`` frames has behind it, as the kernels read it."""
        head_dim, device = self.transformer.head_dim, context.u.device
        turns = [
            frame_turns(context.grid, c.next_position, frames, self.scale, head_dim, device)
            for c in cache.cohorts
        ]
        last = context.u[:, -1, 0 if self.flip else -1].to(torch.float32)
        return Past(cache.cohorts, turns, last if last.stride(-1) == 1 else last.contiguous())

    def _before(self, context: Context) -> Tensor:
        """The token before the run, (B, 1, D): the last one of the last frame, or SOS where there is none."""
        last = self.to_own(context.u[:, -1])[:, -1:]
        fresh = [c.next_position == 0 for c in context.cache.cohorts for _ in range(c.rows)]
        if not any(fresh):
            return last
        sos = self.sos.to(last.dtype).expand(last.shape)
        if all(fresh):
            return sos
        return torch.where(torch.tensor(fresh, device=last.device)[:, None, None], sos, last)

    def _unconditional(self, v: Tensor, context: Context) -> Affine:
        """Parameters under no condition: past the empty prompt, if there is such a past, and without this run's action.

        The past's actions stay: what is left out is what this chunk is told.
        """
        return self._run(v, context, context.cache if context.uncond is None else context.uncond, None)

    def invert(
        self,
        context: Context,
        w: Tensor,
        features: Tensor | None,
        guidance: float = 0.0,
        want_unconditional: bool = False,
    ) -> tuple[Context, Tensor, Committed]:
        """Invert one frame token by token: noise w (B, N, D) to u (B, N, D), both raster, exactly, and committed.

        Each pass adds one token to the K/V and yields its affine map, so no pass comes after the last token. Passes
        under the condition and under none (see `commit`) run as two streams of one. ``features`` (B, 1, E).
        ``context`` must be reserved for two frames; the second one's slots are scratch.
        """
        t = self.transformer
        tokens = w.shape[1]
        both = context.uncond is not None or guidance != 0 or want_unconditional
        streams = 2 if both and context.uncond is None else 1
        caches = [context.cache] if context.uncond is None else [context.cache, context.uncond]
        rooms = [[Room(c, streams * tokens, clear=True) for c in cache.cohorts] for cache in caches]
        turns = [self._turns(context, cache, 1) for cache in caches]
        action = None
        if t.proj_action is not None and features is not None:
            action = t.proj_action(features.to(t.proj_action.weight.dtype))
        own, token = self.to_own(w), self._before(context)
        tokens_out, maps = [], []
        for i in range(tokens):
            plain = t.embed(token, None)
            x = plain if action is None else plain + action
            inputs = [torch.cat((x, plain), dim=1)] if streams == 2 else [x, plain][: len(caches)]
            outputs = [
                t.extend(y, plan_run(r, z[..., i : i + 1, :], tokens, streams, i, i + 1))
                for y, r, z in zip(inputs, rooms, turns, strict=True)
            ]
            affine = affine_from_head(
                t.head(torch.cat(outputs, dim=1) if both else outputs[0]), self.soft_clip
            )
            model = Affine(*(a[:, :1] for a in affine))
            uncond = Affine(*(a[:, 1:] for a in affine)) if both else None
            guided = guide(model, uncond, guidance) if uncond is not None and guidance != 0 else None
            token = (model if guided is None else guided).inverse(own[:, i : i + 1])
            tokens_out.append(token)
            maps.append((model, uncond, guided))
        solved = torch.cat(tokens_out, dim=1)
        if context.uncond is not None and features is not None:
            self._run(solved, context, context.uncond, features)  # as in `commit`: that past has this action
        u = self.to_raster(solved)
        after = self.extended(context, u[:, None], features)
        self.release(after)

        def together(index: int) -> Affine | None:
            each = [m[index] for m in maps]
            known = [a for a in each if a is not None]
            if not known:
                return None
            return Affine(
                *(self.to_raster(torch.cat([a[j] for a in known], dim=1))[:, None] for j in range(2))
            )

        model_map = together(0)
        assert model_map is not None
        return after, u, Committed.of(model_map, together(1), together(2))

    def solve(
        self,
        context: Context,
        w: Tensor,
        features: Tensor | None,
        guidance: float,
        tolerance: float,
        exact: bool = False,
    ) -> Solution:
        """Invert one frame: noise w (B, N, D) to u, both raster. ``context`` must be reserved; its slots are scratch.

        ``features`` (B, 1, E). ``exact`` goes token by token instead of by Jacobi.
        """

        def parameters(v: Tensor) -> Affine:
            if guidance == 0:
                return self._run(v, context, context.cache, features)
            model, uncond = self.pair(
                lambda: self._run(v, context, context.cache, features),
                lambda: self._unconditional(v, context),
            )
            return guide(model, uncond, guidance)

        w = self.to_own(w)
        if exact:
            rows = w.shape[0]
            sweeps = torch.full((rows,), w.shape[1], device=w.device)
            solution = Solution(sequential(parameters, w), sweeps, torch.zeros(rows, device=w.device))
        else:
            solution = jacobi(parameters, w, self._first_guess(context, w), tolerance)
        return solution._replace(v=self.to_raster(solution.v))

    def _first_guess(self, context: Context, w: Tensor) -> Tensor:
        """The previous frame's solution at the same positions (STARFlow-V's video-aware initialisation), else the noise."""
        known = torch.tensor([f > 0 for f in context.frames], device=w.device)
        return torch.where(known[:, None, None], self.to_own(context.u[:, -1]), w)

    def commit(
        self,
        context: Context,
        u: Tensor,
        features: Tensor | None,
        guidance: float = 0.0,
        want_unconditional: bool = False,
    ) -> tuple[Context, Committed]:
        """One causal pass over accepted tokens u (B, frames, N, D), raster order: exact K/V and exact affine terms.

        ``context`` must be reserved for as many frames; ``features`` (B, frames, E). The pass under no condition runs
        where a cache of its own must be kept up, where guidance needs it, or where it is asked for.
        """
        v = rearrange(self.to_own(u), "b t n d -> b (t n) d")
        uncond = None
        if context.uncond is not None or guidance != 0 or want_unconditional:
            uncond = self._unconditional(v, context)
        if context.uncond is not None and features is not None:
            self._run(v, context, context.uncond, features)  # writes the K/V of a past that has this action
        model = self._run(v, context, context.cache, features)
        guided = guide(model, uncond, guidance) if uncond is not None and guidance != 0 else None

        after = self.extended(context, u, features)
        tokens = u.shape[2]
        terms = Committed.of(
            self._raster(model, tokens),
            None if uncond is None else self._raster(uncond, tokens),
            None if guided is None else self._raster(guided, tokens),
        )
        return after, terms

    def append(self, context: Context, u: Tensor, features: Tensor | None) -> Context:
        """The context after `commit`, for whoever does not ask for the affine terms."""
        native = self.transformer.native
        if native is None or context.uncond is not None or u.dtype != torch.float32:
            return self.commit(context, u, features)[0]
        frames = u.shape[1]
        native.extend(
            self.order,
            self.past(context, context.cache, frames),
            u.flatten(1, 2),
            features,
            frames,
            maps=False,
        )
        return self.extended(context, u, features)

    def extended(self, context: Context, u: Tensor, features: Tensor | None) -> Context:
        """The context after u (B, frames, N, D), whose K/V lie in the reserved slots."""
        frames = u.shape[1]

        def extend(cache: KVCache) -> KVCache:
            return KVCache(tuple(c.extended(frames * u.shape[2], frames) for c in cache.cohorts))

        history = context.features
        if history is not None:
            new = history.new_zeros(len(u), frames, history.shape[-1]) if features is None else features
            history = appended(history, new.to(history.dtype))
        return replace(
            context,
            cache=extend(context.cache),
            uncond=None if context.uncond is None else extend(context.uncond),
            u=appended(context.u, u),
            features=history,
        )
