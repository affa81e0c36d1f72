"""What callers give a world, checked before anything of it is used, and never kept: arrays are copied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldmodel.errors import InputError


def given_pixels(frames: Any, shape: tuple[int, ...]) -> Tensor:
    """Frames of this shape, uint8, in memory of their own: whoever gave them may write to theirs again.

    Raises:
        InputError: something else.
    """
    try:
        pixels = frames.clone() if isinstance(frames, Tensor) else torch.from_numpy(np.array(frames))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"frames are of type {type(frames).__name__}, expected a uint8 array of shape {shape}"
        ) from error
    if pixels.dtype != torch.uint8 or tuple(pixels.shape) != shape:
        raise InputError(
            f"frames have shape {tuple(pixels.shape)} and dtype {pixels.dtype}, expected {shape} uint8"
        )
    return pixels


def given_noise(noise: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Noise of this shape as float32 on the device.

    Raises:
        InputError: something else, or not finite.
    """
    if not (isinstance(noise, Tensor) and noise.is_floating_point() and tuple(noise.shape) == shape):
        found = f"shape {tuple(np.shape(noise))} and type {type(noise).__name__}"
        raise InputError(f"noise has {found}, expected a tensor of floats {shape}")
    if not torch.isfinite(noise).all():
        raise InputError("noise has values that are not finite")
    return noise.to(device, torch.float32)


def _leaves(actions: Any) -> list[Any]:
    if isinstance(actions, Mapping):
        return [leaf for value in actions.values() for leaf in _leaves(value)]
    return [actions]


def chunks_given(actions: Any, least: int = 1) -> int:
    """T of actions (B, T, ...) or of a dict of such, which may hold dicts.

    Raises:
        InputError: none, no arrays, arrays without a chunk axis or of unlike lengths, or fewer than ``least`` chunks.
    """
    leaves = [] if actions is None else _leaves(actions)
    try:
        lengths = {np.shape(leaf)[1] if np.ndim(leaf) > 1 else 0 for leaf in leaves}
    except ValueError as error:
        raise InputError(f"actions are not arrays: {error}") from error
    if len(lengths) != 1 or min(lengths) < least:
        shapes = ", ".join(str(np.shape(leaf)) for leaf in leaves) or "none"
        raise InputError(f"actions of shape {shapes}, expected (B, T, ...) with {least} chunks at least")
    return min(lengths)
