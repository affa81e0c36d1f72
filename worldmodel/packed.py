"""Linear maps and convolutions whose weights are laid out once for the CPU's matrix kernels.

Weights that float16 represents exactly, as those of the worlds that ship, are kept in it and multiplied by FBGEMM: in
float32, so that nothing is lost, with a third of the time of a call of oneDNN where there are few rows. The others are
packed by oneDNN, whose kernels are 1 to 3 times as fast as what `F.linear` finds and add the GELU or the residual on
their way. A row of either's result is the same, bit for bit, whatever else is in the batch (`F.linear` changes its
kernel below four rows). Packing serves frozen float32 weights on a CPU; everything else goes through torch's own functions.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.invariance import MATRIX_ROWS
from worldmodel.native import NativePerceptron, library

_ops = torch.ops.mkldnn
_half_product = getattr(torch, "fbgemm_linear_fp16_weight_fp32_activation", None)


@cache
def multiplies_halves() -> bool:
    """Whether this build of torch multiplies packed float16 weights by float32 rows."""
    if _half_product is None or "fbgemm" not in torch.backends.quantized.supported_engines:
        return False
    with (
        warnings.catch_warnings()
    ):  # torch says once, here, that these functions may go; oneDNN then takes their place
        warnings.simplefilter("ignore")
        weight = torch.eye(8)
        kernel = torch.fbgemm_pack_gemm_matrix_fp16(weight)
        return torch.equal(_half_product(weight, kernel, torch.zeros(8)), weight)


def _fits_half(weight: Tensor) -> bool:
    return multiplies_halves() and torch.equal(weight.half().float(), weight)


class Packable(nn.Module):
    """A module that lays its weights out: at first use, and again in copies; never after it was moved or cast."""

    _waiting = False
    _kernel: Any = None

    def pack(self) -> None:
        """Lay the weights out where that serves. They must not change from here on."""
        frozen = all(
            w.device.type == "cpu" and w.dtype == torch.float32 and not w.requires_grad
            for w in self.parameters()
        )
        self._kernel, self._waiting = None, frozen and torch.backends.mkldnn.is_available()

    @property
    def serves(self) -> bool:
        """Whether it is packed, or will be at first use."""
        return self._waiting or self._kernel is not None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._kernel, self._waiting = None, False
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kernel": None, "_waiting": self.serves}


class Packed(Packable):
    """A layer whose weight may be packed."""

    weight: Tensor

    def _lay_out(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _packed(self, x: Tensor) -> Tensor | None:
        """The packed weight, where it serves this input."""
        if self._waiting:
            self._kernel, self._waiting = self._lay_out(x), False
        if self._kernel is None or x.dtype != torch.float32 or (x.requires_grad and torch.is_grad_enabled()):
            return None
        return cast(Tensor, self._kernel)


class Linear(nn.Linear, Packed):
    """``x W^T + b`` with an optional GELU (exact) behind it, or a residual added."""

    _half = False

    def _lay_out(self, x: Tensor) -> Tensor:
        weight = self.weight.detach()
        self._half = _fits_half(weight)
        if self._half:
            return torch.fbgemm_pack_gemm_matrix_fp16(weight)
        return cast(Tensor, _ops._reorder_linear_weight(weight))

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        kernel = self._packed(x)
        if kernel is None:
            return F.linear(x, self.weight, self.bias)
        if self._half:
            return cast(Tensor, _half_product(x, kernel, self.bias))  # type: ignore[misc]
        return cast(Tensor, _ops._linear_pointwise(x, kernel, self.bias, "none", [], "none"))

    def gelu(self, x: Tensor) -> Tensor:
        """``gelu(x W^T + b)``."""
        kernel = self._packed(x)
        if kernel is None:
            return F.gelu(F.linear(x, self.weight, self.bias))
        if self._half:
            return F.gelu(_half_product(x, kernel, self.bias))  # type: ignore[misc]
        return cast(Tensor, _ops._linear_pointwise(x, kernel, self.bias, "gelu", [], "none"))

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """``residual + x W^T + b``."""
        kernel = self._packed(x)
        if kernel is None:
            return residual + F.linear(x, self.weight, self.bias)
        if self._half:
            return cast(Tensor, _half_product(x, kernel, self.bias).add_(residual))  # type: ignore[misc]
        return cast(Tensor, _ops._linear_pointwise.binary(x, residual, kernel, self.bias, "add"))


class Perceptron(Packable, nn.Sequential):
    """Linear maps of these sizes with a SiLU between each two; packed, one call of `worldmodel.native` where it serves.

    Packed, a row of the result does not depend on how many there are.
    """

    def __init__(self, *sizes: int) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.SiLU(), nn.Linear(inputs, outputs)]
        super().__init__(*layers[1:])

    @property
    def least_rows(self) -> int:
        """The fewest rows of which each is what it is in any batch; see `worldmodel.invariance`."""
        return 1 if self.serves or is_packed(self) else MATRIX_ROWS

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs) to (B, outputs)."""
        if self._waiting:
            kernels, maps = library(), cast("list[nn.Linear]", list(self)[::2])
            self._kernel = NativePerceptron(kernels, [(m.weight, m.bias) for m in maps]) if kernels else None
            self._waiting = False
        if self._kernel is None or x.dtype != torch.float32 or (x.requires_grad and torch.is_grad_enabled()):
            return cast(Tensor, super().forward(x))
        return cast(Tensor, self._kernel(x))


class PointConv2d(nn.Conv2d, Packed):
    """A 1x1 convolution as one matrix product over pixels, whose rows do not depend on how many there are.

    Kernels for 1x1 convolutions split their sums by batch size, so that a picture's rounding would depend on its batch.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 1)

    def _lay_out(self, x: Tensor) -> Tensor:
        return cast(Tensor, _ops._reorder_linear_weight(self.weight.detach().flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) to (B, outputs, h, w), channels last."""
        kernel, pixels = self._packed(x), x.permute(0, 2, 3, 1)
        if kernel is None:
            y = F.linear(pixels, self.weight.flatten(1), self.bias)
        else:
            y = _ops._linear_pointwise(pixels, kernel, self.bias, "none", [], "none")
        return y.permute(0, 3, 1, 2)


class Conv2d(nn.Conv2d, Packed):
    """A convolution with zero padding; its layout suits the size of the first pictures that it sees."""

    def _lay_out(self, x: Tensor) -> Tensor:
        one = (1, *x.shape[1:])
        return cast(Tensor, _ops._reorder_convolution_weight(self.weight.detach(), *self._geometry(), one))

    def _geometry(self) -> tuple[Any, ...]:
        return self.padding, self.stride, self.dilation, self.groups

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C', h', w')."""
        kernel = self._packed(x)
        if kernel is None:
            return super().forward(x)
        return cast(
            Tensor, _ops._convolution_pointwise(x, kernel, self.bias, *self._geometry(), "none", [], "")
        )


def narrow(weight: Tensor) -> Tensor:
    """The values near by that bfloat16 and float16 both represent: 8 significant bits, multiples of 2^-24.

    Trainings that multiply in bfloat16 round weights as far in each step; matrix units multiply them fastest.
    """
    return weight.bfloat16().half().to(weight.dtype)


def is_packed(module: nn.Module) -> bool:
    """Whether every layer of ``module`` that can be packed is: its rows then do not depend on their batch."""
    layers = [child for child in module.modules() if isinstance(child, nn.Linear | nn.Conv2d)]
    return bool(layers) and all(isinstance(child, Packed) and child.serves for child in layers)


def pack(module: nn.Module) -> None:
    """Pack every linear map and plain convolution in ``module``, in place; parameters and their names stay.

    The weights must be frozen: a packed copy does not follow them.
    """
    for child in module.modules():
        if type(child) is nn.Linear:
            child.__class__ = Linear
        elif (
            type(child) is nn.Conv2d and child.padding_mode == "zeros" and not isinstance(child.padding, str)
        ):
            child.__class__ = Conv2d
        if isinstance(child, Packable):
            child.pack()
