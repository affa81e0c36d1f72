"""A small fast decoder for Wan2.2's latents: the architecture of TAEHV's ``taew2_2`` (github.com/madebyollin/taehv).

Two-dimensional convolutions throughout. What knows of time: a memory block sees its input beside the frame before it,
and a growing layer turns a frame's channels into several frames. So all that a stream remembers is the last input of
each memory block, zeros before the first frame; of the first latent frame only the last pixel frame is shown.

Axis letters: B batch, T frames at some depth, C channels.
"""

from __future__ import annotations

from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from worldmodel.errors import CheckpointError
from worldmodel.files import load_tensors, read_pth

WIDTHS = (256, 128, 64, 64)
GROWTH = (1, 2, 2)
PATCH = 2


class Clamp(nn.Module):
    """Latents softly limited to +-3."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return 3.0 * torch.tanh(x / 3.0)


class Memory(nn.Module):
    """Three 3x3 convolutions of a frame and the one before it, around the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """Frames (n, C, h, w) and the frame before each, to the same shape."""
        return F.relu(self.conv(torch.cat((x, before), dim=1)) + x)


class Grow(nn.Module):
    """Each frame becomes ``factor`` frames."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.conv = nn.Conv2d(width, width * factor, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, C, h, w) to (n * factor, C, h, w)."""
        return rearrange(self.conv(x), "n (f c) h w -> (n f) c h w", f=self.factor)


class FastDecoder(nn.Module):
    """Standardised latents to pixels. The keys of its state dict are those of the published file, ``decoder.``*."""

    def __init__(self, latent_channels: int, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        layers: list[nn.Module] = [Clamp(), nn.Conv2d(latent_channels, widths[0], 3, padding=1), nn.ReLU()]
        for width, after, factor in zip(widths, widths[1:], GROWTH, strict=False):
            layers += [Memory(width) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2), Grow(width, factor)]
            layers.append(nn.Conv2d(width, after, 3, padding=1, bias=False))
        layers += [nn.ReLU(), nn.Conv2d(widths[-1], 3 * PATCH**2, 3, padding=1)]
        self.widths = widths
        self.decoder = nn.Sequential(*layers)

    def memory_shapes(self, h: int, w: int) -> list[tuple[int, int, int]]:
        """What the memory blocks remember of one row with a latent grid (h, w)."""
        return [(c, h * 2**i, w * 2**i) for i, c in enumerate(self.widths[:3]) for _ in range(3)]

    def forward(self, latents: Tensor, memories: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Latents (B, T, C, h, w) and memories (B, ...) to pixels (B, 3, 4 T, height, width), about -1 to 1, and the
        memories after them.
        """
        rows = len(latents)
        x, left, after = latents.flatten(0, 1), list(memories), []
        for layer in self.decoder:
            if not isinstance(layer, Memory):
                x = layer(x)
                continue
            frames = x.unflatten(0, (rows, -1))
            before = torch.cat((left.pop(0)[:, None].to(x.dtype), frames[:, :-1]), dim=1)
            after.append(frames[:, -1])
            x = layer(x, before.flatten(0, 1))
        pixels = 2.0 * F.pixel_shuffle(x, PATCH) - 1.0
        return rearrange(pixels, "(b t) c h w -> b c t h w", b=rows), after


def load_fast_decoder(path: Path, latent_channels: int = 48, widths: tuple[int, ...] = WIDTHS) -> FastDecoder:
    """The decoder of a published ``taew2_2`` file, ``.pth`` or ``.safetensors``; its encoder is not used.

    A growing layer of the file may have more outputs than are grown here; the last ones count.

    Raises:
        CheckpointError: missing, damaged, or with other keys or shapes; all are listed.
    """
    given = load_tensors(path) if path.suffix == ".safetensors" else read_pth(path)
    given = {k: v for k, v in given.items() if not k.startswith("encoder.")}
    decoder = FastDecoder(latent_channels, widths)
    expected = decoder.state_dict()
    for name, layer in decoder.decoder.named_children():
        key = f"decoder.{name}.conv.weight"
        if isinstance(layer, Grow) and key in given and len(given[key]) > len(expected[key]):
            given[key] = given[key][-len(expected[key]) :]
    problems = [
        f"{what}: {', '.join(keys)}"
        for what, keys in (
            ("missing", sorted(set(expected) - set(given))),
            ("unexpected", sorted(set(given) - set(expected))),
            (
                "wrong shape",
                sorted(k for k in expected if k in given and expected[k].shape != given[k].shape),
            ),
        )
        if keys
    ]
    if problems:
        raise CheckpointError(f"{path} is not a taew2_2 decoder; {'; '.join(problems)}")
    decoder.load_state_dict({k: v.float() for k, v in given.items()})
    return decoder.eval().requires_grad_(False)
