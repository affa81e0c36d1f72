"""Results that do not depend on the batch: rows for kernels that round differently when there are few.

On most CPUs torch's matrix products of at least 4 rows, and convolutions of at least 2 pictures, give each row bit for bit
what they give in any larger batch; smaller ones take other kernels. On some, larger ones do too, and the last bits of what
torch computes (an eye; all, without `worldmodel.native`) may then depend on who shares the batch. So may guided samples of
frames whose number of values is no multiple of 32: torch's softplus rounds the last ones of a tensor otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MATRIX_ROWS = 4
PICTURES = 2


def with_rows(minimum: int, function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """``function(*rows)`` of tensors with the same B rows first, computed on at least ``minimum`` of them.

    The last row stands in for those that are missing; the result has B rows.
    """
    count = len(rows[0])
    if count >= minimum:
        return function(*rows)
    index = torch.arange(minimum, device=rows[0].device).clamp(max=count - 1)
    return function(*(x[index] for x in rows))[:count]
