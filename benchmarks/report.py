"""The sections of ``worldmodel bench``, run one after the other and printed as tables or JSON."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import ablation, dial, long_runs, peers, shapes, steps, training
from benchmarks.measure import Row, matrix_peak, table
from worldmodel import WorldModel, native
from worldmodel.errors import InputError


@dataclass(frozen=True)
class Options:
    """world: name or directory. quick: fewer repeats. only: sections by name, all if empty. threads: of torch."""

    world: str = "pendulum"
    quick: bool = False
    only: tuple[str, ...] = ()
    threads: int = 1
    device: str = "cpu"
    as_json: bool = False


@dataclass(frozen=True)
class Section:
    """A table: its title, a note below it, and what measures its rows."""

    title: str
    note: str
    measure: Callable[[], list[Row]]


def sections(world: WorldModel, options: Options, peak: Row) -> dict[str, Section]:
    """All sections by name, in the order of the report. ``peak`` is read when they are measured."""
    quick = options.quick
    batches = [1, 4, 16, 64] if quick else [1, 2, 4, 8, 16, 32, 64, 128, 256]
    count = 20 if quick else 60

    def best() -> float:
        return float(peak["best float32 gflops"])

    return {
        "batch": Section(
            "steps against batch size",
            "decode and likelihood included",
            lambda: steps.by_batch(world, batches, count),
        ),
        "context": Section("steps against context, batch 1", "", lambda: steps.by_context(world, 1, count)),
        "stages": Section(
            "stages of a step, batch 1",
            "share of peak: of the best float32 matrix product above; decode: by the FLOPs of plain convolutions, of\n"
            "which Winograd's need 2 to 4 times fewer, so its share may be above 1",
            lambda: steps.by_stage(world, 1, count, best()),
        ),
        "stages64": Section(
            "stages of a step, batch 64", "", lambda: steps.by_stage(world, 64, 5 if quick else 15, best())
        ),
        "deep": Section(
            "the deep block against the matrix product, in turns",
            "peak: of the best float32 product. Where the kernels multiply on a matrix unit (AMX), a float32 product\n"
            "of the block is three of bfloat16; the last columns count these, their peak is torch's bfloat16 product",
            lambda: steps.deep_share(world, [1, 64], 5 if quick else 15),
        ),
        "fork": Section("a fork against copies", "", lambda: steps.forks(world, 64, 10)),
        "planning": Section(
            "planning: N branches of one state, 5 chunks deep, without pixels",
            "",
            lambda: steps.planning(
                world, [1, 64] if quick else [1, 4, 16, 64, 256], 5, 3 if quick else 9, False
            ),
        ),
        "planning_frames": Section(
            "planning with pixels", "", lambda: steps.planning(world, [1, 64], 5, 2 if quick else 5, True)
        ),
        "baseline": Section(
            "against the plain sampler of the public code, batch 1, same weights",
            "error: of x~ against the exact token-by-token inverse, relative RMS, both fed the exact past\n"
            "a call a chunk: the public code takes a past and returns frames, so each call first fills the cache (from u,\n"
            "the cheapest way); given a state: as if its cache outlived the call; one clip: what it is made for, no world",
            lambda: steps.against_baseline(world, 10, 3 if quick else 9),
        ),
        "peers": Section(
            "world models that others publish, 64 x 64 pixels, their shapes with random weights",
            "a step: one action; speed alone, of pictures without reward; x ours: by the faster of float32 and bfloat16.\n"
            "DIAMOND's U-Net by diffusers, 3 Euler steps a frame; Dreamer and V3 by TorchRL. Ours: frames and likelihood",
            lambda: peers.against_peers(world, [1, 16], 3 if quick else 9),
        ),
        "environment": Section("end to end", "", lambda: steps.environment(world, count)),
        "ablation": Section(
            "each acceleration switched off",
            "",
            lambda: ablation.ablation(world, [1, 64], 4, 2 if quick else 5),
        ),
        "forked": Section(
            "64 branches over a shared past, without pixels",
            "",
            lambda: ablation.forks_copied(world, 64, 2 if quick else 5),
        ),
        "training": Section(
            "training, the pendulum recipe",
            "forward, backward and the denoiser; 6 FLOP a parameter and token",
            lambda: training.throughput(2 if quick else 5, not quick, best()),
        ),
        "shapes": Section(
            "larger flows, random weights, batch 1",
            "floor: the sweep's FLOPs at the best product of its dtype, before or in turns with it; steps/s: k sweeps and\n"
            "a commit, deep and shallow, and a denoised frame; one stream, no prompt, no guidance, nothing decoded",
            lambda: shapes.by_shape(
                world.device,
                2 if quick else 5,
                {"float32": best(), "bfloat16": float(peak["bfloat16 gflops"])},
            ),
        ),
        "computed": Section(
            "a deep sweep of the 7B model at 480 x 848 with guidance, computed, not run",
            "at 790 TFLOP/s and 4.3 TB/s, measured on an H200. floor: of its FLOPs alone; one by one: each operation at\n"
            "its FLOPs or its bytes, whichever takes longer, as if its products reached that peak and nothing was fused",
            shapes.computed,
        ),
        "tolerance": Section(
            "the solver's tolerance: error against the exact inverse, Jacobi also where frames are short",
            "a row stops when its squared change is below the tolerance, relative to its square: sqrt(tolerance) is the\n"
            "relative RMS change of the last sweep. error: of x~, relative RMS; frames: |difference| in levels of 255",
            lambda: dial.of_world(world, 4, 2 if quick else 8) + dial.of_long_frames(8, 2 if quick else 6),
        ),
        "latency": Section(
            "a run of 500 steps of one session, decode and likelihood included",
            "a step counts where the first of these happened: waiting, collection, restart, encoding",
            lambda: long_runs.latency(world, 500),
        ),
        "memory": Section(
            f"memory of one session of {400 if quick else 10_000} steps"
            + (" (10000 without --quick)" if quick else ""),
            "",
            lambda: long_runs.memory(world, 400 if quick else 10_000),
        ),
    }


def run(options: Options) -> None:
    """Measure and print.

    Raises:
        InputError: an unknown section.
    """
    torch.set_num_threads(options.threads)
    world = WorldModel.load(options.world, options.device)
    peak: Row = {}
    every = sections(world, options, peak)
    if unknown := [name for name in options.only if name not in every]:
        raise InputError(f"no section {unknown[0]!r}; expected one of: {', '.join(every)}")
    peak |= matrix_peak(world.device)
    machine = {
        "world": world.spec.name,
        "device": options.device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "kernels": native.build() or "none",
    }
    result: dict[str, Any] = {"options": asdict(options), "machine": machine, "peak": peak}
    if not options.as_json:
        print(table("machine", [machine | {k: v for k, v in peak.items() if k != "n"}]))
    for name in tqdm([n for n in every if not options.only or n in options.only], desc="sections"):
        section = every[name]
        result[name] = section.measure()
        if not options.as_json:
            tqdm.write(table(f"{name}: {section.title}", result[name], section.note))
    if options.as_json:
        print(json.dumps(result, indent=2))
