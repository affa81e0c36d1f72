"""Training on many processes with PyTorch's own engine: FSDP2, activation checkpointing, distributed checkpoints.

``torchrun --nproc-per-node N -m -- worldmodel train ...`` starts N ranks. Every rank draws the same global batch and takes
its own rows, so a run's batches do not depend on N. Checkpoints are written by `torch.distributed.checkpoint` as
safetensors shards (its pickled metadata is not used) and load on any number of ranks.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed._composable import checkpoint as recompute_module
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from worldmodel.errors import CheckpointError, ConfigError
from worldmodel.files import read_json, write_json
from worldmodel.flow.attention import Attention
from worldmodel.flow.block import MLP
from worldmodel.flow.denoiser import Denoiser

PATIENCE = timedelta(hours=12)  # one rank may encode a dataset while the others wait


@dataclass(frozen=True)
class Ranks:
    """The processes of a run and this one's place among them. ``device`` is where this process trains."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @classmethod
    @contextmanager
    def joined(cls) -> Iterator[Ranks]:
        """This process alone, or, where torchrun started it, one of its ranks; on a GPU each where there are GPUs."""
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        gpu = torch.cuda.is_available()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
        if gpu:
            torch.cuda.set_device(device)
        if size == 1:
            yield cls(device=device)
            return
        dist.init_process_group("nccl" if gpu else "gloo", timeout=PATIENCE)
        try:
            yield cls(rank, size, device)
            dist.barrier()  # nobody leaves while another still needs the group
        finally:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and shows progress."""
        return self.rank == 0

    def wait(self) -> None:
        """Return when all ranks are here."""
        if self.size > 1:
            dist.barrier()

    def agree(self, *values: float) -> list[float]:
        """The largest over the ranks of each value."""
        if self.size == 1:
            return list(values)
        together = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(together, dist.ReduceOp.MAX)
        return together.tolist()

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the ranks of a detached tensor."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total / self.size

    def rows(self, batch: int) -> slice:
        """This rank's rows of a batch.

        Raises:
            ConfigError: the batch does not divide by the number of ranks.
        """
        if batch % self.size:
            raise ConfigError(
                f"a batch of {batch} does not divide by {self.size} processes; choose a multiple"
            )
        each = batch // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def shard(self, parts: nn.ModuleDict, recompute: bool = False) -> None:
        """Move ``parts`` to the device and, with several ranks, shard them there (FSDP2), in place.

        The units are the attentions and the MLPs, then the denoiser, then each part. ``recompute`` keeps the units'
        inputs alone and computes their activations again in the backward pass.
        """
        parts.to(self.device)
        units = [m for m in parts.modules() if isinstance(m, Attention | MLP)]
        for unit in units if recompute else ():
            recompute_module(unit)
        if self.size == 1:
            return
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # nothing is changed in place
        mesh = init_device_mesh(self.device.type, (self.size,))
        for unit in units:
            fully_shard(unit, mesh=mesh)
        for module in list(parts.modules()):
            if isinstance(module, Denoiser):
                fully_shard(module, mesh=mesh)
                register_fsdp_forward_method(module, "score")
        for part in parts.values():
            fully_shard(part, mesh=mesh)


ALONE = Ranks()


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a shard; all ranks must ask together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor) -> None:
    """Copy a full ``value`` into a tensor or into the ranks' shards of it."""
    if isinstance(tensor, DTensor):
        value = distribute_tensor(
            value.to(tensor.device, tensor.dtype), tensor.device_mesh, tensor.placements
        )
    tensor.copy_(value)


DAMAGE = (OSError, ValueError, RuntimeError, KeyError, SafetensorError, dcp.CheckpointException)
"""What the readers raise for files that are damaged or of another model."""


# ---- checkpoints ------------------------------------------------------------------------------------------------------
def shard_folders(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the complete distributed checkpoints in a run's folder, oldest first."""
    found = (p.parent for p in Path(folder).glob("checkpoint-*/run.json"))
    return sorted((int(p.name.removeprefix("checkpoint-")), p) for p in found)


def save_shards(folder: Path, tensors: Mapping[str, Tensor], header: dict[str, Any], ranks: Ranks) -> None:
    """Write ``checkpoint-STEP``, each rank its shards; it counts once ``run.json`` is there, then older ones go.

    Raises:
        CheckpointError: it cannot be written; an older checkpoint stays.
    """
    target = Path(folder) / f"checkpoint-{header['step']:08d}"
    if ranks.first:
        shutil.rmtree(target, ignore_errors=True)
    ranks.wait()
    try:
        dcp.save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(target), save_distributed=True))
    except (OSError, dcp.CheckpointException) as error:
        raise CheckpointError(
            f"cannot write {target} ({' '.join(str(error).split()):.120}); older checkpoints stay"
        ) from error
    if ranks.first:
        write_json(target / "run.json", header | {"ranks": ranks.size})
        for _, old in shard_folders(folder):
            if old != target:
                (old / "run.json").unlink()
                shutil.rmtree(old, ignore_errors=True)
    ranks.wait()


def names_in(target: Path) -> set[str]:
    """Names of the tensors of a distributed checkpoint. Raises CheckpointError where it is corrupt."""
    try:
        return {
            str(name) for name in HuggingFaceStorageReader(str(target)).read_metadata().state_dict_metadata
        }
    except DAMAGE as error:
        raise _damaged(target, error) from error


def load_shards(target: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Fill ``tensors``, sharded over any number of ranks or not at all, from a distributed checkpoint.

    Raises:
        CheckpointError: corrupt, or of another model.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            reader = HuggingFaceStorageReader(str(target))
            dcp.load(dict(tensors), storage_reader=reader, no_dist=ranks.size == 1)
    except DAMAGE as error:
        raise _damaged(target, error) from error


def _damaged(target: Path, error: BaseException) -> CheckpointError:
    reason = f"{' '.join(str(error).split()):.120}"
    return CheckpointError(
        f"{target} is damaged or of another model ({reason}); delete it, or use another run folder"
    )


def header_of(target: Path) -> dict[str, Any]:
    """The header of a distributed checkpoint. Raises CheckpointError where it is corrupt."""
    return checked_header(read_json(target / "run.json"), target)


def checked_header(header: Any, where: Path) -> dict[str, Any]:
    """The header of the checkpoint ``where``. Raises CheckpointError for anything else."""
    if not isinstance(header, dict) or not {"step", "elapsed", "config"} <= set(header):
        raise CheckpointError(f"{where} holds no header of a training checkpoint; delete it to start again")
    return header
