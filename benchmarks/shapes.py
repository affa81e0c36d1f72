"""Larger flows with random weights, sweep by sweep: what a step of a 300M and of the 7B model costs on this machine, and
what operations a sweep of the 7B model is made of, whatever the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

from benchmarks.measure import Row, flops, interleaved, timed
from worldmodel.flow import attention
from worldmodel.flow.context import Context
from worldmodel.flow.flow import Flow, FlowConfig
from worldmodel.packed import pack
from worldmodel.plan import devices


@dataclass(frozen=True)
class Shape:
    """grid: tokens (h, w) of a frame. contexts: latent frames of past. dtype: of the weights and the K/V."""

    name: str
    config: FlowConfig
    grid: tuple[int, int]
    contexts: tuple[int, ...]
    dtype: torch.dtype


def shapes(device: torch.device) -> list[Shape]:
    """The 300M shape and the published 7B one at 480 x 848, whose weights are bfloat16 wherever they are."""
    medium_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    medium = FlowConfig(
        in_channels=16,
        channels=768,
        top_channels=1024,
        layers_per_block=(2, 2, 2, 2, 16),
        patch_size=1,
        head_dim=64,
        action_features=64,
        window=8,
        context=4,
        denoiser_layers=4,
        denoiser_window=4,
        denoiser_look_ahead=1,
    )
    published = FlowConfig(
        in_channels=48, channels=3072, top_channels=4096, layers_per_block=(2, 2, 2, 2, 2, 24)
    )
    return [
        Shape("300M", medium, (8, 16), (1, 4, 7), medium_dtype),
        Shape("7B", published, (30, 53), (1, 4, 11, 20), torch.bfloat16),
    ]


def _bytes_needed(shape: Shape, frames: int) -> tuple[int, int]:
    """Parameters, and bytes of weights (twice where they are packed) and of the K/V of a context and the newest frame."""
    with torch.device("meta"):
        flow = Flow(shape.config)
    parameters = sum(p.numel() for p in flow.parameters())
    tokens = shape.grid[0] * shape.grid[1] * (frames + 1)
    kv = shape.config.layers_per_block[-1] * 2 * tokens * shape.config.top_channels
    copies = 2 if shape.dtype == torch.float32 else 1
    return parameters, (copies * parameters + kv) * shape.dtype.itemsize


def _random_flow(shape: Shape, device: torch.device) -> Flow:
    with torch.device("meta"):
        flow = Flow(shape.config)
    flow = flow.to(shape.dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, p in tqdm(list(flow.named_parameters()), desc=f"{shape.name} weights", leave=False):
        p.data.normal_(0.0, 0.4 * p.shape[-1] ** -0.5, generator=generator)
        if name.endswith("norm.weight") and "final" not in name:
            p.data.add_(1.0)
    flow.eval().requires_grad_(False)
    pack(flow)
    return flow


@torch.no_grad()
def _filled(flow: Flow, shape: Shape, frames: int, context: Context | None = None) -> Context:
    """A past of ``frames`` random frames, room for one more behind it; goes on from a shorter ``context``."""
    tokens = shape.grid[0] * shape.grid[1]
    if context is None:
        features = shape.config.action_features
        context = flow.deep.start(1, shape.grid, shape.config.window, features=features)
    else:
        flow.deep.release(context)
    for _ in range(frames - context.frames[0]):
        u = torch.randn(1, 1, tokens, flow.config.token_dim, device=context.u.device)
        context, _ = flow.deep.commit(flow.deep.reserve(context), u, None)
    return flow.deep.reserve(context)


def _sweep(flow: Flow, v: Tensor, context: Context) -> Callable[[], Any]:
    return partial(flow.deep._run, v, context, context.cache, None)


def _without_storage(shape: Shape) -> tuple[Flow, Tensor]:
    """The flow, and the tokens of a frame, on the meta device: operations can be counted and take no time."""
    with torch.device("meta"):
        flow = Flow(shape.config).to(shape.dtype).requires_grad_(False)
        return flow, torch.empty(1, shape.grid[0] * shape.grid[1], flow.config.token_dim)


def _rate(sweeps: int, deep: float, shallow: float, denoise: float) -> float:
    """Steps a second: ``sweeps`` and one pass that commits, in the deep and in the shallow blocks, and a denoised frame."""
    return 1.0 / ((sweeps + 1) * (deep + shallow) + denoise)


@torch.no_grad()
def _of_shape(shape: Shape, device: torch.device, repeats: int, peak: float) -> list[Row]:
    """One row per context length. peak: GFLOP/s of products of the shape's dtype, seen before; that of the shape's widest
    product, in turns with the sweeps, counts where it is higher.
    """
    flow = _random_flow(shape, device)
    tokens, width, rows = shape.grid[0] * shape.grid[1], shape.config.top_channels, []
    v = torch.randn(1, tokens, flow.config.token_dim, device=device)
    x, weight = (torch.randn(n, width, device=device).to(shape.dtype) for n in (tokens, 4 * width))
    context: Context | None = None
    bare, nothing = _without_storage(shape)

    def shallow() -> None:
        for block in flow.shallow_blocks:
            block.frame_parameters(v, shape.grid)

    def denoise() -> None:
        flow.denoise_newest(v[:, None].to(shape.dtype), shape.grid)

    for frames in tqdm(shape.contexts, desc=f"{shape.name} contexts", leave=False):
        head = {"tokens": tokens, "context": frames}
        if skipped := _lacks(shape, frames, device, made=True):
            rows.append(head | {"note": skipped})
            break
        context = _filled(flow, shape, frames, context)
        work = flops(_sweep(bare, nothing, _filled(bare, shape, frames)))
        deep = _sweep(flow, v, context)
        calls: dict[str, Callable[[], Any]] = {"deep": deep, "shallow": shallow, "denoise": denoise}
        calls["product"] = partial(F.linear, x, weight)
        times = interleaved(calls, repeats, f"{shape.name}, {frames} frames")
        median = {name: float(np.median(t)) for name, t in times.items()}
        spent: dict[str, list[float]] = {}
        with timed(attention, ["_attend"], spent):
            deep()
        best = max(peak, 2 * x.numel() * 4 * width / median.pop("product") / 1e9)
        rows.append(
            head
            | {
                "TFLOP": work / 1e12,
                "peak GFLOP/s": best,
                "deep sweep ms": 1e3 * median["deep"],
                "of it attention ms": 1e3 * sum(spent["_attend"]),
                "x floor": median["deep"] / (work / (best * 1e9)),
                "shallow sweep ms": 1e3 * median["shallow"],
                "denoise ms": 1e3 * median["denoise"],
                **{f"steps/s, {k} sweeps": _rate(k, **median) for k in (1, 2, 4, 8)},
            }
        )
    return rows


H200 = 790e12, 4.3e12
"""FLOP/s of bfloat16 products and bytes a second of such a card, as they were measured on one."""


class _Operations(TorchDispatchMode):
    """Within, adds up the FLOPs of torch's operations and the seconds that they take at these rates, one after the other:
    each at its FLOPs or at the bytes of its operands and results, whichever is more.
    """

    def __init__(self, rate: float, bandwidth: float) -> None:
        super().__init__()
        self.rate, self.bandwidth = rate, bandwidth
        self.flops, self.seconds, self.count = 0, 0.0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        aliases = [r.alias_info for r in func._schema.returns]
        view = any(a is not None and not a.is_write for a in aliases) or func.overloadpacket.__name__ in (
            "_unsafe_view",
            "empty",
            "new_empty",
        )
        if not view:
            moved = sum(t.nbytes for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor))
            formula = flop_registry.get(func.overloadpacket)
            work = formula(*args, **(kwargs or {}), out_val=out) if formula else 0
            self.flops += work
            self.seconds += max(work / self.rate, moved / self.bandwidth)
            self.count += 1
        return out


@torch.no_grad()
def computed() -> list[Row]:
    """Of a deep sweep of the 7B model with guidance, without running it: its FLOPs and what its operations would take on
    an H200 one by one, none of them fused, as they are run.
    """
    shape, rows = shapes(torch.device("cuda"))[1], []
    flow, v = _without_storage(shape)
    for frames in tqdm(shape.contexts, desc="7B, computed", leave=False):
        sweep = _sweep(flow, v, _filled(flow, shape, frames))
        with _Operations(*H200) as done:
            for _ in range(2):  # with the prompt and without
                sweep()
        floor = done.flops / H200[0]
        rows.append(
            {
                "context": frames,
                "TFLOP": done.flops / 1e12,
                "floor ms": 1e3 * floor,
                "operations": done.count,
                "one by one ms": 1e3 * done.seconds,
                "x floor": done.seconds / floor,
            }
        )
    return rows


def _lacks(shape: Shape, frames: int, device: torch.device, made: bool) -> str:
    """Why a context does not fit into the memory that is free, "" where it does. made: the weights are there already."""
    cuda = (
        device.type == "cuda"
    )  # which gives out the whole window at once, where the CPU gives what is written to
    free = devices()[f"cuda:{device.index or 0}" if cuda else "cpu"][0]
    parameters, needed = _bytes_needed(shape, shape.config.window if cuda else frames)
    there = parameters * shape.dtype.itemsize if made else 0
    if needed - there <= 0.9 * free:
        return ""
    return f"skipped: needs {needed / 1e9:.0f} GB, {(free + there) / 1e9:.0f} GB are free"


def by_shape(device: torch.device, repeats: int, peaks: Mapping[str, float]) -> list[Row]:
    """Milliseconds of a deep sweep, a shallow sweep of all blocks, and steps a second by sweeps, per context length.

    peaks: the best products' GFLOP/s by dtype, "float32" and "bfloat16".
    """
    rows: list[Row] = []
    for shape in shapes(device):
        dtype = str(shape.dtype).removeprefix("torch.")
        parameters = _bytes_needed(shape, 1)[0]
        head = {"shape": shape.name, "parameters": f"{parameters / 1e6:.0f} M", "dtype": dtype}
        if skipped := _lacks(shape, shape.contexts[0], device, made=False):
            rows.append(head | {"note": skipped})
        else:
            rows += [head | row for row in _of_shape(shape, device, repeats, peaks[dtype])]
    return rows
