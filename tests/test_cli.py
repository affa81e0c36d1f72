"""The command line as a user meets it: one-line errors, exit statuses, Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "worldmodel", *arguments]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("info", "nope"), 1, "shipped worlds"),
        (("rollout", "--context", "sideways", "--chunks", "1"), 1, "rolling"),
        (("train", "pendulum", "--data", "nowhere"), 1, "dataset"),
        (("evaluate", "--bogus"), 2, "--bogus"),
        (("evaluate", "nope"), 1, "shipped worlds"),
        (("evaluate", "agents", "nope"), 1, "shipped worlds"),
        (
            ("evaluate", "agents", "--only", "flying,planning", "--only", "hovering"),
            1,
            "no section flying, hovering; choose from planning",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(arguments: tuple[str, ...], status: int, words: str) -> None:
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300)
    assert done.returncode == status
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_ctrl_c_says_so_and_leaves_whole_files(tmp_path: Path) -> None:
    arguments = ("collect", "Pendulum-v1", "--episodes", "400", "--hide", "last_u", "--out", str(tmp_path))
    process = subprocess.Popen(
        command(*arguments),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("episodes/*.npz")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "worldmodel: stopped; run the same command to continue"
    assert not list(tmp_path.glob("episodes/.*"))
