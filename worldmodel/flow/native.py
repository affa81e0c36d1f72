"""The flow's transformers as `worldmodel.native` runs them: weights laid out once, one call a frame.

`NativeTransformer` holds what the kernels read: the structures here mirror those in native/transformer.h, flow.c and
denoiser.c, field by field.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from worldmodel import native
from worldmodel.errors import InputError
from worldmodel.flow.affine import Affine, standard_normal_log_prob
from worldmodel.flow.cache import Cohort

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("attention_gain", "attention_bias", "mlp_gain", "mlp_bias")),
        *((name, native.Linear) for name in ("qkv", "out", "up", "down")),
    ]


class _Transformer(ctypes.Structure):
    _fields_ = [
        ("layer", ctypes.POINTER(_Layer)),
        ("final_gain", _POINTER),
        *((name, native.Linear) for name in ("proj_in", "action", "head")),
        *((name, _INT) for name in ("layers", "width", "heads", "head_dim")),
    ]


class _Block(ctypes.Structure):
    _fields_ = [
        ("transformer", ctypes.POINTER(_Transformer)),
        ("sos", _POINTER),
        ("soft_clip", ctypes.c_float),
        ("flip", _INT),
    ]


class _Segment(ctypes.Structure):
    _fields_ = [
        ("kv", _POINTER),
        *((name, _LONG) for name in ("layer", "kind", "row", "head")),
        *((name, _INT) for name in ("tokens", "fold")),
    ]


class _Cohort(ctypes.Structure):
    _fields_ = [
        ("segment", ctypes.POINTER(_Segment)),
        ("turns", _POINTER),
        *((name, _INT) for name in ("segments", "rows", "fresh")),
    ]


class _Frame(ctypes.Structure):
    _fields_ = [
        ("block", _Block),
        ("cohort", ctypes.POINTER(_Cohort)),
        *((name, _POINTER) for name in ("noise", "last", "features")),
        ("last_stride", _LONG),
        *((name, _POINTER) for name in ("v", "mu", "sigma", "log_det")),
        *((name, _INT) for name in ("rows", "streams", "tokens", "feature_size")),
    ]


class _Known(ctypes.Structure):
    _fields_ = [
        ("block", _Block),
        ("cohort", ctypes.POINTER(_Cohort)),
        *((name, _POINTER) for name in ("v", "last", "features")),
        ("last_stride", _LONG),
        *((name, _POINTER) for name in ("mu", "sigma")),
        *((name, _INT) for name in ("rows", "frames", "tokens", "feature_size")),
    ]


class _Newest(ctypes.Structure):
    _fields_ = [
        ("transformer", ctypes.POINTER(_Transformer)),
        *((name, _POINTER) for name in ("noisy", "features", "turns", "cached", "missing", "asking")),
        *((name, _POINTER) for name in ("score", "kept")),
        *((name, _INT) for name in ("rows", "frames", "tokens", "feature_size", "window")),
    ]


class _Density(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("u", "mu", "sigma", "log_det", "z", "elements", "log_prob")),
        *((name, _INT) for name in ("streams", "rows", "size")),
    ]


class Order(NamedTuple):
    """What makes an autoregressive block of a transformer: SOS (D), whether its own order is the raster's backwards, and
    the soft clip of its head.
    """

    sos: Tensor
    flip: bool
    soft_clip: float


class Past(NamedTuple):
    """Sequences behind cached keys and values, with reserved slots for what comes: cohorts in row order, their rotations
    (R, K / 2) of the run, and the token before the run (B, D), unused in cohorts that begin with SOS.
    """

    cohorts: Sequence[Cohort]
    turns: Sequence[Tensor]
    last: Tensor | None

    @property
    def rows(self) -> int:
        """B."""
        return sum(c.rows for c in self.cohorts)


class Inverted(NamedTuple):
    """u and x (B, N, D) before and after the shallow blocks; the first block's maps (S, B, N, D) at u; the elementwise
    log-determinant (B, N, D) of the others at x.
    """

    u: Tensor
    x: Tensor
    maps: Affine
    log_det: Tensor


class Density(NamedTuple):
    """z and elementwise nats (B, ...) under the first of some maps, and the nats (S, B) float64 under each."""

    z: Tensor
    elements: Tensor
    log_prob: Tensor


def density(u: Tensor, maps: Affine, log_det: Tensor) -> Density:
    """The density of u (B, ...) under each of S affine maps (S, B, ...) at it; log_det (B, ...) of what came before is
    added.
    """
    mu, sigma = maps
    kernels = native.library()
    if kernels is None or u.device.type != "cpu" or u.dtype != torch.float32 or mu.dtype != torch.float32:
        z = (u - mu) / sigma
        elements = standard_normal_log_prob(z) - torch.log(sigma) + log_det
        return Density(z[0], elements[0], elements.flatten(2).double().sum(2).cpu())
    u, log_det, mu, sigma = u.contiguous(), log_det.contiguous(), mu.contiguous(), sigma.contiguous()
    z, elements = torch.empty_like(u), torch.empty_like(u)
    log_prob = torch.empty(mu.shape[:2], dtype=torch.float64)
    addresses = (t.data_ptr() for t in (u, mu, sigma, log_det, z, elements, log_prob))
    kernels.worldmodel_density(ctypes.byref(_Density(*addresses, *mu.shape[:2], u[0].numel())))
    return Density(z, elements, log_prob)


class LayerParts(NamedTuple):
    """A layer: its norms before attention and MLP, and its linear maps."""

    norms: tuple[nn.LayerNorm, nn.LayerNorm]
    maps: tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]
    """qkv, out, up, down"""


class TransformerParts(NamedTuple):
    """A transformer: layers; maps of tokens, of action features (None for none) and to its outputs; the gain of the
    RMSNorm at its end, None for none.
    """

    layers: Sequence[LayerParts]
    proj_in: nn.Linear
    proj_action: nn.Linear | None
    proj_out: nn.Linear
    final_gain: Tensor | None
    head_dim: int


class NativeTransformer:
    """A frozen float32 transformer for the kernels. ``Transformer.native`` makes it."""

    def __init__(self, kernels: ctypes.CDLL, parts: TransformerParts) -> None:
        self._kernels = kernels
        self._weights = w = native.Weights(kernels)
        layers = [
            _Layer(
                *(w.pointer(p) for norm in layer.norms for p in (norm.weight, norm.bias)),
                *(w.linear(each.weight, each.bias) for each in layer.maps),
            )
            for layer in parts.layers
        ]
        width, action = parts.proj_in.out_features, parts.proj_action
        self._transformer = _Transformer(
            w.array(_Layer, layers),
            None if parts.final_gain is None else w.pointer(parts.final_gain),
            w.linear(parts.proj_in.weight, parts.proj_in.bias),
            w.linear(None if action is None else action.weight, None),
            w.linear(parts.proj_out.weight, parts.proj_out.bias),
            len(layers),
            width,
            width // parts.head_dim,
            parts.head_dim,
        )

    def extend(
        self, order: Order, past: Past, v: Tensor, features: Tensor | None, frames: int, maps: bool = True
    ) -> Affine:
        """Affine maps of a run of known tokens v (B, T * N, D) behind the past, raster order within each frame; features
        (B, T, E). K/V go into the past's slots; without ``maps`` nothing else is computed, and these are empty.
        """
        known, acts = _inputs(self._transformer, v, features)
        mu, sigma = torch.empty(2, *known.shape if maps else (0,)).unbind()
        cohorts, kept = _cohorts(past, self._transformer, *known.shape[:2])
        last, stride = _address(past.last), 0 if past.last is None else past.last.stride(0)
        run = _Known(
            self.block(order),
            cohorts,
            known.data_ptr(),
            last,
            _address(acts),
            stride,
            mu.data_ptr() if maps else None,
            sigma.data_ptr(),
            len(known),
            frames,
            known.shape[1] // frames,
            0 if acts is None else acts.shape[-1],
        )
        self._run("worldmodel_extend", run)
        del kept
        return Affine(mu, sigma)

    def newest(
        self,
        noisy: Tensor,
        features: Tensor | None,
        turns: Tensor,
        missing: Sequence[int],
        asking: Sequence[int],
        window: int,
        cached: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """A denoiser's outputs (B, N, D) for the last frame of noisy (B, T, N, D), and what it keeps of the last frames
        (B, layers, 2, window * N, W): as ``cached`` in the next step that stands for all frames but the newest (T = 1).

        features (B, T, E); turns ((window + 1) * N, K / 2); row b's first ``missing[b]`` frames do not exist, of T or, with
        ``cached``, of window + 1. Each layer goes on with its last ``asking`` frames.
        """
        rows = len(noisy)
        noisy, acts = _inputs(self._transformer, noisy, features)
        cached = None if cached is None else cached.contiguous()
        score = torch.empty(rows, *noisy.shape[2:])
        shape = (rows, self._transformer.layers, 2, window * noisy.shape[2], self._transformer.width)
        kept = torch.empty(shape)
        absent, asks = (_INT * rows)(*missing), (_INT * len(asking))(*asking)
        self._run(
            "worldmodel_denoise",
            _Newest(
                ctypes.pointer(self._transformer),
                noisy.data_ptr(),
                _address(acts),
                turns.data_ptr(),
                _address(cached),
                ctypes.addressof(absent),
                ctypes.addressof(asks),
                score.data_ptr(),
                kept.data_ptr(),
                *noisy.shape[:3],
                0 if acts is None else acts.shape[-1],
                window,
            ),
        )
        return score, kept

    @property
    def shape(self) -> _Transformer:
        """Its sizes, among what the kernels read."""
        return self._transformer

    def block(self, order: Order) -> _Block:
        """The block that these weights make in this order."""
        return _Block(ctypes.pointer(self._transformer), order.sos.data_ptr(), order.soft_clip, order.flip)

    def _run(self, function: str, job: ctypes.Structure) -> None:
        if self._kernels[function](ctypes.byref(job), torch.get_num_threads()):
            raise MemoryError("not enough memory for a pass of the flow; the state is unchanged")


class NativeFlow:
    """The deep block, and behind it the shallow ones, for the kernels: noise to a frame in one call. ``Flow.native``
    makes it.

    blocks: in the order in which a frame is inverted.
    """

    def __init__(self, kernels: ctypes.CDLL, blocks: Sequence[tuple[NativeTransformer, Order]]) -> None:
        self._kernels = kernels
        self._blocks = [transformer.block(order) for transformer, order in blocks]
        self._shapes = [transformer.shape for transformer, _ in blocks]
        self._kept = blocks

    def invert(
        self, past: Past, w: Tensor, features: Tensor | None, streams: int, alone: Sequence[Past]
    ) -> Inverted:
        """A frame token by token: noise w (B, N, D) to u under the action's ``features`` (B, E) and, in a second stream,
        under none, then through the shallow blocks, which have no past (``alone``). K/V of the first stream go into the
        past's slots.
        """
        rows, tokens, dim = w.shape
        noise, acts = _inputs(self._shapes[0], w, features)
        v = torch.empty(len(self._blocks), rows, tokens, dim)
        maps, spare = torch.empty(2, streams, rows, tokens, dim), torch.empty(2, rows, tokens, dim)
        log_det = torch.zeros(rows, tokens, dim)
        size = rows * tokens * dim * v.element_size()
        here, mu, unused = v.data_ptr(), maps.data_ptr(), spare.data_ptr()
        last, stride = _address(past.last), 0 if past.last is None else past.last.stride(0)
        width = 0 if acts is None else acts.shape[-1]
        cohorts, kept = _cohorts(past, self._shapes[0], rows, tokens)
        deep = (self._blocks[0], cohorts, noise.data_ptr(), last, _address(acts), stride)
        maps_at = (here, mu, mu + streams * size)
        frames = [_Frame(*deep, *maps_at, None, rows, streams, tokens, width)]
        for index, (block, nothing) in enumerate(zip(self._blocks[1:], alone, strict=True)):
            cohorts, more = _cohorts(nothing, self._shapes[1 + index], rows, tokens)
            kept += more
            before = here + index * size
            shallow = (block, cohorts, before, None, None, 0, before + size, unused, unused + size)
            frames.append(_Frame(*shallow, log_det.data_ptr(), rows, 1, tokens, 0))
        chain = (_Frame * len(frames))(*frames)
        if self._kernels.worldmodel_invert(chain, len(frames), torch.get_num_threads()):
            raise MemoryError("not enough memory for a frame; the state is unchanged")
        del kept
        return Inverted(v[0], v[-1], Affine(*maps), log_det)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _inputs(shape: _Transformer, tokens: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Tokens (..., D) and action features (..., E) as the kernels read them.

    Raises:
        InputError: they are of another size than this transformer's.
    """
    wanted = shape.action.inputs
    if tokens.shape[-1] != shape.proj_in.inputs:
        raise InputError(f"tokens of {tokens.shape[-1]} dimensions, expected {shape.proj_in.inputs}")
    if features is not None and wanted and features.shape[-1] != wanted:
        raise InputError(f"{features.shape[-1]} action features, expected {wanted}")
    acts = features.to(torch.float32).contiguous() if features is not None and wanted else None
    return tokens.to(torch.float32).contiguous(), acts


def _cohorts(
    past: Past, shape: _Transformer, rows: int, tokens: int
) -> tuple[ctypes.Array[_Cohort], list[object]]:
    """The past of ``rows`` sequences as the kernels read it, with room for ``tokens`` more, and what must be kept until
    they have. Everything that they will read or write is checked here.

    Raises:
        InputError: K/V of another shape or type than this transformer's, as in a file that was tampered with.
    """
    cohorts, kept = (_Cohort * len(past.cohorts))(), []
    if past.rows != rows:
        raise InputError(f"K/V of {past.rows} sequences, expected {rows}")
    for into, cohort, turns in zip(cohorts, past.cohorts, past.turns, strict=True):
        segments = (_Segment * len(cohort.segments))()
        for entry, segment in zip(segments, cohort.segments, strict=True):
            kv = segment.page.kv
            layer, kind, row, head, token, each = kv.stride()
            layers, two, stored, heads, capacity, size = kv.shape
            own = segment is cohort.segments[-1]  # which takes the new ones
            if (
                (layers, two, heads, size) != (shape.layers, 2, shape.heads, shape.head_dim)
                or (stored * segment.fold, token, each) != (cohort.rows, size, 1)
                or not 0 <= segment.start <= segment.stop <= capacity - own * tokens
                or (own and segment.fold != 1)
                or kv.dtype != torch.float32
            ):
                raise InputError(f"K/V of shape {tuple(kv.shape)} and dtype {kv.dtype} are not of this world")
            entry.kv = kv.data_ptr() + 4 * segment.start * token
            entry.layer, entry.kind, entry.row, entry.head = layer, kind, row, head
            entry.tokens, entry.fold = segment.tokens, segment.fold
        into.segment, into.segments = segments, len(segments)
        into.turns, into.rows, into.fresh = turns.data_ptr(), cohort.rows, cohort.next_position == 0
        kept += [segments, turns]
    return cohorts, kept
