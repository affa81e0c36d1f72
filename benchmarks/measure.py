"""Clocks, counters and tables. Machines are shared: whatever is compared is interleaved, and medians are compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from worldmodel import native, packed
from worldmodel.codec.conv import ConvCodec
from worldmodel.flow.block import Transformer
from worldmodel.flow.flow import Flow
from worldmodel.packed import Linear, Perceptron, narrow, pack

Row = dict[str, Any]
T = TypeVar("T")


def synchronise() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clocked(call: Callable[..., T], *args: Any, **kwargs: Any) -> tuple[float, T]:
    """Wall-clock seconds of one call, and its result."""
    synchronise()
    began = time.perf_counter()
    result = call(*args, **kwargs)
    synchronise()
    return time.perf_counter() - began, result


def seconds(call: Callable[..., Any], *args: Any) -> float:
    """Wall-clock seconds of one call."""
    return clocked(call, *args)[0]


def interleaved(
    calls: Mapping[str, Callable[[], Any]], repeats: int, label: str, warm: bool = False
) -> dict[str, np.ndarray]:
    """Seconds of ``repeats`` calls of each, taken in turns after one of each that is not counted.

    warm: before every counted call the same once uncounted, where a large call leaves nothing of a small one in the cache.
    """
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in tqdm(range(repeats), desc=label, leave=False):
        for name, call in calls.items():
            if warm:
                call()
            times[name].append(seconds(call))
    return {name: np.array(t) for name, t in times.items()}


def ms(times: Sequence[float] | np.ndarray, percentile: float = 50.0) -> float:
    """A percentile in milliseconds."""
    return 1e3 * float(np.percentile(np.asarray(times), percentile))


def _linear_flops(x: Sequence[int], second: Sequence[int], third: Any, *_: Any, **__: Any) -> int:
    """Of ``(x, weight, bias, ..)`` and of the variant that adds a residual, ``(x, residual, weight, ..)``."""
    weight = third if third is not None and len(third) == 2 else second
    return 2 * int(np.prod(x)) * weight[0]


def _convolution_flops(x: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Any, **__: Any) -> int:
    return 2 * int(np.prod(out_shape)) * int(np.prod(weight[1:]))


def _attention_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * int(np.prod(q)) * k[-2] * 2


FORMULAS: dict[Any, Any] = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
if torch.backends.mkldnn.is_available():
    FORMULAS[torch.ops.mkldnn._linear_pointwise] = _linear_flops
    FORMULAS[torch.ops.mkldnn._convolution_pointwise] = _convolution_flops


@contextmanager
def torch_alone() -> Iterator[None]:
    """Within, torch computes what `worldmodel.native` would have; what was laid out stays."""
    nothing: Any = property(lambda self: None)
    kept = [(kind, kind.__dict__["native"]) for kind in (Transformer, Flow, ConvCodec)]
    forward, library = Perceptron.forward, native.library
    for kind, _ in kept:
        kind.native = nothing  # type: ignore[method-assign]
    Perceptron.forward = nn.Sequential.forward  # type: ignore[method-assign]
    native.library = lambda: None
    try:
        yield
    finally:
        for kind, value in kept:
            kind.native = value  # type: ignore[method-assign]
        Perceptron.forward = forward  # type: ignore[method-assign]
        native.library = library


def flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products, convolutions and attention in one call, as torch computes it.

    Of what the kernels of `worldmodel.native` do that is the same but for convolutions, of which theirs (Winograd's) need
    fewer: their work is counted as what it stands for.
    """
    plain, halves = packed._half_product, [0]

    def counted(x: Tensor, *rest: Any) -> Tensor:
        assert plain is not None
        y = plain(x, *rest)
        halves.append(2 * x.numel() * y.shape[-1])
        return y

    packed._half_product = plain and counted  # the counter does not see this product
    try:
        with torch_alone(), FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            call()
    finally:
        packed._half_product = plain
    return counter.get_total_flops() + sum(halves)


@contextmanager
def timed(owner: Any, names: Sequence[str], into: dict[str, list[float]]) -> Iterator[None]:
    """Within, every call of ``owner``'s methods adds its seconds to ``into[name]``; nested calls count twice."""
    originals = {name: getattr(owner, name) for name in names}
    own = {name for name in names if name in vars(owner)}  # of a module; methods are their class's

    def wrap(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            synchronise()
            began = time.perf_counter()
            result = call(*args, **kwargs)
            synchronise()
            into.setdefault(name, []).append(time.perf_counter() - began)
            return result

        return wrapped

    for name, call in originals.items():
        object.__setattr__(owner, name, wrap(name, call))
    try:
        yield
    finally:
        for name in names:
            if name in own:
                object.__setattr__(owner, name, originals[name])
            else:
                object.__delattr__(owner, name)


def matrix_peak(device: torch.device, repeats: int = 7) -> Row:
    """The best FLOP/s of a large matrix product on this machine, now: float32 by torch, packed, by our kernels; bfloat16.

    tiles: as exact as float32, of weights that are bfloat16 numbers, by three bfloat16 products each on a matrix unit; it
    counts as one, and not for float32's peak, since not any weights will do.
    """
    n = 1024 if device.type == "cpu" else 8192
    candidates: dict[str, Callable[[], Any]] = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        candidates[name] = partial(torch.matmul, a, b)
    if device.type == "cpu":
        linear = Linear(n, n, bias=False).requires_grad_(False)
        pack(linear)
        x = torch.randn(n, n)
        candidates["float32 packed"] = partial(linear, x)
        if kernels := native.library():
            candidates["float32 kernels"] = partial(
                native.NativePerceptron(kernels, [(linear.weight, torch.zeros(n))]), x
            )
            if kernels.worldmodel_tiled():
                candidates["tiles"] = partial(
                    native.NativePerceptron(kernels, [(narrow(linear.weight), torch.zeros(n))]), x
                )
    times = interleaved(candidates, repeats, "matrix peak")
    rates = {f"{name} gflops": 2 * n**3 / float(np.min(t)) / 1e9 for name, t in times.items()}
    exact = max(v for k, v in rates.items() if k.startswith("float32"))
    return {"n": n, **rates, "best float32 gflops": exact}


def nbytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of tensors, shared storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def table(title: str, rows: Sequence[Row], note: str = "") -> str:
    """Rows as text, columns aligned."""
    if not rows:
        return ""
    names = list(dict.fromkeys(key for row in rows for key in row))

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
        return "" if value is None else str(value)

    body = [[cell(row.get(name)) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in [names, *body]) for i in range(len(names))]
    lines = [
        "  ".join(text.rjust(w) for text, w in zip(line, widths, strict=True)) for line in [names, *body]
    ]
    return "\n".join([f"\n{title}", *lines, *([note] if note else [])])
