"""What a world needs before anything of it is loaded: bytes of weights and of a session, and what fits where.

Everything is counted from the configuration, with modules on the meta device. Letters: N tokens of a frame, W window.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from worldmodel.checkpoint import WorldSpec, empty_modules
from worldmodel.codec.kl import KLCodecConfig
from worldmodel.codec.wan import WanCodecConfig, cache_layouts
from worldmodel.errors import CheckpointError, InputError
from worldmodel.flow.flow import ONE_BY_ONE, FlowConfig

TEXT_ENCODER_PARAMETERS = {"google/flan-t5-xl": 1_223_527_424}
"""Parameters of the encoders of published models (24 layers of 48.2 M and the embedding)."""


@dataclass(frozen=True)
class Plan:
    """Bytes. ``weights``: by part. ``streams``: K/V caches of a session, 2 where prompts are guided.

    kv_window: K/V in view of a full window, all streams. kv_allocated: what the pages of a session take. kv_branch: what
    the page of a branch takes that is forked when a window has just restarted, up to the next restart, which makes it a
    session with a past of its own. reencoding: more K/V while a full window restarts, before the old
    pages go. codec_state, denoiser_state: of a session (the latter with the deep block's last inputs). working: an
    estimate of what a step of one session needs besides, for activations and masks. score: of that, the activations that
    are kept to differentiate the density, in a world without a denoiser.
    """

    name: str
    parameters: int
    weights: dict[str, int]
    streams: int
    kv_window: int
    kv_allocated: int
    kv_branch: int
    reencoding: int
    codec_state: int
    denoiser_state: int
    working: int
    score: int = 0

    @property
    def session(self) -> int:
        """Bytes of a session with a full window."""
        return self.kv_allocated + self.codec_state + self.denoiser_state

    @property
    def branch(self) -> int:
        """Bytes of a branch, whose past is another's until its window restarts."""
        return self.kv_branch + self.codec_state + self.denoiser_state

    def fits(self, free: int) -> tuple[int, int]:
        """Sessions that fit into ``free`` bytes, and branches of a single session; a step of one at a time."""
        room = free - sum(self.weights.values()) - self.working - self.reencoding
        return max(0, room // self.session), max(0, (room - self.session) // self.branch)

    def to_json(self, devices: dict[str, tuple[int, int]]) -> dict[str, Any]:
        """Everything, with what fits on ``devices`` (name to free and total bytes)."""
        rows = {
            name: dict(
                zip(("free", "total", "sessions", "branches"), (*memory, *self.fits(memory[0])), strict=True)
            )
            for name, memory in devices.items()
        }
        return {**asdict(self), "session": self.session, "branch": self.branch, "devices": rows}

    def lines(self, devices: dict[str, tuple[int, int]]) -> list[str]:
        """A table for people."""
        total = sum(self.weights.values())
        rows = [("weights", total, f"{self.parameters / 1e9:.3f} billion parameters of flow and actions")]
        rows += [(f"  {part}", size, "") for part, size in self.weights.items()]
        rows += [
            ("a session", self.session, "with a full window"),
            (
                "  K/V",
                self.kv_allocated,
                f"{self.streams} of them, in use {_size(self.kv_window)}",
            ),
            ("  codec state", self.codec_state, "causal feature caches"),
            ("  denoiser state", self.denoiser_state, "noisy latents, deep inputs, prompts"),
            ("a branch", self.branch, "forked after a restart of the window, until the next"),
            ("re-encoding", self.reencoding, "K/V of the new window beside the old one, for a moment"),
            ("working memory", self.working, "estimate for a step of one session"),
        ]
        if self.score:
            rows.append(("  its score", self.score, "to differentiate the density, in place of a denoiser"))
        table = [f"{name:18s}{_size(size):>10s}   {note}".rstrip() for name, size, note in rows]
        for name, (free, whole) in devices.items():
            sessions, branches = self.fits(free)
            verdict = (
                f"{sessions} sessions, or 1 session and {branches} branches of it"
                if sessions
                else f"does not fit: {_size(total + self.working + self.reencoding + self.session)} needed for one session"
            )
            table.append(f"{name:18s}{_size(free):>10s}   free of {_size(whole)}: {verdict}")
        return table


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def plan(spec: WorldSpec) -> Plan:
    """Count what a world with this specification needs."""
    modules = empty_modules(spec)
    weights = {part: sum(t.nbytes for t in m.state_dict().values()) for part, m in modules.items()}
    if spec.text is not None and spec.text.encoder in TEXT_ENCODER_PARAMETERS:
        weights["text encoder"] = 2 * TEXT_ENCODER_PARAMETERS[spec.text.encoder]
    flow, wide = spec.flow, 2 if spec.dtype == "bfloat16" else 4
    _, h, w = _latent_shape(spec)
    tokens = (h // flow.patch_size) * (w // flow.patch_size)
    streams = 2 if flow.text_tokens and spec.sampling.guidance else 1
    per_token = streams * 2 * flow.layers_per_block[-1] * flow.top_channels * wide
    reencodes = spec.sampling.context == "reencode"
    windows = 1 if reencodes else 2  # see `DeepBlock.reserve`
    page = flow.text_tokens + (windows * flow.window + 1) * tokens
    flow_reach = min(flow.window, 1 + flow.denoiser_layers * flow.denoiser_window)
    frame = tokens * flow.token_dim * 4
    features = flow.window * flow.action_features * 4
    prompts = streams * flow.text_tokens * flow.text_dim * 4
    score = 0 if flow.denoiser_layers else _score_working(flow, tokens, wide)
    return Plan(
        spec.name,
        sum(p.numel() for p in modules["flow"].parameters()),
        weights,
        streams,
        per_token * (flow.text_tokens + flow.window * tokens),
        per_token * page,
        per_token * (flow.window + 1 - min(flow.context, flow.window - 1)) * tokens,
        per_token * page if reencodes and spec.fps else 0,
        _codec_state(spec),
        (flow_reach + flow.window + 1) * frame + features + prompts,
        (score or _denoiser_working(flow, flow_reach * tokens, wide)) + _codec_working(spec),
        score,
    )


def _denoiser_working(flow: FlowConfig, noisy: int, wide: int) -> int:
    """A layer's activations and masks, for so many noisy tokens."""
    sequence = flow.text_tokens * flow.denoiser_conditional + noisy
    return sequence**2 * (1 + wide) + sequence * 12 * (flow.denoiser_channels or flow.channels) * wide


def _score_working(flow: FlowConfig, tokens: int, wide: int) -> int:
    """What the backward pass needs of every layer of the flow, whose weights are frozen: the inputs of both norms and of
    the GELU, queries, keys, values and their result, 11 numbers a channel; and the attention's weights, float32 at most.
    """
    *shallow, deep = flow.layers_per_block
    runs = (
        (sum(shallow), flow.channels, tokens),
        (deep, flow.top_channels, flow.text_tokens + flow.window * tokens),
    )
    return sum(
        layers * length * (11 * width * wide + width // flow.head_dim * length * 4)
        for layers, width, length in runs
    )


def _latent_shape(spec: WorldSpec) -> tuple[int, int, int]:
    return spec.codec.latent_channels, *(n // spec.codec.stride for n in spec.frame_size)  # type: ignore[return-value]


def _codec_state(spec: WorldSpec) -> int:
    if not isinstance(spec.codec, WanCodecConfig):
        return 0
    layouts = cache_layouts(spec.codec)
    size = {"encoder": 4, "decoder": 2 if spec.codec.decode_dtype == "bfloat16" else 4}
    return sum(size[k] * sum(map(math.prod, v.shapes)) + 1 for k, v in layouts.items())


def _codec_working(spec: WorldSpec) -> int:
    """About four tensors of the widest layer, for the frames of a chunk."""
    if isinstance(spec.codec, KLCodecConfig):  # widest where the last halving is undone
        return 16 * math.prod(spec.frame_size) * max(spec.codec.block_out_channels[:2])
    if not isinstance(spec.codec, WanCodecConfig):
        return 16 * math.prod(spec.frame_size) * spec.codec.frames
    widest = max(math.prod(s) // s[1] for v in cache_layouts(spec.codec).values() for s in v.shapes)
    return 4 * widest * spec.codec.frames * 4


def devices() -> dict[str, tuple[int, int]]:
    """Free and total bytes of the main memory and of every CUDA device."""
    found = {"cpu": _main_memory()}
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found[f"cuda:{index}"] = (free, total)
    return found


def _main_memory() -> tuple[int, int]:
    listing = Path("/proc/meminfo")
    if listing.is_file():
        entries = dict(line.split(":", 1) for line in listing.read_text().splitlines())
        available, total = (int(entries[k].split()[0]) * 1024 for k in ("MemAvailable", "MemTotal"))
        return available, total
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    return total, total


def device_for(spec: WorldSpec, wanted: str | None = None) -> torch.device:
    """Where a world goes: where it is ``wanted``, else on a GPU if there is one (the process's own under torchrun), but on
    the CPU where frames are so short that its kernels make them token by token.

    Raises:
        InputError: no such device, or none of these here.
    """
    if wanted is None:
        _, height, width = _latent_shape(spec)
        short = height * width // spec.flow.patch_size**2 <= ONE_BY_ONE
        alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
        wanted = "cuda" if not (short and alone) and torch.cuda.is_available() else "cpu"
        wanted += f":{os.environ.get('LOCAL_RANK', 0)}" if wanted == "cuda" else ""
    try:
        device = torch.device(wanted)
        if device.type != "cuda":
            torch.zeros((), device=device).item()  # there may be others, but meta holds nothing
    except RuntimeError as error:
        raise InputError(f"device is {wanted!r:.40}, expected cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device is {wanted!r}, and torch finds {torch.cuda.device_count()} GPUs here; give cpu"
        )
    return device


def check_memory(spec: WorldSpec, device: torch.device | str) -> None:
    """Check that a world's weights fit into what is free on a device, before any is loaded.

    Raises:
        CheckpointError: what is needed, what is free, and what can be done.
    """
    place = torch.device(device)
    name = f"cuda:{place.index or 0}" if place.type == "cuda" else place.type
    found = devices()
    if name not in found:
        return
    needed = sum(sum(t.nbytes for t in m.state_dict().values()) for m in empty_modules(spec).values())
    if needed > found[name][0]:
        raise CheckpointError(
            f"the weights of {spec.name} take {_size(needed)} and {_size(found[name][0])} are free on {name}; "
            f"free some, or use another device (`worldmodel info {spec.name} --plan` counts what fits)"
        )
