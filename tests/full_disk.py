"""Disks that are really full: a tmpfs of a few kilobytes where one may be mounted, else a limit on file
size.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]


@contextmanager
def tiny_disk(mount_point: Path, kilobytes: int) -> Iterator[Path | None]:
    """A file system of this size while the block runs, or None where mounting is not allowed."""
    mount_point.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(mount_point)]
    try:
        mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    try:
        yield mount_point if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(mount_point)], check=True)  # tensors may map its files


def python(code: str, *arguments: object, file_size: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a new interpreter, in which files may not grow beyond ``file_size`` bytes."""
    limit = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({file_size}, {file_size}))\n"
        if file_size is not None
        else ""
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", limit + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
