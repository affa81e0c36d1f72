"""A world on a device that is not the CPU does what it does on the CPU: what can be known of GPUs where there is none.

Run as ``python -m tests.other_device FOLDER`` in a process of its own, since a device is registered for good. It builds
`other_device.cpp` in FOLDER, and says ``ok`` at the end.
"""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import cpp_extension

NAME = "other"


def build(folder: Path) -> Path:
    """The library, compiled with the C++ compiler at hand."""
    library, source = folder / "other_device.so", Path(__file__).with_name("other_device.cpp")
    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    link = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]
    flags = ["-shared", "-fPIC", "-std=c++20", "-O0", abi]
    subprocess.run(["c++", *flags, *include, str(source), "-o", str(library), *link], check=True)
    return library


def register(library: Path) -> torch.device:
    """Make it known to torch."""
    torch.utils.rename_privateuse1_backend(NAME)
    torch.ops.load_library(library)
    module: Any = types.ModuleType(f"torch.{NAME}")
    module.is_available = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    torch._register_device_module(NAME, module)
    return torch.device(NAME, 0)


def it_is_another_device(device: torch.device) -> None:
    try:
        torch.ones(2, device=device) + torch.ones(2)
    except RuntimeError as error:
        assert "same device" in str(error)
    else:
        raise AssertionError("it takes tensors of the CPU beside its own")


def same(a: Any, b: Any) -> None:
    """Chunks or scores of both devices: frames to one level, numbers to rounding."""
    for name in ("log_prob", "bits_per_dim", "action_gain", "reward", "latent", "noise"):
        if hasattr(a, name):
            one, other = (getattr(x, name).cpu().double() for x in (a, b))
            off = (one - other).abs()[~(one.isnan() & other.isnan())]
            assert (off <= (0.05 if name == "reward" else 2e-3) * (1 + one.abs().max())).all(), (
                name,
                off.max(),
            )
    if hasattr(a, "frames"):
        assert ((a.frames.cpu().int() - b.frames.cpu().int()).abs() <= 1).all()


def verbs(name: str, actions: np.ndarray, device: torch.device, folder: Path) -> None:
    """Every verb of a shipped world, the states saved by one device and read by the other included."""
    from worldmodel import WorldModel
    from worldmodel.sampling import Sampling

    here, there = WorldModel.load(name), WorldModel.load(name, device)
    assert there.device == device
    (a, _), (b, _) = here.reset([0, 1]), there.reset([0, 1])
    for sampling in (None, Sampling(guidance=1.0)):
        same(here.step(a, actions, sampling)[1], there.step(b, actions, sampling)[1])
    frames = here.step(a, actions)[1].frames
    same(here.score(a, frames, actions, draws=2), there.score(b, frames, actions, draws=2))
    noise = there.infer_noise(b, frames, actions)
    assert torch.allclose(here.infer_noise(a, frames, actions), noise.cpu(), atol=1e-3)
    same(here.step(a, actions, noise=noise.cpu())[1], there.step(b, actions, noise=noise)[1])
    a, b = here.observe(a, frames, actions)[0], there.observe(b, frames, actions)[0]
    for _ in range(18):  # past a restart of the window
        (a, one), (b, other) = here.step(a, actions), there.step(b, actions)
        same(one, other)
    there.save_state(b, folder / "state.safetensors")
    a, b = here.load_state(folder / "state.safetensors"), there.load_state(folder / "state.safetensors")
    many = np.repeat(actions, 3, axis=0)
    for plan in (False, True):
        options: dict[str, Any] = {"decode": not plan, "action_gain": not plan}
        one, other = (w.step(s.fork(3), many, **options)[1] for w, s in ((here, a), (there, b)))
        same(one, other)


@torch.no_grad()
def halves(device: torch.device) -> None:
    """Frames long enough for Jacobi, with guidance, weights and K/V in bfloat16 and the attention that takes these."""
    from tests.toy import toy_flow

    grid, generator = (4, 4), torch.Generator().manual_seed(0)
    here = toy_flow(text_tokens=3, text_dim=8).to(torch.bfloat16).eval()
    text, features = (torch.randn(1, n, 8, generator=generator) for n in (3, 1))
    noise = torch.randn(4, 1, 16, 3, generator=generator)
    solved: list[list[torch.Tensor]] = [[], []]
    for kept, flow, at in ((solved[0], here, "cpu"), (solved[1], deepcopy(here).to(device), device)):
        told, caused = text.to(at), features.to(at)
        context = flow.deep.start(1, grid, 6, told, told, 8)
        for w in noise.to(at):
            context = flow.deep.reserve(context)
            found = flow.deep.solve(context, w, caused, 2.0, 1e-8)
            assert found.sweeps.max() > 1
            context, _ = flow.deep.commit(context, found.v[:, None], caused, 2.0)
            kept.append(found.v.cpu())
    for one, other in zip(*solved, strict=True):
        assert (one - other).abs().max() < 0.05 * one.abs().max()


def environments(device: torch.device, folder: Path) -> None:
    """Environments, snapshots, planning and the monitor's measures on it."""
    import agents
    import envs
    from agents.anomaly.channels import measure
    from worldmodel import WorldModel

    worlds = WorldModel.load("pendulum"), WorldModel.load("pendulum", device)
    seen: list[list[np.ndarray]] = [[], []]
    for kept, world in zip(seen, worlds, strict=True):
        env = envs.WorldModelEnv("pendulum", device=str(world.device))
        assert env.world.device == world.device
        env.reset(seed=0)
        push = np.array([1.0], np.float32)
        env.step(push)
        env.snapshot().save(folder / "snapshot")
        env.restore(envs.Snapshot.load(folder / "snapshot", world.device))
        kept.append(env.step(push)[0])
        kept.append(env.fork(2)[1].step(push)[0])
        batch = envs.WorldModelVectorEnv("pendulum", num_envs=2, device=str(world.device))
        assert batch.world.device == world.device
        batch.reset(seed=0)
        kept.append(batch.step(np.stack([push, push]))[0])
        state, _ = world.reset([0])
        planner = agents.Planner.preset("fast", candidates=8, iterations=1, horizon=2)
        kept.append(planner.plan(world, state, seed=0).actions)
        kept += measure(world, state, kept[0][None], push[None])[1]
    for one, other in zip(*seen, strict=True):
        allowed = 1 if one.dtype == np.uint8 else 1e-2 * (1 + np.abs(one).max())
        assert np.abs(one.astype(float) - other).max() <= allowed


def training(device: torch.device, folder: Path) -> None:
    """A world whose heads have an eye that remembers is trained, exported and evaluated on it."""
    from tests.training.test_world import small_recipe
    from worldmodel import WorldModel
    from worldmodel.heads import EyeConfig
    from worldmodel.training import precision
    from worldmodel.training.collect import collect
    from worldmodel.training.episodes import EpisodeDataset
    from worldmodel.training.evaluate import evaluate
    from worldmodel.training.export import train_world
    from worldmodel.training.heads import MemoryTraining
    from worldmodel.training.measure import EvaluateConfig
    from worldmodel.training.parallel import Ranks

    precision.bfloat16_pays = lambda kind: False  # it has not all of a GPU's rules for autocast
    recipe = small_recipe()
    memory = MemoryTraining(recipe.heads.loop, batch=2, length=5, copies=1)
    heads = replace(recipe.heads, discount=0.5, eye=EyeConfig(4, 4, 2, 4), observed=0.1, memory=memory)
    recipe = replace(recipe, heads=heads)
    for data, config in recipe.collections(folder / "data").items():
        collect(config, data)
    train_world(recipe, folder / "data", folder / "run", folder / "world", ranks=Ranks(device=device))
    world = WorldModel.load(folder / "world", device)
    settings = EvaluateConfig(horizon=2, clips=2, bootstrap=5, long_horizon=10)
    numbers = evaluate(world, EpisodeDataset.open(folder / "data"), folder / "evaluation", settings)
    assert np.isfinite(numbers["likelihood"]["true"]["nats_per_chunk"]["value"])


def benchmark(device: torch.device) -> None:
    """What `worldmodel bench --device` measures."""
    from benchmarks import long_runs, steps
    from worldmodel import WorldModel

    world = WorldModel.load("pendulum", device)
    assert steps.by_batch(world, [1, 2], 1)[1]["chunks/s"] > 0
    assert steps.by_stage(world, 1, 1, 1.0)
    assert steps.planning(world, [1, 2], 1, 1, False)
    assert steps.against_baseline(world, 2, 1)
    assert long_runs.latency(world, 3)


def commands(device: torch.device, folder: Path) -> None:
    """The command line takes ``--device``."""
    from worldmodel.cli import main

    out = folder / "rollout.mp4"
    sys.argv = ["worldmodel", "rollout", "--chunks", "2", "--device", device.type, "--out", str(out)]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code
    assert out.stat().st_size


def main(folder: Path) -> None:
    """All of it."""
    device = register(build(folder))
    it_is_another_device(device)
    verbs("pendulum", np.array([[1.0], [-2.0]], np.float32), device, folder)
    verbs("lunarlander", np.array([1, 2]), device, folder)
    halves(device)
    benchmark(device)
    rest: tuple[Callable[[torch.device, Path], None], ...] = (environments, training, commands)
    for check in rest:
        check(device, folder)
    print("ok")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
