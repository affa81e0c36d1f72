"""Training tokens a second: this project's step against a straightforward float32 one, on random latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Row, interleaved
from worldmodel.flow import attention
from worldmodel.training import precision
from worldmodel.training.flow import FlowStage, FlowTraining, Latents
from worldmodel.training.recipes import pendulum


@contextmanager
def _straightforward() -> Iterator[None]:
    """As anybody would write it: torch's fused attention in place of two matrix products, adjacent channels turned."""
    kept, heads = attention._plain_attention, attention.Attention.learned_heads

    def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    attention._plain_attention = fused
    attention.Attention.learned_heads = attention.Attention.plain_heads  # type: ignore[method-assign]
    try:
        yield
    finally:
        attention._plain_attention = kept
        attention.Attention.learned_heads = heads  # type: ignore[method-assign]


@contextmanager
def _in_bfloat16() -> Iterator[None]:
    """Whether it pays or not."""
    kept = precision.bfloat16_pays
    precision.bfloat16_pays = lambda kind: True  # type: ignore[assignment]
    try:
        yield
    finally:
        precision.bfloat16_pays = kept


def throughput(repeats: int, compiled: bool, peak: float) -> list[Row]:
    """Tokens a second of forward, backward and denoiser of the `pendulum` recipe at its batch of 32 windows of 16."""
    config = pendulum().flow
    generator = torch.Generator().manual_seed(0)
    count = 64
    data = Latents(
        torch.randn(count, 8, 4, 4, generator=generator),
        torch.rand(count, 1, generator=generator),
        torch.zeros(count),
        torch.zeros(count, dtype=torch.bool),
        np.array([count]),
    )
    pays = precision.bfloat16_pays("cpu")
    ways: dict[str, tuple[FlowTraining, Any]] = {
        "straightforward float32": (replace(config, bf16=False, compiled=False), _straightforward),
        "bfloat16, eager": (replace(config, compiled=False), _in_bfloat16),
    }
    if compiled:
        ways["float32, compiled" + ("" if pays else " (the loop's)")] = (
            replace(config, bf16=False),
            nullcontext,
        )
        ways["bfloat16, compiled" + (" (the loop's)" if pays else "")] = (config, _in_bfloat16)
    calls: dict[str, Callable[[], Any]] = {}
    for name, (settings, manager) in ways.items():
        stage = FlowStage(settings, data)

        def step(stage: FlowStage = stage, manager: Any = manager) -> None:
            with manager():
                stage.backward(np.random.default_rng(0), torch.Generator().manual_seed(0), 1.0)

        calls[name] = step
    times = interleaved(calls, repeats, "training")
    tokens = config.batch * config.length * 4
    parameters = sum(p.numel() for p in FlowStage(ways["straightforward float32"][0], data).flow.parameters())
    first = float(np.median(next(iter(times.values()))))
    return [
        {
            "loop": name,
            "tokens/s": tokens / float(np.median(t)),
            "x straightforward": first / float(np.median(t)),
            "share of float32 peak": 6 * parameters * tokens / float(np.median(t)) / 1e9 / peak,
        }
        for name, t in times.items()
    ]
