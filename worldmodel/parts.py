"""`WorldParts`: the weights of a world, how they are loaded, and the shapes that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import nn

from worldmodel.checkpoint import WorldFiles, WorldSpec, read_spec, read_world
from worldmodel.codec.base import Codec
from worldmodel.codec.kl import KLCodec
from worldmodel.codec.taehv import load_fast_decoder
from worldmodel.codec.wan import WanCodec
from worldmodel.condition.actions import ActionEncoder
from worldmodel.condition.prompts import Prompts
from worldmodel.errors import InputError
from worldmodel.flow.flow import Flow
from worldmodel.heads import Heads
from worldmodel.packed import pack
from worldmodel.plan import check_memory
from worldmodel.published import obtain
from worldmodel.sampling import Sampling
from worldmodel.state import WorldState


class WorldParts:
    """Flow, codec, action encoder, heads, bank of starts, and prompts, read-only; `WorldModel` steps with them."""

    def __init__(
        self,
        spec: WorldSpec,
        flow: Flow,
        codec: Codec,
        actions: ActionEncoder | None,
        heads: Heads | None,
        starts: Mapping[str, np.ndarray],
        fingerprint: str = "",
        prompts: Prompts | None = None,
    ) -> None:
        self.spec = spec
        self.flow = flow
        self.codec = codec
        self.actions = actions
        self.heads = heads
        self.starts = starts
        self.fingerprint = fingerprint
        self.prompts = prompts

    @classmethod
    def load(
        cls, name: str | Path, device: torch.device | str = "cpu", prompt_cache: Path | None = None
    ) -> Self:
        """A world that ships with the package ("pendulum", "lunarlander"), a world directory, or a published model.

        A published model is "apple/starflow-v", "apple/starflow" (pictures), or a directory with its ``.pth``; it is
        converted once, see `worldmodel.published`.

        ``prompt_cache``: a folder where encoded prompts are kept, for worlds that take some.

        Raises:
            CheckpointError: no such world, a corrupt or truncated one, weights that cannot be had, or too little memory.
            ConfigError: an unknown or missing key.
        """
        path = obtain(name)
        check_memory(read_spec(path), device)
        files: WorldFiles = read_world(path)
        flow, codec, actions, heads = files.build(device)
        prompts = files.prompts(device, prompt_cache)
        for part in (flow, codec, actions, heads):
            if isinstance(part, nn.Module):
                pack(part)
        return cls(files.spec, flow, codec, actions, heads, files.starts, files.fingerprint, prompts)

    def with_sampling(self, sampling: Sampling) -> Self:
        """The same world with another sampler of its own."""
        return self._with(replace(self.spec, sampling=sampling))

    def at(self, frame_size: tuple[int, int]) -> Self:
        """The same weights for frames of another size (height, width), without the bank and the heads.

        Raises:
            InputError: the codec has one frame size.
        """
        if frame_size == self.spec.frame_size:
            return self
        if not isinstance(self.codec, WanCodec | KLCodec):
            raise InputError(f"this world's codec has one frame size, {self.spec.frame_size}")
        codec = self.codec.at(frame_size)
        spec = replace(self.spec, frame_size=frame_size, codec=codec.config, heads=None, bank=False)
        other = self._with(spec)
        other.codec, other.heads, other.starts = codec, None, {}
        other.prompts = None if self.prompts is None else self.prompts.at(frame_size)
        return other

    def _with(self, spec: WorldSpec) -> Self:
        parts = self.flow, self.codec, self.actions, self.heads, self.starts, self.fingerprint
        return type(self)(spec, *parts, self.prompts)

    def with_fast_decoder(self, path: str | Path) -> Self:
        """The same world, its frames decoded by the small decoder in a ``taew2_2`` file; for worlds with Wan2.2's codec.

        Raises:
            InputError: another codec. CheckpointError: a file that is missing, damaged or not such a decoder.
        """
        if not isinstance(self.codec, WanCodec):
            raise InputError(
                f"{self.spec.name} has a codec of its own; a fast decoder is for Wan2.2's latents"
            )
        codec = self.codec.with_fast_decoder(load_fast_decoder(Path(path), self.codec.latent_channels))
        other = self._with(self.spec)
        other.codec = codec
        return other

    # ---- geometry ---------------------------------------------------------------------------------------------------
    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.flow.deep.sos.device

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of a latent frame."""
        (height, width), stride = self.spec.frame_size, self.codec.spatial_stride
        return self.codec.latent_channels, height // stride, width // stride

    @cached_property
    def grid(self) -> tuple[int, int]:
        """Tokens (h, w) of a latent frame."""
        return self.flow.grid(self.latent_shape[1:])

    @property
    def chunk_frames(self) -> int:
        """F, pixel frames of a chunk."""
        return self.codec.temporal_stride

    @property
    def first_frames(self) -> int:
        """Pixel frames of a session's first chunk: F, or 1 where the codec begins with a picture."""
        return self.codec.first_frames

    @property
    def frames_shape(self) -> tuple[int, int, int, int]:
        """(F, height, width, 3) of a chunk; a session's first one has `first_frames` in place of F."""
        return (self.chunk_frames, *self.spec.frame_size, 3)

    def next_frames(self, state: WorldState) -> int:
        """Pixel frames that the next chunk of these sessions has.

        Raises:
            InputError: some sessions have begun and some have not, and their chunks differ in length.
        """
        begun = self.codec.begun(state.codec)
        if begun is None:
            return self.chunk_frames
        if bool(begun.any()) and not bool(begun.all()):
            raise InputError(
                f"some sessions are before their first chunk ({self.first_frames} frames) and some after it "
                f"({self.chunk_frames}); select() them apart, and concat them when all have begun"
            )
        return self.chunk_frames if bool(begun.all()) else self.first_frames
