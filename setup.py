"""Builds the native kernels of `worldmodel.native` where there is gcc on x86-64 Linux; all else is in setup.cfg.

They are optional: without it the package installs all the same, and torch computes what they would have.
"""

import platform
import sys

from setuptools import Extension, setup

SOURCES = [f"worldmodel/native/{name}.c" for name in ("flow", "denoiser", "perceptron", "decoder", "encoder")]
HEADERS = [
    f"worldmodel/native/{name}.h"
    for name in ("vector", "tiles", "linear", "threads", "transformer", "convolution")
]


LEVELS = {
    "_amx": ["-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],  # a matrix unit
    "_v4": ["-march=x86-64-v4"],  # AVX-512
    "_v3": ["-march=x86-64-v3"],  # AVX2
}


def kernels(level: str) -> Extension:
    """The kernels for one level of x86-64."""
    return Extension(
        f"worldmodel.native.{level}",
        SOURCES,
        depends=HEADERS,
        extra_compile_args=["-O3", *LEVELS[level], "-ffp-contract=fast", "-fvisibility=default"],
        libraries=["m", "pthread"],
        optional=True,
    )


served = platform.machine() == "x86_64" and sys.platform == "linux"
setup(ext_modules=[kernels(level) for level in LEVELS] if served else [])
