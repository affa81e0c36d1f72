"""The deep block: the one autoregressive map that looks across frames and at conditions.

Three ways through it, one set of weights: a whole clip in one pass (training, density), a frame solved by Jacobi with
the past in the K/V cache (`solve`), and one causal pass over accepted tokens that writes exact K/V (`commit`).
`Context` is everything the block remembers, as a frozen record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from einops import rearrange
from torch import Tensor

from worldmodel.errors import InputError
from worldmodel.flow.affine import Affine, affine_from_head, guide
from worldmodel.flow.block import Block, Layer
from worldmodel.flow.cache import Cohort, KVCache, KVShape
from worldmodel.flow.jacobi import Solution, jacobi, sequential
from worldmodel.flow.rope import Rotary, concat_rotary, frame_rotary, text_rotary


def repeat_rows(x: Tensor, n: int) -> Tensor:
    """Each row becomes n consecutive rows; a single row is expanded without a copy."""
    return x.expand(n, *x.shape[1:]) if x.shape[0] == 1 else x.repeat_interleave(n, dim=0)


@dataclass(frozen=True)
class Context:
    """What the deep block remembers of a batch of sequences (B rows).

    cache, uncond: K/V under the condition, and under the empty prompt (only where prompts are guided).
    u: (B, W, N, D) the last W = window deep-block inputs, raster order, right-aligned (older ones are zero).
    features: (B, W, E) action features of the same frames, or None. text, uncond_text: (B, L, text_dim) or None.
    grid: tokens (h, w) of a frame.
    """

    grid: tuple[int, int]
    cache: KVCache
    uncond: KVCache | None
    u: Tensor
    features: Tensor | None
    text: Tensor | None
    uncond_text: Tensor | None

    @property
    def frames(self) -> list[int]:
        """Latent frames of context, per row."""
        return self.cache.frames

    @property
    def window(self) -> int:
        """W, the most latent frames of context."""
        return self.u.shape[1]

    def fork(self, n: int) -> Context:
        """Each row becomes n consecutive rows; the past is shared."""

        def again(x: Tensor | None) -> Tensor | None:
            return None if x is None else repeat_rows(x, n)

        return Context(
            self.grid,
            self.cache.fork(n),
            None if self.uncond is None else self.uncond.fork(n),
            repeat_rows(self.u, n),
            again(self.features),
            again(self.text),
            again(self.uncond_text),
        )

    def select(self, rows: Sequence[int]) -> Context:
        """The given rows, in that order."""
        index = torch.tensor(list(rows), dtype=torch.long, device=self.u.device)

        def pick(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[index]

        return Context(
            self.grid,
            self.cache.select(rows),
            None if self.uncond is None else self.uncond.select(rows),
            self.u[index],
            pick(self.features),
            pick(self.text),
            pick(self.uncond_text),
        )

    def gathered(self) -> Context:
        """The same sequences with K/V of their own; see `KVCache.gathered`."""
        room = (2 * self.window + 1) * self.u.shape[2]
        uncond = None if self.uncond is None else self.uncond.gathered(room)
        return replace(self, cache=self.cache.gathered(room), uncond=uncond)

    @staticmethod
    def concat(parts: Sequence[Context]) -> Context:
        """Batches one after the other.

        Raises:
            InputError: some have a past under the empty prompt and some have none.
        """
        if len(parts) == 1:
            return parts[0]
        if len({p.uncond is None for p in parts}) > 1:
            raise InputError(
                "some of these sessions keep a past under the empty prompt, as guidance needs, and some do not; "
                "begin all of them in a world with guidance, or step the others with guidance once"
            )

        def join(name: str) -> Tensor | None:
            values = [getattr(p, name) for p in parts]
            return None if values[0] is None else torch.cat(values)

        unconds = [p.uncond for p in parts if p.uncond is not None]
        return Context(
            parts[0].grid,
            KVCache.concat(p.cache for p in parts),
            KVCache.concat(unconds) if unconds else None,
            torch.cat([p.u for p in parts]),
            join("features"),
            join("text"),
            join("uncond_text"),
        )


def _spread(features: Tensor | None, tokens: int) -> Tensor | None:
    """Features of frames (B, T, E) to the positions that predict them (B, T * N, E)."""
    return None if features is None else features.repeat_interleave(tokens, dim=1)


@dataclass(frozen=True)
class Committed:
    """Affine maps (B, frames, N, D), raster order, of accepted tokens: under the condition, under none (None where the
    pass was not needed), and of the guided sampler (None without guidance).
    """

    model: Affine
    unconditional: Affine | None
    guided: Affine | None


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
            self._begin(rows, text, 0, room),
            None if uncond_text is None else self._begin(rows, uncond_text, 0, room),
            new_zeros(rows, window, tokens, self.sos.shape[-1]),
            new_zeros(rows, window, features) if features else None,
            text,
            uncond_text,
        )

    def kv_shape(self) -> KVShape:
        """The shape of this block's K/V pages."""
        t = self.transformer
        heads = cast(
            Layer, t.layers[0]
        ).attention.heads  # this process's own, where heads are spread over several
        return KVShape(len(t.layers), heads, t.head_dim, self.sos.dtype, self.sos.device)

    def _begin(self, rows: int, text: Tensor | None, first: int, room: int) -> KVCache:
        cohort = Cohort(rows, 0, first, ())
        if text is None:
            return KVCache((cohort,))
        length = text.shape[1]
        cohort = cohort.reserve(self.kv_shape(), length, length + room)
        t = self.transformer
        rotary = text_rotary(length, first, self.scale, t.head_dim, text.device)
        t.run(t.embed_text(text), rotary, past=KVCache((cohort,)))
        return KVCache((replace(cohort.extended(length, 0), prefix=length),))

    def reserve(self, context: Context, frames: int = 1) -> Context:
        """The context with free K/V slots for ``frames`` more frames behind every cohort."""
        shape, per_frame = self.kv_shape(), context.u.shape[2]

        def grow(cohort: Cohort) -> Cohort:
            room = cohort.prefix + (2 * context.window + 1) * per_frame
            if cohort.segments and cohort.segments[-1].fold > 1:  # a branch: what is left of the window
                room = (context.window + 1 - cohort.frames) * per_frame
            return cohort.reserve(shape, frames * per_frame, room)

        return replace(
            context,
            cache=KVCache(tuple(map(grow, context.cache.cohorts))),
            uncond=None if context.uncond is None else KVCache(tuple(map(grow, context.uncond.cohorts))),
        )

    def release(self, context: Context, frames: int = 1) -> None:
        """Give back what `reserve` claimed."""
        for cache in (context.cache, context.uncond):
            for cohort in cache.cohorts if cache is not None else ():
                cohort.release(frames * context.u.shape[2])

    def _run(self, v: Tensor, context: Context, cache: KVCache, features: Tensor | None) -> Affine:
        """Affine parameters of a run v (B, frames * N, D) behind the cached past."""
        t = self.transformer
        frames = v.shape[1] // context.u.shape[2]
        tables = [
            frame_rotary(context.grid, c.next_position, frames, self.scale, t.head_dim, v.device)
            for c in cache.cohorts
        ]
        if all(table is tables[0] for table in tables):
            rotary = tables[0]
        else:
            each = [x for x, c in zip(tables, cache.cohorts, strict=True) for _ in range(c.rows)]
            rotary = Rotary(
                torch.stack([x.cos for x in each])[:, None], torch.stack([x.sin for x in each])[:, None]
            )
        x = t.embed(self.shifted(v, self._before(context)), _spread(features, context.u.shape[2]))
        return affine_from_head(t.head(t.run(x, rotary, past=cache)), self.soft_clip)

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
        frames = u.shape[1]
        v = rearrange(self.to_own(u), "b t n d -> b (t n) d")
        uncond = None
        if context.uncond is not None or guidance != 0 or want_unconditional:
            uncond = self._unconditional(v, context)
        if context.uncond is not None and features is not None:
            self._run(v, context, context.uncond, features)  # writes the K/V of a past that has this action
        model = self._run(v, context, context.cache, features)
        guided = guide(model, uncond, guidance) if uncond is not None and guidance != 0 else None

        def extend(cache: KVCache) -> KVCache:
            return KVCache(tuple(c.extended(v.shape[1], frames) for c in cache.cohorts))

        history = context.features
        if history is not None:
            new = history.new_zeros(len(u), frames, history.shape[-1]) if features is None else features
            history = torch.cat((history, new.to(history.dtype)), dim=1)[:, -context.window :]
        after = replace(
            context,
            cache=extend(context.cache),
            uncond=None if context.uncond is None else extend(context.uncond),
            u=torch.cat((context.u, u), dim=1)[:, -context.window :],
            features=history,
        )
        tokens = u.shape[2]
        terms = Committed(
            self._raster(model, tokens),
            None if uncond is None else self._raster(uncond, tokens),
            None if guided is None else self._raster(guided, tokens),
        )
        return after, terms

    # ---- the window -----------------------------------------------------------------------------------------------
    def make_room(self, context: Context, keep: int | None) -> Context:
        """A context in which every row has room for one more frame.

        ``keep`` frames (at most ``window - 1``): a full row restarts from its last ``keep`` u with positions from 0
        (STARFlow-V's rule for long videos). ``None``: rolling, the oldest frame is evicted and the others keep their K/V.
        """
        full = [c.frames >= context.window for c in context.cache.cohorts]
        if not any(full):
            return context
        if keep is None:
            return self._roll(context)
        keep = min(keep, context.window - 1)
        if all(full):
            return self.reencode(context, keep)
        parts, row = [], 0
        for cohort, is_full in zip(context.cache.cohorts, full, strict=True):
            part = context.select(range(row, row + cohort.rows))
            parts.append(self.reencode(part, keep) if is_full else part)
            row += cohort.rows
        return Context.concat(parts)

    def reencode(self, context: Context, keep: int) -> Context:
        """The context of the last ``keep`` u (every row has as many) under its condition as it is, positions from 0."""
        history = context.features
        fresh = self.start(
            len(context.u),
            context.grid,
            context.window,
            context.text,
            context.uncond_text,
            0 if history is None else history.shape[-1],
        )
        if keep:
            features = None if history is None else history[:, -keep:]
            fresh, _ = self.commit(self.reserve(fresh, keep), context.u[:, -keep:], features)
        return replace(fresh, u=context.u, features=history)

    def _roll(self, context: Context) -> Context:
        def roll(cache: KVCache, text: Tensor | None) -> KVCache:
            cohorts, row = [], 0
            for c in cache.cohorts:
                if c.frames >= context.window:
                    prefix = None
                    if c.prefix and text is not None:
                        begun = self._begin(c.rows, text[row : row + c.rows], c.first + 1, 0)
                        prefix = begun.cohorts[0].segments[0].kv
                    cohorts.append(c.evict(1, context.u.shape[2], prefix))
                else:
                    cohorts.append(c)
                row += c.rows
            return KVCache(tuple(cohorts))

        uncond = None if context.uncond is None else roll(context.uncond, context.uncond_text)
        return replace(context, cache=roll(context.cache, context.text), uncond=uncond)
