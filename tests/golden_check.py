"""Reproduce golden vectors: ``python tests/golden_check.py DIR`` prints each one's largest difference.

DIR holds ``NAME.json`` (constructor arguments), ``NAME.weights.safetensors`` (published key names) and
``NAME.vectors.safetensors``. Exits 1 where a difference exceeds 1e-4 or is not a number, 2 where DIR holds
nothing to check.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor

from worldmodel.flow.affine import Affine, guide
from worldmodel.flow.flow import Flow
from worldmodel.flow.order import patchify
from worldmodel.flow.published import config_from_published, load_published

TOLERANCE = 1e-4
SAMPLE = re.compile(
    r"sample\.(sequential|jacobi|i2v|long)(?:\.window(\d+)\.context(\d+))?(?:\.cfg(\d+(?:\.\d+)?))?"
)
"""Sampler vectors say in their name what was asked: the method, the window, the guidance."""


def load_flow(directory: Path, name: str) -> tuple[Flow, dict]:
    """The flow with the golden weights, and the JSON description."""
    spec = json.loads((directory / f"{name}.json").read_text())
    config = config_from_published(spec["arguments"], noise_std=spec["noise_std"])
    flow = Flow(config).eval()
    weights = load_file(directory / f"{name}.weights.safetensors")
    load_published(flow, {key: value.float() for key, value in weights.items()})
    return flow, spec


@torch.no_grad()
def blocks(
    flow: Flow, x: Tensor, grid: tuple[int, int], text: Tensor
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Each block's name, output (B, T, N, D) in raster order, and log-determinant in its own order."""
    v = flow.tokens(x)
    frames = v.shape[1]
    for index, block in enumerate(flow.shallow):
        own = block.to_own(rearrange(v, "b t n d -> (b t) n d"))
        affine = block.frame_parameters(own, grid)
        v = rearrange(block.to_raster(affine.forward(own)), "(b t) n d -> b t n d", t=frames)
        yield f"forward.block{index}", v, rearrange(affine.log_det(), "(b t) n d -> b t n d", t=frames)
    affine = flow.deep.clip_parameters(v, grid, text, None)
    log_det = rearrange(flow.deep.to_own(affine.log_det()), "b t n d -> b (t n) d")
    yield f"forward.block{len(flow.shallow)}", affine.forward(v), log_det


@torch.no_grad()
def computed(flow: Flow, spec: dict, given: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every vector that the directory may hold, computed by this project."""
    x, text, uncond = given["x"], given["cond"], given["uncond"]
    grid = flow.grid((spec["height"], spec["width"]))
    for name, output, log_det in blocks(flow, x, grid, text):
        yield f"{name}.output", rearrange(output, "b t (h w) d -> b t h w d", h=grid[0])
        yield f"{name}.logdet", log_det
    yield "forward.z", flow.latents(flow(flow.tokens(x), grid, text).z, grid)

    noise = patchify(given["noise"], flow.config.patch_size)
    for key in given:
        match = SAMPLE.fullmatch(key)
        if match is None:
            continue
        kind, window, context, guidance = match.groups()
        tokens = flow.sample(
            noise,
            grid,
            text=text,
            uncond_text=uncond,
            guidance=float(guidance or 0),
            given=flow.tokens(x[:, :1]) if kind == "i2v" else None,
            window=int(window) if window else None,
            context=int(context) if context else None,
            exact=kind == "sequential",
        )
        yield key, flow.latents(tokens, grid)

    score = flow.denoiser.score(flow.tokens(x), grid, text, None)
    yield "denoiser.output", flow.latents(score, grid)
    yield f"denoised.sigma{spec['noise_std']}", flow.latents(flow.denoise(flow.tokens(x), grid, text), grid)
    cond = Affine(given["cfg.mu_cond"], given["cfg.sigma_cond"])
    mu, sigma = guide(cond, Affine(given["cfg.mu_uncond"], given["cfg.sigma_uncond"]), spec["guidance"])
    yield "cfg.mu", mu
    yield "cfg.sigma", sigma


INPUTS = {
    "x",
    "cond",
    "uncond",
    "noise",
    "cfg.mu_cond",
    "cfg.sigma_cond",
    "cfg.mu_uncond",
    "cfg.sigma_uncond",
}


def differences(directory: Path, name: str) -> dict[str, float]:
    """Largest absolute difference of every vector of one golden model; ``inf`` where there is none."""
    flow, spec = load_flow(directory, name)
    vectors = load_file(directory / f"{name}.vectors.safetensors")
    result = {key: math.inf for key in vectors if key not in INPUTS}
    for key, value in computed(flow, spec, vectors):
        if key in vectors:
            same = value.shape == vectors[key].shape
            difference = (value - vectors[key]).abs().max().item() if same else math.inf
            result[key] = math.inf if math.isnan(difference) else difference
    return result


def main(arguments: list[str]) -> int:
    """Command line; returns the exit status."""
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print("usage: python tests/golden_check.py DIR (a directory of golden vectors)", file=sys.stderr)
        return 2
    directory = Path(arguments[0])
    names = sorted(p.stem for p in directory.glob("*.json"))
    if not names:
        print(f"{directory}: no NAME.json found, expected golden vectors", file=sys.stderr)
        return 2
    found = [(name, key, value) for name in names for key, value in differences(directory, name).items()]
    if not found:
        print(f"{directory}: the files hold inputs only, expected golden vectors", file=sys.stderr)
        return 2
    for name, key, difference in found:
        mark = "" if difference <= TOLERANCE else "  <-- FAIL"
        print(f"{name:20s} {key:32s} {difference:.3e}{mark}")
    worst = max(difference for _, _, difference in found)
    print(f"largest difference {worst:.3e}, tolerance {TOLERANCE:.0e}")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
