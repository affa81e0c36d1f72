"""Builds the native kernels of `worldmodel.native` where there is gcc on x86-64 Linux; all else is in setup.cfg.

They are optional: without it the package installs all the same, and torch computes what they would have.
"""

import platform
import sys

from setuptools import Extension, setup

SOURCES = [f"worldmodel/native/{name}.c" for name in ("flow", "denoiser", "perceptron", "convolution")]
HEADERS = [f"worldmodel/native/{name}.h" for name in ("vector", "linear", "threads", "transformer")]


def kernels(level: str) -> Extension:
    """The kernels for one level of x86-64: v4 has AVX-512, v3 has AVX2."""
    return Extension(
        f"worldmodel.native._{level}",
        SOURCES,
        depends=HEADERS,
        extra_compile_args=["-O3", f"-march=x86-64-{level}", "-ffp-contract=fast", "-fvisibility=default"],
        libraries=["m", "pthread"],
        optional=True,
    )


served = platform.machine() == "x86_64" and sys.platform == "linux"
setup(ext_modules=[kernels("v4"), kernels("v3")] if served else [])
