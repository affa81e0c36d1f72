"""Configurations are strict, writes are atomic, and broken files are one-line errors."""

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from worldmodel.errors import CheckpointError, ConfigError
from worldmodel.files import (
    config_from_dict,
    config_to_dict,
    load_metadata,
    load_tensors,
    read_json,
    remove_leftovers,
    save_tensors,
    writable,
    write_atomic,
    write_json,
    write_text,
)


@dataclass(frozen=True)
class Inner:
    name: str
    share: float = 1.0


@dataclass(frozen=True)
class Outer:
    steps: int
    inner: Inner = Inner("a")
    many: tuple[Inner, ...] = ()
    size: tuple[int, int] = (1, 2)
    minutes: float | None = None


def test_a_config_survives_the_round_trip() -> None:
    config = Outer(3, Inner("b", 2), (Inner("c"),), (4, 5), 1.5)
    assert config_from_dict(Outer, config_to_dict(config), "here") == config


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"stps": 1, "x": 2}, ["stps", "x", "missing keys: steps"]),
        ({"steps": 1, "inner": {"nam": "q"}}, ["here: inner", "nam", "missing keys: name"]),
        ({"steps": "many"}, ["here: steps", "expected int"]),
        ({"steps": True}, ["expected int"]),
        ({"steps": 1, "size": [1, 2, 3]}, ["expected 2 values"]),
        ({"steps": 1, "minutes": "soon"}, ["here: minutes"]),
        ([1], ["expected an object"]),
    ],
)
def test_a_wrong_config_says_what_is_wrong(mapping: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict(Outer, mapping, "here")
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


def test_the_old_file_survives_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_tensors(path, {"a": torch.arange(3)})

    def full(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left"):
        write_atomic(path, full)
    assert load_tensors(path)["a"].tolist() == [0, 1, 2]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_files_have_the_mode_that_the_umask_says(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        save_tensors(tmp_path / "t", {"a": torch.zeros(1)})
    finally:
        os.umask(before)
    assert (tmp_path / "t").stat().st_mode & 0o777 == mode


def test_what_killed_writes_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    (tmp_path / "flow").mkdir()
    left = [tmp_path / "flow" / name for name in (".codec.json.0123abcd.tmp", ".tmpAb3dE9")]
    others = [tmp_path / name for name in (".codec.json.89abcdef.tmp", ".tmpnotes.txt", "tmpAb3dE9")]
    for path in left + others:
        path.touch()
    for path in left + others[1:]:
        os.utime(path, (0, 0))
    remove_leftovers(tmp_path)
    assert not any(path.exists() for path in left) and all(path.exists() for path in others)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    writable(tmp_path / "new" / "folder")
    writable(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write into .* choose another place"):
        writable(tmp_path / "file" / "folder")


def test_text_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    write_text(tmp_path / "README.md", "größer → besser")
    assert (tmp_path / "README.md").read_bytes() == "größer → besser".encode()


def test_tensors_and_metadata_survive_the_round_trip(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(2, 3).half(),
        "view": torch.arange(6).reshape(2, 3).T,
        "flag": torch.tensor([True]),
    }
    save_tensors(tmp_path / "t", tensors, {"step": "4"})
    loaded = load_tensors(tmp_path / "t")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert loaded["half"].dtype == torch.float16
    assert load_metadata(tmp_path / "t") == {"step": "4"}


@pytest.mark.parametrize("keep", [0, 4, 30, 60])
def test_truncated_tensors_are_one_line(tmp_path: Path, keep: int) -> None:
    save_tensors(tmp_path / "t", {"a": torch.zeros(100)})
    (tmp_path / "t").write_bytes((tmp_path / "t").read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="truncated or corrupt") as caught:
        load_tensors(tmp_path / "t")
    assert "\n" not in str(caught.value)


def test_json_is_strict(tmp_path: Path) -> None:
    write_json(tmp_path / "j.json", {"a": [1, 2.5]})
    assert read_json(tmp_path / "j.json") == {"a": [1, 2.5]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "j.json", {"a": float("nan")})
    (tmp_path / "j.json").write_text("{")
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        read_json(tmp_path / "j.json")
    with pytest.raises(CheckpointError, match="does not exist"):
        read_json(tmp_path / "none.json")
