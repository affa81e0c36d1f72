"""One world on several processes: the heads of every transformer spread (tensor parallel), guidance's two streams apart.

``torchrun --nproc-per-node N -m -- worldmodel rollout ...``. Every process runs the same session and holds the same state,
but for K/V: each keeps those of its own heads. The linear maps are cut here, with an all-reduce behind each attention
and MLP, and not by DTensor's ``parallelize_module``: that works on a module's ``forward`` and on whole fused matrices,
while K/V pages and fused paths take plain local tensors, and qkv must be cut head by head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from worldmodel.errors import ConfigError
from worldmodel.flow.affine import Affine
from worldmodel.flow.attention import Attention
from worldmodel.flow.block import MLP, Transformer
from worldmodel.flow.flow import Flow
from worldmodel.packed import Linear
from worldmodel.training.parallel import Ranks
from worldmodel.world import WorldModel


class SummedLinear(nn.Module):
    """This process's columns of a linear map, and the sum over the processes of ``group``."""

    def __init__(self, weight: Tensor, bias: Tensor, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(t.clone(), requires_grad=False) for t in (weight, bias))
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs / n) to (..., outputs), whole on every process."""
        partial = F.linear(x, self.weight)
        dist.all_reduce(partial, group=self.group)
        return partial + self.bias

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """The same, and a residual (..., outputs) that every process has."""
        return residual + self(x)


def _rows(linear: Linear, rows: Tensor) -> Linear:
    """The given outputs of a linear map."""
    part = Linear(linear.in_features, len(rows), device=linear.weight.device, dtype=linear.weight.dtype)
    part.weight.copy_(linear.weight[rows])
    part.bias.copy_(linear.bias[rows])
    return part.requires_grad_(False)


@torch.no_grad()
def spread_heads(flow: Flow, mesh: DeviceMesh) -> None:
    """Keep this process's heads of every attention, and its share of every MLP, in place.

    A smaller transformer whose heads do not divide by the number of processes stays whole on each.

    Raises:
        ConfigError: the deep block's heads do not divide.
    """
    size = mesh.size()
    for transformer in [m for m in flow.modules() if isinstance(m, Transformer)]:
        units = [m for m in transformer.modules() if isinstance(m, Attention | MLP)]
        heads = next((m.heads for m in units if isinstance(m, Attention)), size)
        if heads % size == 0:
            for unit in units:
                _cut(unit, mesh.get_local_rank(), size, mesh.get_group())
        elif transformer is flow.deep.transformer:
            raise ConfigError(
                f"the deep block's {heads} heads do not divide by {size} processes; start a number of them that does"
            )


def _cut(unit: Attention | MLP, rank: int, size: int, group: dist.ProcessGroup) -> None:
    if isinstance(unit, Attention):
        rows = rearrange(torch.arange(unit.qkv.out_features), "(three n r) -> n three r", three=3, n=size)
        unit.qkv = _rows(unit.qkv, rows[rank].flatten())
        unit.heads //= size
        columns = unit.out.weight.chunk(size, dim=1)[rank]
        unit.out = SummedLinear(columns, unit.out.bias, group)  # type: ignore[assignment]
    else:
        unit.up = _rows(unit.up, torch.arange(unit.up.out_features).chunk(size)[rank])
        columns = unit.down.weight.chunk(size, dim=1)[rank]
        unit.down = SummedLinear(columns, unit.down.bias, group)  # type: ignore[assignment]


def apart(mesh: DeviceMesh) -> Callable[[Callable[[], Affine], Callable[[], Affine]], tuple[Affine, Affine]]:
    """`DeepBlock.pair` on two processes: the first evaluates under the condition, the second under none."""
    group, mine = mesh.get_group(), mesh.get_local_rank()

    def pair(model: Callable[[], Affine], uncond: Callable[[], Affine]) -> tuple[Affine, Affine]:
        own = torch.stack((model, uncond)[mine]())
        both = [torch.empty_like(own) for _ in range(2)]
        dist.all_gather(both, own, group=group)
        return Affine(*both[0].unbind()), Affine(*both[1].unbind())

    return pair


def spread(world: WorldModel, ranks: Ranks, guided: bool) -> None:
    """Spread ``world`` over all processes, in place: ``guided`` uses a factor of two for guidance, heads the rest.

    Every process must then make the same calls. Forks, snapshots and restores work as ever; a saved state holds the K/V
    of one process.

    Raises:
        ConfigError: the numbers do not divide, or heads are to be spread of a flow that is denoised by its own score.
    """
    streams = 2 if guided and ranks.size % 2 == 0 else 1
    if ranks.size > streams and world.flow.denoiser is None:
        raise ConfigError(
            f"{world.spec.name} is denoised by its own score, which needs all heads in one process; "
            f"start {streams} of them"
        )
    mesh = init_device_mesh(
        ranks.device.type, (streams, ranks.size // streams), mesh_dim_names=("guidance", "heads")
    )
    if streams == 2:
        world.flow.deep.pair = apart(mesh["guidance"])
    if ranks.size // streams > 1:
        spread_heads(world.flow, mesh["heads"])


@contextmanager
def spread_by_torchrun(world: WorldModel, guided: bool) -> Iterator[bool]:
    """`spread` over the processes that torchrun started; yields whether this is the one that shows and writes."""
    with Ranks.joined() as ranks:
        if world.device.type != ranks.device.type:
            raise ConfigError(
                f"the world is on {world.device.type} and torchrun's processes use {ranks.device.type}; leave --device out"
            )
        spread(world, ranks, guided)
        yield ranks.first
        ranks.wait()
