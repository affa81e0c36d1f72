"""How chunks are imagined: the dials of the sampler."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from worldmodel.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How chunks are imagined.

    guidance: classifier-free guidance weight, 0 = the model's own distribution. temperature: standard deviation of the
    noise. tolerance: the Jacobi solver stops a sequence when the mean squared change of a sweep, relative to the mean
    square, is below it (0: exact); the noisy latent then differs from that of the exact inverse by less than
    ``sqrt(tolerance)``, relative RMS, as `worldmodel bench --only tolerance` measures; there, at the default, no pixel
    of the shipped world differs (frames of up to 8 tokens are exact anyway). context: what happens when the window
    is full, "reencode" restarts from the last frames with positions from 0, "rolling" evicts the oldest frame.
    """

    guidance: float = 0.0
    temperature: float = 1.0
    tolerance: float = 1e-8
    context: Literal["reencode", "rolling"] = "reencode"

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            InputError: naming the field and its range.
        """
        if self.context not in ("reencode", "rolling"):
            raise InputError(f'context is {self.context!r}, expected "reencode" or "rolling"')
        for name in ("guidance", "temperature", "tolerance"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} is {value}, expected a finite number >= 0")
