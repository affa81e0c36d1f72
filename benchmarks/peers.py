"""World models that others publish, at the same picture size, beside ours: what a step costs on this machine.

Shapes are the published defaults and weights random, since time does not depend on them: this compares speed and says
nothing of quality. Peers run by torch without autograd, without an environment around them and without reward or
termination, each in float32 and in bfloat16 by autocast. DIAMOND (Alonso et al., arXiv 2405.12399) samples each frame in
three Euler steps of a U-Net that sees four past frames; here it is diffusers' of the same channels and depths, its
convolutions in torch's layout for them. Dreamer's (Hafner et al., 1912.01603 and 2301.04104) recurrent state-space models
and decoders are TorchRL's own, at its defaults. None of them yields a likelihood of what it shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Row, flops, interleaved, ms
from benchmarks.steps import random_actions
from worldmodel import WorldModel

SIZE = 64
ACTIONS = 1
SIGMAS = (5.0, 0.6, 0.03, 0.0)  # from noise to a frame


class Diffusion(nn.Module):
    """Actions (B, 1) -> frames (B, 3, 64, 64): three Euler steps of a U-Net from noise, given four past frames."""

    past: Tensor
    actions: Tensor

    def __init__(self, batch: int) -> None:
        from diffusers import UNet2DModel

        super().__init__()
        self.unet: Any = UNet2DModel(
            sample_size=SIZE,
            in_channels=3 * 5,
            out_channels=3,
            block_out_channels=(64,) * 4,
            layers_per_block=2,
            down_block_types=("DownBlock2D",) * 4,
            up_block_types=("UpBlock2D",) * 4,
            norm_num_groups=2,
            resnet_time_scale_shift="scale_shift",
            class_embed_type="identity",
        )
        self.act = nn.Linear(4 * ACTIONS, 256)
        self.register_buffer("past", torch.rand(batch, 3 * 4, SIZE, SIZE) * 2 - 1)
        self.register_buffer("actions", torch.zeros(batch, 4 * ACTIONS))

    def forward(self, actions: Tensor) -> Tensor:
        """The next frame, from noise."""
        self.actions = torch.cat([self.actions[:, ACTIONS:], actions], dim=1)
        told = self.act(self.actions)
        x = SIGMAS[0] * torch.randn_like(self.past[:, :3])
        for sigma, after in pairwise(SIGMAS):
            skip, scale = 1 / (sigma**2 + 1), (sigma**2 + 1) ** 0.5
            seen = torch.cat([self.past, x / scale], dim=1).contiguous(memory_format=torch.channels_last)
            said = self.unet(seen, x.new_full((len(x),), math.log(sigma) / 4), class_labels=told).sample
            clean = (skip * x + sigma / scale * said).clamp(-1, 1)
            x = clean + after / sigma * (x - clean)
        self.past = torch.cat([self.past[:, 3:], x], dim=1)
        return x


class Dreamer(nn.Module):
    """Actions (B, 1) -> frames (B, 3, 64, 64): a sample of TorchRL's recurrent prior, decoded. v3: of categories."""

    belief: Tensor
    state: Tensor

    def __init__(self, batch: int, v3: bool) -> None:
        from torchrl.modules import DreamerV3ImageDecoder, ObsDecoder, RSSMPrior, RSSMPriorV3

        super().__init__()
        shape = torch.Size([ACTIONS])
        if v3:
            sizes = (512, 32 * 32)
            self.prior: nn.Module = RSSMPriorV3(action_shape=shape, action_dim=ACTIONS)
            self.decode: nn.Module = DreamerV3ImageDecoder(sum(sizes), (3, SIZE, SIZE))
        else:
            from torchrl.data import Bounded

            sizes = (200, 30)
            self.prior = RSSMPrior(Bounded(-1.0, 1.0, shape), action_dim=ACTIONS)
            self.decode = ObsDecoder(latent_dim=sum(sizes))
        for name, size in zip(("belief", "state"), sizes, strict=True):
            self.register_buffer(name, torch.zeros(batch, size))

    def forward(self, actions: Tensor) -> Tensor:
        """The next frame, from noise."""
        *_, self.state, self.belief = self.prior(self.state, self.belief, actions)
        return self.decode(self.state, self.belief)


PEERS: dict[str, tuple[str, Callable[[int], nn.Module]]] = {
    "DIAMOND": ("diffusers", Diffusion),
    "Dreamer": ("torchrl", lambda batch: Dreamer(batch, v3=False)),
    "DreamerV3": ("torchrl", lambda batch: Dreamer(batch, v3=True)),
}


def _step(peer: nn.Module, actions: Tensor, half: bool) -> Tensor:
    with torch.inference_mode(), torch.autocast(actions.device.type, torch.bfloat16, enabled=half):
        return peer(actions)


def _parameters(*parts: Any) -> int:
    return sum(p.numel() for part in parts for p in part.parameters())


def against_peers(world: WorldModel, batches: Sequence[int], repeats: int) -> list[Row]:
    """A step and a frame of every peer, in turns with a step of ``world`` (its frames, their likelihood), by batch size."""
    rows: list[Row] = []
    missing = {name: library for name, (library, _) in PEERS.items() if find_spec(library) is None}
    for batch in batches:
        state, _ = world.reset(list(range(batch)))
        for _ in range(3):
            state, _ = world.step(state, random_actions(world, batch))
        name = world.spec.name
        calls: dict[str, Callable[[], Any]] = {name: partial(world.step, state, random_actions(world, batch))}
        frames, sizes = {name: world.chunk_frames}, {name: _parameters(world.flow, world.codec)}
        for name, (_, build) in PEERS.items():
            if name not in missing:
                peer, actions = build(batch), torch.zeros(batch, ACTIONS, device=world.device)
                peer.requires_grad_(False).eval().to(world.device)
                sizes[name], frames[name] = _parameters(peer), 1
                calls[name] = partial(_step, peer, actions, False)
                calls[f"{name} bfloat16"] = partial(_step, peer, actions, True)
        times = interleaved(calls, repeats, f"peers, batch {batch}", warm=True)
        for name in frames:
            ways = [ms(t) for way, t in times.items() if way in (name, f"{name} bfloat16")]
            rows.append(
                {
                    "batch": batch,
                    "model": name,
                    "parameters": sizes[name],
                    "MFLOP a frame": flops(calls[name]) / batch / frames[name] / 1e6,
                    "ms a step": ways[0],
                    "in bfloat16": ways[1] if len(ways) > 1 else None,
                    "frames/s": 1e3 * batch * frames[name] / min(ways),
                }
            )
            ours = rows[-1 - list(frames).index(name)]
            rows[-1]["x ours a step"] = min(ways) / ours["ms a step"]
            rows[-1]["x ours a frame"] = ours["frames/s"] / rows[-1]["frames/s"]
    return rows + [{"model": name, "skipped": f"pip install {library}"} for name, library in missing.items()]
