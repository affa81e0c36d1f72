"""Kernels in C for what a step of a small world spends its time on: see flow.c, denoiser.c, decoder.c, encoder.c and
perceptron.c.

They serve frozen float32 weights on x86-64 CPUs with AMX, AVX-512 or AVX2, where the package was built with gcc. Where
they do not serve, torch computes the same, slower: same mathematics, last bits may differ. Which of both computes depends
on the weights and the machine alone, never on the batch, so results do not depend on it either.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import mmap
import threading
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

INTERFACE = 3
"""Version of the C interface; raised with every change of it."""

Entry = TypeVar("Entry", bound=ctypes.Structure)

LEVELS = {"AVX512": ("_amx", "_v4", "_v3"), "AVX2": ("_v3",)}
"""Builds by what torch says of the processor, best first."""


@cache
def _found() -> tuple[str, ctypes.CDLL] | None:
    for build in LEVELS.get(torch.backends.cpu.get_cpu_capability(), ()):
        found = importlib.util.find_spec(f"{__name__}.{build}")
        if found is None or found.origin is None:
            continue
        kernels = ctypes.CDLL(found.origin)
        if kernels.worldmodel_interface() != INTERFACE:
            warnings.warn(
                f"{found.origin} was built from other sources and is not used; reinstall: pip install -e .",
                stacklevel=2,
            )
        elif kernels.worldmodel_usable():
            return build, kernels
    return None


def library() -> ctypes.CDLL | None:
    """The kernels for this processor, or None where there are none."""
    found = _found()
    return None if found is None else found[1]


def build() -> str | None:
    """Which instructions they were built for, "AMX", "AVX-512" or "AVX2"; None where there are none."""
    found = _found()
    return None if found is None else {"_amx": "AMX", "_v4": "AVX-512", "_v3": "AVX2"}[found[0]]


class Linear(ctypes.Structure):
    """`Linear` of linear.h."""

    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("stored", ctypes.c_int32),
    ]


class _Perceptron(ctypes.Structure):
    _fields_ = [
        ("map", ctypes.POINTER(Linear)),
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("maps", ctypes.c_int32),
        ("rows", ctypes.c_int32),
    ]


FLOAT32, FLOAT16, TILED = range(3)
"""How weights are stored, as in linear.h."""

SLICES = 3
"""bfloat16 products that make one of float32 of TILED weights."""

TILE_OUTPUTS, TILE_INPUTS = 16, 32
"""Of a tile of weights, see tiles.h; a panel has two of them side by side."""

MOST_TILED = 2048
"""The most inputs of a TILED linear map: slices of 64 rows of them lie on a thread's stack."""


def tiles(weight: Tensor) -> Tensor:
    """Weights (..., outputs, K) as tiles.h reads them, zeros behind the last of both: (..., panels, blocks of K, 2, 16,
    16, 2).
    """
    rows, columns = -weight.shape[-2] % (2 * TILE_OUTPUTS), -weight.shape[-1] % TILE_INPUTS
    return rearrange(
        F.pad(weight.detach(), (0, columns, 0, rows)).bfloat16(),
        "... (n half o) (b pair two) -> ... n b half pair o two",
        half=2,
        o=TILE_OUTPUTS,
        pair=TILE_INPUTS // 2,
        two=2,
    )


class _HugePages:
    """Memory for weights on pages of 2 MB where the system has them: what is read from end to end in every pass then costs
    fewer look-ups of addresses. A block lives as long as a tensor in it.
    """

    BLOCK = 8 << 20
    ALIGNED = 64

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._block, self._used = torch.empty(0, dtype=torch.uint8), 0

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor, its numbers in order."""
        size = tensor.numel() * tensor.element_size()
        if not size:
            return tensor.contiguous()
        with self._lock:
            if self._used + size > len(self._block):
                private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
                pages = mmap.mmap(-1, max(self.BLOCK, size), flags=private)
                if hasattr(mmap, "MADV_HUGEPAGE"):
                    with contextlib.suppress(OSError):  # a system that was built without
                        pages.madvise(mmap.MADV_HUGEPAGE)
                self._block, self._used = torch.frombuffer(pages, dtype=torch.uint8), 0
            place = self._block[self._used : self._used + size].view(tensor.dtype).view(tensor.shape)
            self._used += -(-size // self.ALIGNED) * self.ALIGNED
        return place.copy_(tensor)


_huge_pages = _HugePages()


class Weights:
    """Weights laid out for the kernels, kept for the structures of pointers that point to them."""

    def __init__(self, kernels: ctypes.CDLL) -> None:
        self.panel = int(kernels.worldmodel_panel())
        self.tiled = bool(kernels.worldmodel_tiled())
        self._kept: list[Any] = []

    def pointer(self, tensor: Tensor) -> int:
        """The address of a tensor's numbers, in order."""
        self._kept.append(_huge_pages.keep(tensor.detach()))
        return int(self._kept[-1].data_ptr())

    def array(self, kind: type[Entry], items: Sequence[Entry]) -> ctypes.Array[Entry]:
        """Structures one behind the other."""
        self._kept.append((kind * len(items))(*items))
        return cast("ctypes.Array[Entry]", self._kept[-1])

    def padded(self, tensor: Tensor) -> Tensor:
        """Zeros behind the last of the last axis, to whole panels."""
        return F.pad(tensor, (0, -tensor.shape[-1] % self.panel))

    def panels(self, weight: Tensor) -> Tensor:
        """(..., outputs, K) to (panels, ..., K, panel)."""
        return rearrange(self.padded(weight.mT), "... k (n panel) -> n ... k panel", panel=self.panel)

    def tiles_fit(self, weight: Tensor) -> bool:
        """Whether the kernels multiply by tiles of these weights: bfloat16 numbers, where there is a matrix unit."""
        return self.tiled and torch.equal(weight.bfloat16().float(), weight)

    def linear(self, weight: Tensor | None, bias: Tensor | None) -> Linear:
        """A linear map (outputs, K) and its bias; of none, the map without inputs.

        Stored as narrow as represents it: bfloat16 for the matrix unit, float16, or float32.
        """
        if weight is None:
            return Linear()
        stored, laid_out = FLOAT32, self.panels(weight)
        if weight.shape[1] <= MOST_TILED and self.tiles_fit(weight):
            stored, laid_out = TILED, tiles(weight)
        elif torch.equal(weight.half().float(), weight):
            stored, laid_out = FLOAT16, laid_out.half()
        return Linear(
            self.pointer(laid_out),
            None if bias is None else self.pointer(self.padded(bias)),
            weight.shape[1],
            weight.shape[0],
            stored,
        )


class NativePerceptron:
    """Linear maps, as pairs of weight and bias, with a SiLU between each two; see perceptron.c."""

    def __init__(self, kernels: ctypes.CDLL, maps: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._run = kernels.worldmodel_perceptron
        self._weights = weights = Weights(kernels)
        self._maps = weights.array(Linear, [weights.linear(*each) for each in maps])
        self._inputs, self._outputs = maps[0][0].shape[1], len(maps[-1][0])

    def __call__(self, x: Tensor) -> Tensor:
        """(..., inputs) float32 to (..., outputs).

        Raises:
            ValueError: another number of inputs.
        """
        if x.shape[-1] != self._inputs:
            raise ValueError(f"inputs have shape {tuple(x.shape)}, expected (..., {self._inputs})")
        x, y = x.contiguous(), torch.empty(*x.shape[:-1], self._outputs)
        rows = x.numel() // self._inputs if self._inputs else 0
        job = _Perceptron(self._maps, x.data_ptr(), y.data_ptr(), len(self._maps), rows)
        if self._run(ctypes.byref(job)):
            raise MemoryError("not enough memory for a perceptron's hidden units")
        return y
