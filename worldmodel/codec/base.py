"""The interface of every codec: streaming, with its state passed in and returned.

Axis letters: B batch, T latent frames, F pixel frames, C latent channels; h, w latent grid; height, width
pixels.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

CodecState = dict[str, Tensor]
"""What a codec remembers between calls; tensors have B rows first. Empty if chunks are coded alone."""


class Codec(Protocol):
    """Pixels to standardised latents and back. A codec holds weights and no session."""

    @property
    def config(self) -> Any:
        """The dataclass that describes the codec."""
        ...

    @property
    def temporal_stride(self) -> int:
        """Pixel frames of every latent frame after the first."""
        ...

    @property
    def first_frames(self) -> int:
        """Pixel frames of the first latent frame."""
        ...

    @property
    def spatial_stride(self) -> int:
        """Pixels of a latent cell's side."""
        ...

    @property
    def latent_channels(self) -> int:
        """C."""
        ...

    def initial_state(self, batch: int) -> CodecState:
        """The state before the first frame of ``batch`` clips."""
        ...

    def begun(self, state: CodecState) -> Tensor | None:
        """(B,) bool: clips whose first latent frame has passed; None where all latent frames are alike."""
        ...

    def encode(self, frames: Tensor, state: CodecState) -> tuple[Tensor, CodecState]:
        """Frames (B, F, height, width, 3) uint8 RGB to latents (B, T, C, h, w) float32, about unit variance.

        Raises InputError for frames of another shape or dtype.
        """
        ...

    def decode(self, latents: Tensor, state: CodecState) -> tuple[Tensor, CodecState]:
        """Latents (B, T, C, h, w) to frames (B, F, height, width, 3) uint8 RGB.

        Raises InputError for latents of another shape or dtype.
        """
        ...
