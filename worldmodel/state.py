"""`WorldState`: everything a session is, as one frozen record. Nothing about a session lives anywhere else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from worldmodel.codec.base import CodecState
from worldmodel.errors import CheckpointError, InputError
from worldmodel.files import load_metadata, load_tensors, save_tensors
from worldmodel.flow.cache import Cohort, KVCache, Page, Segment
from worldmodel.flow.context import Context, repeat_rows
from worldmodel.noise import child_branch, seed_tensor
from worldmodel.records import replace

STATE_FORMAT = 1


@dataclass(frozen=True)
class WorldState:
    """The state of B sessions of one world.

    context: the deep block's past (K/V pages, last inputs, action features, prompts).
    noisy: (B, R, N, D) the last noisy tokens, right-aligned, for the denoiser. latent: (B, C, h, w) the last clean
    latent. codec: the codec's streaming state, rows on axis 0. seeds, branches, steps: (B,) int64, what the noise is a
    function of; ``steps`` counts the chunks of a session. forks: (B,) int64, how often a branch was forked.
    log_prob: (B,) float64, nats of all chunks since the start. prompts: (B,) captions as given, None in a world without.
    seen: (B, `HeadsConfig.seen`) what an eye keeps of the chunks so far, None in a world whose heads have none.
    denoiser: what the denoiser keeps of the last frames, see `Denoiser.newest_and_kept`; it follows from ``noisy``, so it
    is not saved, and None where it must be computed again.
    """

    context: Context
    noisy: Tensor
    latent: Tensor
    codec: CodecState
    seeds: Tensor
    branches: Tensor
    forks: Tensor
    steps: Tensor
    log_prob: Tensor
    prompts: tuple[str, ...] | None = None
    seen: Tensor | None = None
    denoiser: Tensor | None = None

    @property
    def rows(self) -> int:
        """B, the number of sessions."""
        return len(self.steps)

    @property
    def context_frames(self) -> Tensor:
        """(B,) int64: latent frames in the context."""
        return torch.tensor(self.context.frames, dtype=torch.int64)

    @property
    def nbytes(self) -> int:
        """Bytes held: K/V in view (shared pages once) and all other tensors."""
        return sum(c.nbytes for c in self.caches().values()) + sum(
            t.untyped_storage().nbytes() for t in (*self._tensors().values(), self.denoiser) if t is not None
        )

    def fork(self, n: int) -> WorldState:
        """Each session becomes ``n`` consecutive ones that share its past; child 0 keeps the parent's noise.

        The others, and those of child 0's later forks, get noise of their own. A state that is forked twice has the same
        children twice; and so, step for step, does the noise of children of a state and of its own continuation: plans of
        one session at successive steps compare their candidates under common random numbers.

        Raises:
            InputError: n < 1.
        """
        if n < 1:
            raise InputError(f"fork({n}): expected at least 1")
        if n == 1:
            return self
        parents = list(zip(self.branches.tolist(), self.forks.tolist(), strict=True))
        branches = [child_branch(b, forks, child) for b, forks in parents for child in range(n)]
        forked = [0 if child else forks + 1 for _, forks in parents for child in range(n)]
        return WorldState(
            self.context.fork(n),
            repeat_rows(self.noisy, n),
            repeat_rows(self.latent, n),
            {k: repeat_rows(v, n) for k, v in self.codec.items()},
            self.seeds.repeat_interleave(n),
            torch.tensor(branches, dtype=torch.int64),
            torch.tensor(forked, dtype=torch.int64),
            self.steps.repeat_interleave(n),
            self.log_prob.repeat_interleave(n),
            None if self.prompts is None else tuple(p for p in self.prompts for _ in range(n)),
            None if self.seen is None else repeat_rows(self.seen, n),
            None if self.denoiser is None else repeat_rows(self.denoiser, n),
        )

    def select(self, indices: Sequence[int]) -> WorldState:
        """The given sessions, in that order; an index may come more than once.

        Raises:
            IndexError: an index out of range, or none. InputError: something else than indices, as a mask is.
        """
        wanted = np.asarray(indices.cpu() if isinstance(indices, Tensor) else indices)
        if wanted.size and (wanted.dtype.kind not in "iu" or wanted.ndim != 1):
            raise InputError(f"select of {wanted.dtype} {wanted.shape}, expected a sequence of integers")
        rows: list[int] = wanted.tolist()
        if not rows or any(not -self.rows <= i < self.rows for i in rows):
            raise IndexError(f"select({rows}): this state has {self.rows} sessions")
        rows = [i % self.rows for i in rows]
        index = torch.tensor(rows, dtype=torch.int64)
        on_device = index.to(self.noisy.device)
        return WorldState(
            self.context.select(rows),
            self.noisy[on_device],
            self.latent[on_device],
            {k: v[on_device] for k, v in self.codec.items()},
            self.seeds[index],
            self.branches[index],
            self.forks[index],
            self.steps[index],
            self.log_prob[index],
            None if self.prompts is None else tuple(self.prompts[i] for i in rows),
            None if self.seen is None else self.seen[on_device],
            None if self.denoiser is None else self.denoiser[on_device],
        )

    @staticmethod
    def concat(states: Sequence[WorldState]) -> WorldState:
        """Sessions of several states of one world in one batch; K/V pages are shared, not copied.

        Raises:
            InputError: no states; or some keep a past under the empty prompt and some do not, see `Context.concat`.
        """
        if not states:
            raise InputError("concat of no states, expected at least one")
        if len(states) == 1:
            return states[0]

        def join(name: str) -> Tensor:
            return torch.cat([getattr(s, name) for s in states])

        return WorldState(
            Context.concat([s.context for s in states]),
            join("noisy"),
            join("latent"),
            {k: torch.cat([s.codec[k] for s in states]) for k in states[0].codec},
            join("seeds"),
            join("branches"),
            join("forks"),
            join("steps"),
            join("log_prob"),
            None if states[0].prompts is None else tuple(p for s in states for p in s.prompts or ()),
            None if states[0].seen is None else join("seen"),
            None if any(s.denoiser is None for s in states) else join("denoiser"),
        )

    def gathered(self) -> WorldState:
        """The same sessions, sharing no K/V with others; neighbours with contexts of one length are stored together.

        A batch that `concat` made of single sessions steps faster after it, and what `select` took out of a large
        batch stops keeping that batch's K/V alive. Copies the K/V.
        """
        return replace(self, context=self.context.gathered())

    def reseed(self, seeds: Sequence[int]) -> WorldState:
        """The same sessions with other noise from here on; ``seeds`` (B,).

        Raises:
            InputError: not one integer in [0, 2^63) for each session.
        """
        new = seed_tensor(seeds)
        if len(new) != self.rows:
            raise InputError(f"{len(new)} seeds for {self.rows} sessions, expected one for each")
        zero = torch.zeros_like(new)
        return replace(self, seeds=new, branches=zero, forks=zero)

    def caches(self) -> dict[str, KVCache]:
        """The K/V held, by name: of the window, of it under the empty prompt, and, without prompts, of the next."""
        c = self.context
        named = {"cache": c.cache, "uncond": c.uncond, "ahead": None if c.ahead is None else c.ahead.cache}
        return {k: v for k, v in named.items() if v is not None}

    def _tensors(self) -> dict[str, Tensor]:
        c = self.context
        named = {
            "u": c.u,
            "features": c.features,
            "text": c.text,
            "uncond_text": c.uncond_text,
            "noisy": self.noisy,
            "latent": self.latent,
            "seeds": self.seeds,
            "branches": self.branches,
            "forks": self.forks,
            "steps": self.steps,
            "log_prob": self.log_prob,
            "seen": self.seen,
            **{f"codec.{k}": v for k, v in self.codec.items()},
        }
        return {k: v for k, v in named.items() if v is not None}

    def kinds(self) -> dict[str, tuple[object, ...]]:
        """Shape of a row and dtype of each tensor, the K/V apart."""
        return {name: (*tensor.shape[1:], tensor.dtype) for name, tensor in self._tensors().items()}

    def _check(self) -> None:
        """Raises ValueError where parts do not fit each other, as in a file that was tampered with."""
        c = self.context
        for name, tensor in self._tensors().items():
            if len(tensor) != self.rows or 0 in tensor.shape[1:]:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}")
        for name in ("seeds", "branches", "forks", "steps"):
            if (self._tensors()[name] < 0).any():
                raise ValueError(f"{name} below 0")
        if c.u.shape[2:] != self.noisy.shape[2:]:
            raise ValueError("u and noisy differ in shape")
        if (c.text is None) != (self.prompts is None) or (c.uncond is None) != (c.uncond_text is None):
            raise ValueError("prompts without their condition tokens, or the reverse")
        if self.prompts is not None and len(self.prompts) != self.rows:
            raise ValueError(f"{len(self.prompts)} prompts for {self.rows} sessions")
        if c.ahead is not None:
            known = [max(0, f - c.ahead_from) for f in c.frames]
            if c.text is not None or not 0 < c.ahead_from <= c.window:
                raise ValueError("the next window does not fit this one")
            if any(a > k for a, k in zip(c.ahead.frames, known, strict=True)):
                raise ValueError("the next window holds frames that this one has not seen")
        for cache in self.caches().values():
            if cache.rows != self.rows:
                raise ValueError(f"K/V of {cache.rows} rows for {self.rows} sessions")
            for cohort in cache.cohorts:
                tokens = sum(s.tokens for s in cohort.segments)
                fits = tokens == cohort.prefix + cohort.frames * c.u.shape[2] and cohort.frames <= c.window
                if not fits or any(
                    s.kv.shape[2] * s.fold != cohort.rows or not s.kv.shape[-1] for s in cohort.segments
                ):
                    raise ValueError("K/V do not fit their layout")

    def save(self, path: str | Path, world: str) -> None:
        """Write the state to one safetensors file, atomically; ``world`` is the fingerprint of its world."""
        tensors = {k: v.detach().cpu().contiguous() for k, v in self._tensors().items()}
        layout: dict[str, list[dict[str, object]]] = {}
        for name, cache in self.caches().items():
            layout[name] = []
            for i, cohort in enumerate(cache.cohorts):
                folds = []
                for j, segment in enumerate(cohort.segments):
                    tensors[f"{name}.{i}.{j}"] = segment.kv.detach().cpu().contiguous()
                    folds.append(segment.fold)
                layout[name].append(
                    {
                        "rows": cohort.rows,
                        "frames": cohort.frames,
                        "first": cohort.first,
                        "prefix": cohort.prefix,
                        "folds": folds,
                    }
                )
        header: dict[str, object] = {
            "format": STATE_FORMAT,
            "world": world,
            "grid": self.context.grid,
            "ahead_from": self.context.ahead_from,
            "layout": layout,
        }
        if self.prompts is not None:
            header["prompts"] = self.prompts
        save_tensors(Path(path), tensors, {"worldmodel_state": json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path, world: str, device: torch.device | str = "cpu") -> WorldState:
        """Read what `save` wrote.

        Raises:
            CheckpointError: not a state, corrupt, of another format version, or of another world.
        """
        tensors, metadata = load_tensors(Path(path)), load_metadata(Path(path))
        try:
            header = json.loads(metadata["worldmodel_state"])
            if header["format"] != STATE_FORMAT:
                raise CheckpointError(f"{path}: state format {header['format']}, expected {STATE_FORMAT}")
            if header["world"] != world:
                raise CheckpointError(
                    f"{path}: saved from another world; load it with the world that wrote it"
                )
            tensors = {k: v.to(device) for k, v in tensors.items()}

            def cache(name: str) -> KVCache | None:
                if name not in header["layout"]:
                    return None
                cohorts = []
                for i, c in enumerate(header["layout"][name]):
                    segments = []
                    for j, fold in enumerate(c["folds"]):
                        kv = tensors[f"{name}.{i}.{j}"]
                        segments.append(Segment(Page(kv, kv.shape[-2]), 0, kv.shape[-2], fold))
                    cohorts.append(Cohort(c["rows"], c["frames"], c["first"], tuple(segments), c["prefix"]))
                return KVCache(tuple(cohorts))

            kept = cache("cache")
            assert kept is not None
            context = Context(
                (int(header["grid"][0]), int(header["grid"][1])),
                kept,
                cache("uncond"),
                tensors["u"],
                tensors.get("features"),
                tensors.get("text"),
                tensors.get("uncond_text"),
            )
            ahead = cache("ahead")
            if ahead is not None:
                next_window = replace(context, cache=ahead)
                context = replace(context, ahead=next_window, ahead_from=int(header["ahead_from"]))
            codec = {k.removeprefix("codec."): v for k, v in tensors.items() if k.startswith("codec.")}
            seeds, branches, forks, steps = (
                tensors[k].cpu() for k in ("seeds", "branches", "forks", "steps")
            )
            log_prob = tensors["log_prob"].cpu()
            prompts = tuple(str(p) for p in header["prompts"]) if "prompts" in header else None
            state = cls(
                context,
                tensors["noisy"],
                tensors["latent"],
                codec,
                seeds,
                branches,
                forks,
                steps,
                log_prob,
                prompts,
                tensors.get("seen"),
            )
            state._check()
            return state
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, AssertionError) as error:
            raise CheckpointError(f"{path}: not a saved world state ({error!r:.80})") from error
