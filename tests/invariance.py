"""Whether a row is rounded alike in any batch here (see `worldmodel.invariance`)."""

from __future__ import annotations

from functools import cache

import torch
from torch.nn import functional as F

from worldmodel.native import library


@cache
def products_round_alike() -> bool:
    """By the kernels always; by torch, products of 4, 8 and 20 rows are tried against the same rows among 256,
    convolutions of 2 pictures among 8.
    """
    if library() is not None:
        return True
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    for inputs, outputs in ((96, 288), (192, 768), (768, 192)):
        weight, x = draw(outputs, inputs), draw(256, inputs)
        if any(not torch.equal(F.linear(x[:n], weight), F.linear(x, weight)[:n]) for n in (4, 8, 20)):
            return False
    pictures = draw(8, 64, 16, 16).contiguous(memory_format=torch.channels_last)
    kernel = draw(64, 64, 3, 3).contiguous(memory_format=torch.channels_last)
    return torch.equal(F.conv2d(pictures[:2], kernel), F.conv2d(pictures, kernel)[:2])
