"""How planners search, and the presets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from worldmodel import InputError


@dataclass(frozen=True)
class Search:
    """How to search; the defaults are the preset ``fast``.

    method: "mppi" averages elites with softmax weights, "cem" refits to the elites and takes the best sequence seen,
    "shooting" samples uniformly and takes the best. candidates: N of an iteration. horizon: H chunks. elites: E.
    temperature: of MPPI's softmax, in standard deviations of the returns. initial_std, std_range: standard deviation
    of a Box action in halves of its range. colour: exponent of the noise's power spectrum 1/f^colour over the horizon
    (0 white). keep: share of the elites that stay candidates. shrink: candidates are divided by it every iteration.
    iCEM (arXiv 2008.06389) is "cem" with colour, keep and shrink. deadline: seconds; no iteration is begun that would,
    at the pace of the slowest so far, end after it, but the first always runs.
    """

    method: Literal["shooting", "cem", "mppi"] = "mppi"
    candidates: int = 32
    iterations: int = 2
    horizon: int = 5
    elites: int = 6
    temperature: float = 0.5
    initial_std: float = 1.0
    std_range: tuple[float, float] = (0.05, 2.0)
    colour: float = 0.0
    keep: float = 0.0
    shrink: float = 1.0
    deadline: float | None = None

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            InputError: naming the field and its range.
        """
        if self.method not in ("shooting", "cem", "mppi"):
            raise InputError(f"method is {self.method!r}, expected shooting, cem or mppi")
        for name in ("iterations", "horizon", "elites"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.candidates < self.elites:
            raise InputError(f"candidates is {self.candidates}, expected at least the {self.elites} elites")
        low, high = self.std_range
        if not 0 < low <= self.initial_std <= high:
            raise InputError(
                f"initial_std {self.initial_std} is outside std_range {self.std_range}, or that is not positive"
            )
        if not (self.temperature > 0 and self.shrink >= 1 and 0 <= self.keep <= 1 and self.colour >= 0):
            raise InputError("expected temperature > 0, shrink >= 1, 0 <= keep <= 1 and colour >= 0")
        if self.deadline is not None and not self.deadline > 0:
            raise InputError(f"deadline is {self.deadline}, expected seconds > 0, or None")


PRESETS: dict[str, Search] = {
    "fast": Search(),
    "quality": Search(candidates=64, iterations=3, elites=8),
    "paper": Search(method="cem", candidates=300, iterations=30, elites=30),
}
"""``paper`` is the CEM 300 x 30 of DINO-WM and stable-worldmodel."""


def preset(name: str) -> Search:
    """The preset of that name.

    Raises:
        InputError: no preset of that name.
    """
    if name not in PRESETS:
        raise InputError(f"no preset {name!r}; choose from {', '.join(PRESETS)}")
    return PRESETS[name]
