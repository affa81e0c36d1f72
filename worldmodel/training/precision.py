"""The precision that training multiplies in: bfloat16 where this machine multiplies faster in it, else float32."""

from __future__ import annotations

import time
from functools import cache

import torch


@cache
def bfloat16_pays(kind: str) -> bool:
    """Whether matrix products are faster in bfloat16 on this kind of device, measured once.

    On a GPU they are; on CPUs with tiles for them (AMX) five times, on others with instructions of their own they may take
    twice as long as in float32.
    """
    if kind != "cpu":
        return True
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(512, 512, dtype=dtype)
        times = []
        for _ in range(7):
            began = time.perf_counter()
            torch.mm(a, a)
            times.append(time.perf_counter() - began)
        best[dtype] = min(times)
    return best[torch.bfloat16] < best[torch.float32]


def autocast(kind: str, wanted: bool = True, stored: torch.dtype = torch.float32) -> torch.autocast:
    """Autocast to bfloat16 where it is ``wanted`` and pays; weights ``stored`` in it know no other."""
    pays = stored == torch.bfloat16 or bfloat16_pays(kind)
    return torch.autocast(kind, torch.bfloat16, enabled=wanted and pays)
