"""`Context`: everything that the deep block remembers of a batch of sequences, as a frozen record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from worldmodel.errors import InputError
from worldmodel.flow.cache import KVCache
from worldmodel.records import replace


def repeat_rows(x: Tensor, n: int) -> Tensor:
    """Each row becomes n consecutive rows; a single row is expanded without a copy."""
    return x.expand(n, *x.shape[1:]) if x.shape[0] == 1 else x.repeat_interleave(n, dim=0)


def appended(history: Tensor, new: Tensor) -> Tensor:
    """The last W frames of ``history`` (B, W, ...) with ``new`` (B, n, ...) behind it.

    On a CPU by numpy: torch wakes all its threads for these few bytes, which takes five times as long.
    """
    window = history.shape[1]
    if history.device.type != "cpu" or history.dtype != torch.float32 or new.dtype != torch.float32:
        return torch.cat((history, new), dim=1)[:, -window:]
    parts = history.detach().numpy()[:, new.shape[1] :], new.detach().numpy()[:, -window:]
    return torch.from_numpy(np.concatenate(parts, axis=1))


@dataclass(frozen=True)
class Context:
    """What the deep block remembers of a batch of sequences (B rows).

    cache, uncond: K/V under the condition, and under the empty prompt (only where prompts are guided).
    u: (B, W, N, D) the last W = window deep-block inputs, raster order, right-aligned (older ones are zero).
    features: (B, W, E) action features of the same frames, or None. text, uncond_text: (B, L, text_dim) or None.
    grid: tokens (h, w) of a frame. ahead: the next window's context, so far as its frames are known: built a little at a
    time, so that no step has to encode it at once (None until it is begun, and where windows roll); ahead_from: which
    frame of this window, when full, is the next one's first.
    """

    grid: tuple[int, int]
    cache: KVCache
    uncond: KVCache | None
    u: Tensor
    features: Tensor | None
    text: Tensor | None
    uncond_text: Tensor | None
    ahead: Context | None = None
    ahead_from: int = 0

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
            None if self.ahead is None else self.ahead.fork(n),
            self.ahead_from,
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
            None if self.ahead is None else self.ahead.select(rows),
            self.ahead_from,
        )

    def gathered(self) -> Context:
        """The same sequences with K/V of their own, the next window's too; see `KVCache.gathered`."""
        windows = 2 if any(c.first for c in self.cache.cohorts) else 1  # see `DeepBlock.reserve`
        room = (windows * self.window + 1) * self.u.shape[2]
        uncond = None if self.uncond is None else self.uncond.gathered(room)
        ahead = (
            None if self.ahead is None else replace(self.ahead.gathered(), u=self.u, features=self.features)
        )
        return replace(self, cache=self.cache.gathered(room), uncond=uncond, ahead=ahead)

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
        aheads = [p.ahead for p in parts if p.ahead is not None and p.ahead_from == parts[0].ahead_from]
        return Context(
            parts[0].grid,
            KVCache.concat(p.cache for p in parts),
            KVCache.concat(unconds) if unconds else None,
            torch.cat([p.u for p in parts]),
            join("features"),
            join("text"),
            join("uncond_text"),
            Context.concat(aheads) if len(aheads) == len(parts) else None,
            parts[0].ahead_from,
        )
