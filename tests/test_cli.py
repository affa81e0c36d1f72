"""The command line as a user meets it: one-line errors, exit statuses, Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from gymnasium import spaces

from tests.toy import BOX, write_toy
from worldmodel.cli import main
from worldmodel.training.loop import Interrupted
from worldmodel.world import WorldModel


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


def run_here(
    arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """The status and the last line of a command that runs in this process."""
    monkeypatch.setattr(sys, "argv", ["worldmodel", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert isinstance(left.value.code, int)
    return left.value.code, capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("rollout", "--hold", "0"), 2, "--hold"),
        (("rollout", "--scale", "-1"), 2, "--scale"),
        (("rollout", "--seed", "-1"), 2, "--seed"),
        (("rollout", "--chunks", "0"), 2, "--chunks"),
        (("rollout", "--out", "film.avi"), 1, "film.avi: expected a name that ends in one of .webm"),
        (("rollout", "--out", "{file}/film.mp4"), 1, "cannot write into"),
        (("play", "--zoom", "0"), 1, "zoom is 0, expected 0.1 to 100"),
        (("play", "--zoom", "nan"), 1, "zoom is nan"),
        (("generate", "pendulum", "--device", "cuda"), 1, "torch finds 0 GPUs here; give cpu"),
        (("rollout", "--device", "gpu"), 1, "expected cpu, cuda or cuda:N"),
        (("serve", "--ray", "--device", "cuda"), 1, "leave --device out"),
        (("evaluate", "--horizon", "0"), 1, "horizon is 0, expected at least 1"),
        (("evaluate", "--out", "{file}/report"), 1, "cannot write into"),
        (("collect", "CartPole-v1", "--policy", "random=nan"), 1, "each with a finite share above 0"),
        (("collect", "CartPole-v1", "--seed", "-1"), 1, "seed is -1, expected at least 0"),
        (("collect", "CartPole-v1", "--frame-size", "0"), 1, "frame_size is (0, 0), expected at least 1"),
        (("collect", "CartPole-v1", "--frame-skip", "0"), 1, "frame_skip is 0, expected at least 1"),
        (("collect", "CartPole-v1", "--env-kwargs", "{{"), 1, "env-kwargs is {, expected a JSON object such"),
        (("collect", "CartPole-v1", "--env-kwargs", '{{"g": NaN}}'), 1, "expected a JSON object"),
        (("collect", "CartPole-v1", "--env-kwargs", "[1]"), 1, "env-kwargs is [1], expected a JSON object"),
        (("collect", "CartPole-v1", "--env-kwargs", '{{"g": 1}}'), 1, "unexpected keyword argument 'g'"),
        (("train", "my/Arm-v0"), 1, "worldmodel collect my/Arm-v0, then: worldmodel train data/my-Arm-v0"),
        (("finetune", "pendulum", "--data", "x", "--out", "y", "--lora", "-3"), 1, "lora is -3, expected at"),
        (("finetune", "pendulum", "--data", "x", "--out", "y", "--lr", "nan"), 1, "lr finite"),
        (("finetune", "pendulum", "--data", "x", "--out", "y", "--seed", "-1"), 1, "seed is -1"),
        (("finetune", "pendulum", "--data", "x", "--out", "{file}/y"), 1, "cannot write into"),
        (
            ("watch", "tcp://127.0.0.1:9"),
            1,
            'or do without: render_mode "rgb_array", or worldmodel watch --out',
        ),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(
    arguments: tuple[str, ...],
    status: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("envs.window.windows_available", lambda: False)
    monkeypatch.setattr("worldmodel.training.evaluate.held_out_dataset", None)
    given = [a.format(file=tmp_path / "file") for a in arguments]
    got, line = run_here(given, monkeypatch, capsys)
    assert got == status and words in line


def test_play_says_that_there_is_no_display_or_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pygame = pytest.importorskip("pygame")
    monkeypatch.delenv("SDL_VIDEODRIVER", raising=False)
    monkeypatch.setattr(pygame.display, "init", lambda: None)
    monkeypatch.setattr(pygame.display, "get_driver", lambda: "offscreen")
    status, line = run_here(["play"], monkeypatch, capsys)
    assert status == 1 and "no display was found" in line
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    world = write_toy(tmp_path / "toy", spaces.Dict({"a": BOX}))
    status, line = run_here(["play", str(world)], monkeypatch, capsys)
    assert status == 1 and "plays Discrete actions and a bounded Box of one number, not Dict('a'" in line


def test_a_rollout_that_is_stopped_writes_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step, calls = WorldModel.step, []

    def stopped(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(WorldModel, "step", stopped)
    status, line = run_here(["rollout", "--out", str(tmp_path / "film.mp4")], monkeypatch, capsys)
    assert (status, line) == (130, "worldmodel: stopped; 2 of 50 chunks were ready")
    assert (tmp_path / "film.mp4").stat().st_size


@pytest.mark.parametrize(
    ("arguments", "stop", "told"),
    [
        (["info", "pendulum"], KeyboardInterrupt(), "stopped"),
        (["evaluate", "pendulum"], KeyboardInterrupt(), "stopped; run the same command to continue"),
        (["info", "pendulum"], Interrupted("flow: stopped at step 3"), "flow: stopped at step 3"),
    ],
)
def test_what_is_stopped_ends_with_130_and_says_whether_it_goes_on(
    arguments: list[str],
    stop: BaseException,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stopped(*given: Any) -> Any:
        raise stop

    monkeypatch.setattr("worldmodel.published.obtain", stopped)
    monkeypatch.setattr("worldmodel.world.WorldModel.load", stopped)
    assert run_here(arguments, monkeypatch, capsys) == (130, f"worldmodel: {told}")


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
