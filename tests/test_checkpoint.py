"""A world on disk: what is written is what is loaded, and whatever is wrong with it is one clear error."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.full_disk import python, tiny_disk
from tests.sessions import actions, same_chunk, walk
from tests.toy import write_toy
from worldmodel.checkpoint import read_spec, read_world, write_world
from worldmodel.errors import CheckpointError, ConfigError, WorldModelError
from worldmodel.files import config_from_dict, config_to_dict, write_atomic
from worldmodel.world import WorldModel

PARTS = ("flow.safetensors", "codec.safetensors", "heads.safetensors", "starts.npz", "world.json")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy") / "world")


@pytest.fixture
def directory(original: Path, tmp_path: Path) -> Path:
    """A copy to spoil, without digests: the contents are checked for themselves."""
    copy = Path(shutil.copytree(original, tmp_path / "world"))
    edit(copy, lambda data: data["sha256"].clear())
    return copy


def refused(directory: Path, *words: str, kind: type[Exception] = WorldModelError) -> str:
    """Loading fails with one line of the package's own class that says what and where."""
    with pytest.raises(kind) as error:
        WorldModel.load(directory)
    message = str(error.value)
    assert isinstance(error.value, WorldModelError)
    assert "\n" not in message and len(message) < 1500
    for word in words:
        assert word in message
    return message


def edit(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = directory / "world.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


# ---- what is written is what is loaded ---------------------------------------------------------------------
def test_round_trip(original: Path, tmp_path: Path) -> None:
    first = read_world(original)
    write_world(tmp_path / "again", first.spec, first.tensors, first.starts, "# card\n")
    second = read_world(tmp_path / "again")
    assert second.spec == first.spec and second.fingerprint == first.fingerprint
    assert (tmp_path / "again" / "README.md").read_text() == "# card\n"
    a = actions(2, 3)
    one, two = WorldModel.load(original), WorldModel.load(tmp_path / "again")
    _, mine, _ = walk(one, one.initial_state([1, 2]), a)
    _, theirs, _ = walk(two, two.initial_state([1, 2]), a)
    assert all(same_chunk(x, y) for x, y in zip(mine, theirs, strict=True))
    assert not list((tmp_path / "again").glob(".*"))  # no temporary files left behind


def test_the_specification_survives_json(original: Path) -> None:
    spec = read_spec(original)
    again = config_from_dict(type(spec), json.loads(json.dumps(config_to_dict(spec))), "here")
    assert again == spec and again.action_space == spec.action_space


def test_weights_are_stored_as_float16_and_computed_as_float32(original: Path) -> None:
    stored = load_file(original / "flow.safetensors")
    assert {v.dtype for v in stored.values()} == {torch.float16}
    world = WorldModel.load(original)
    assert {p.dtype for p in world.flow.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in world.flow.parameters()) and not world.flow.training
    assert torch.equal(world.flow.deep.sos, stored["flow.deep.sos"].float())


def test_the_fingerprint_is_of_the_weights(original: Path, directory: Path) -> None:
    file = directory / "heads.safetensors"
    tensors = {k: v.clone() for k, v in load_file(file).items()}
    tensors["layers.0.bias"][0] += 1
    save_file(tensors, file)
    assert read_world(directory).fingerprint != read_world(original).fingerprint


def test_nothing_is_unpickled(directory: Path) -> None:
    """A starts file that hides an object is refused, not executed."""
    frames = np.load(directory / "starts.npz")["frames"]
    with (directory / "starts.npz").open("wb") as file:
        np.savez(file, frames=frames, actions=np.array([{"a": 1}, None], dtype=object))
    refused(directory, "starts.npz", kind=CheckpointError)


# ---- where there is no world -------------------------------------------------------------------------------
def test_no_such_world(tmp_path: Path) -> None:
    refused(
        tmp_path / "absent", "absent", "no such directory", "give a world directory", kind=CheckpointError
    )
    refused(tmp_path, "no world.json in it", kind=CheckpointError)
    with pytest.raises(CheckpointError):
        WorldModel.load("not-a-world-that-ships")


# ---- missing, truncated, corrupt ---------------------------------------------------------------------------
@pytest.mark.parametrize("part", PARTS)
def test_each_file_missing(directory: Path, part: str) -> None:
    (directory / part).unlink()
    refused(directory, part, kind=CheckpointError)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("keep", [0, 1, 9, 0.5, -1])
def test_each_file_truncated(directory: Path, part: str, keep: float) -> None:
    content = (directory / part).read_bytes()
    end = int(len(content) * keep) if isinstance(keep, float) else keep
    if part == "world.json" and keep == -1:
        end = -2  # the last byte is only a line break
    (directory / part).write_bytes(content[:end])
    refused(directory, part, kind=CheckpointError)


@pytest.mark.parametrize("part", PARTS)
def test_each_file_replaced_by_rubbish(directory: Path, part: str) -> None:
    size = (directory / part).stat().st_size
    for rubbish in (
        b"\x00" * size,
        b"\xff" * size,
        b"<html>404</html>",
        np.random.default_rng(0).bytes(size),
    ):
        (directory / part).write_bytes(rubbish)
        refused(directory, part, kind=CheckpointError)


@pytest.mark.parametrize("part", PARTS)
def test_a_flipped_bit_or_another_worlds_file_is_refused(original: Path, tmp_path: Path, part: str) -> None:
    """Among the numbers nothing but the digest can tell: it would be loaded as other weights, or other clips."""
    if part == "world.json":
        WorldModel.load(original)  # the digests of what was written are those that it lists
        assert set(read_spec(original).sha256) == set(PARTS) - {part}
        return
    directory = Path(shutil.copytree(original, tmp_path / "world"))
    content = bytearray((directory / part).read_bytes())
    content[-40] ^= 1
    (directory / part).write_bytes(content)
    refused(directory, part, "SHA-256", "copy the world directory again", kind=CheckpointError)


@pytest.mark.parametrize("part", PARTS)
def test_each_file_a_directory(directory: Path, part: str) -> None:
    (directory / part).unlink()
    (directory / part).mkdir()
    refused(directory, part if part != "world.json" else "world", kind=CheckpointError)


def test_damaged_archives(directory: Path) -> None:
    """Bytes changed anywhere in the compressed clips: an error of ours, or no effect at all."""
    file, rng = directory / "starts.npz", np.random.default_rng(1)
    whole = file.read_bytes()
    expected = read_world(directory).starts
    for _ in range(100):
        damaged = bytearray(whole)
        for at in rng.integers(0, len(whole), 8):
            damaged[at] ^= int(rng.integers(1, 256))
        file.write_bytes(damaged)
        try:
            starts = read_world(directory).starts
        except WorldModelError as error:
            assert "\n" not in str(error) and "starts.npz" in str(error)
        else:
            assert all(np.array_equal(starts[k], expected[k]) for k in expected)


@pytest.mark.parametrize("part", ["flow.safetensors", "codec.safetensors", "heads.safetensors"])
def test_damaged_headers(directory: Path, part: str) -> None:
    """Bytes changed in the table of contents: an error of ours, or the same names and shapes."""
    file, rng = directory / part, np.random.default_rng(2)
    whole = file.read_bytes()
    for _ in range(30):
        damaged = bytearray(whole)
        damaged[int(rng.integers(0, 400))] ^= int(rng.integers(1, 256))
        file.write_bytes(damaged)
        try:
            WorldModel.load(directory)
        except WorldModelError as error:
            assert "\n" not in str(error) and part in str(error)


# ---- keys and shapes ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("part", ["flow", "codec", "heads"])
def test_missing_unexpected_and_misshaped_weights_are_listed(directory: Path, part: str) -> None:
    file = directory / f"{part}.safetensors"
    tensors = {k: v.clone() for k, v in load_file(file).items()}
    first, second, third = sorted(tensors)[:3]
    save_file({k: v for k, v in tensors.items() if k not in (first, second)}, file)
    refused(directory, f"{part}.safetensors", f"missing: {first}, {second}", kind=CheckpointError)
    save_file({**tensors, "stray.weight": torch.ones(1)}, file)
    refused(directory, "unexpected: stray.weight", kind=CheckpointError)
    save_file({**tensors, third: torch.ones(7, 7)}, file)
    refused(directory, f"wrong shape: {third} (7, 7)", kind=CheckpointError)
    del tensors[first]
    save_file({**tensors, "stray.weight": torch.ones(1), third: torch.ones(7, 7)}, file)
    refused(directory, first, "stray.weight", third, kind=CheckpointError)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(speed=3), ("unknown keys: speed", "known:", "world.json")),
        (lambda d: d["flow"].update(chanels=3, layer=1), ("unknown keys: chanels, layer", "flow")),
        (lambda d: d["codec"].update(x=1), ("unknown keys: x", "codec")),
        (lambda d: d["sampling"].update(x=1), ("unknown keys: x", "sampling")),
        (lambda d: d.pop("fps"), ("missing keys: fps",)),
        (lambda d: d["flow"].pop("channels"), ("missing keys: channels", "flow")),
        (lambda d: d["heads"].clear(), ("missing keys: latent_size, packed",)),
        (lambda d: d.update(fps="fast"), ("fps", "fast")),
        (lambda d: d.update(frame_size=[32]), ("frame_size", "2")),
        (lambda d: d["flow"].update(channels="32"), ("channels", "'32'")),
        (lambda d: d["flow"].update(channels=32.5), ("channels", "32.5")),
        (lambda d: d["flow"].update(head_dim=7), ("head_dim is 7",)),
        (lambda d: d["flow"].update(layers_per_block=[]), ("layers_per_block",)),
        (lambda d: d["codec"].update(widths=[8]), ("codec",)),
        (lambda d: d["sampling"].update(context="forget"), ("context", "forget")),
        (lambda d: d["sampling"].update(tolerance=-1.0), ("tolerance",)),
        (lambda d: d.update(flow=3), ("flow",)),
        (lambda d: d.update(flow=None), ("flow",)),
        (lambda d: d.update(format=99), ("format 99, expected 1",)),
        (lambda d: d.pop("format"), ("format None",)),
        (lambda d: d.update(action_space_json={"kind": "Tuple"}), ("Tuple",)),
        (
            lambda d: d.update(action_space_json={"kind": "Discrete", "n": 9}),
            ("actions.packed is 1, expected 9",),
        ),
        (lambda d: d.update(action_space_json=[]), ("action_space_json",)),
    ],
)
def test_world_json_is_strict(directory: Path, change: Callable[[Any], Any], words: tuple[str, ...]) -> None:
    edit(directory, change)
    refused(directory, *words)


@pytest.mark.parametrize("content", ["[]", "3", '"world"', "null", "true"])
def test_world_json_is_an_object(directory: Path, content: str) -> None:
    (directory / "world.json").write_text(content)
    refused(directory, "world.json", kind=ConfigError)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("flow", {"channels": 64}),
        ("flow", {"layers_per_block": [1, 1, 3]}),
        ("flow", {"in_channels": 4}),
        ("codec", {"widths": [8, 16, 24]}),
        ("heads", {"width": 8}),
        ("heads", {"latent_size": 13}),
        ("actions", {"features": 9}),
    ],
)
def test_weights_that_do_not_fit_world_json(directory: Path, section: str, values: dict[str, Any]) -> None:
    edit(directory, lambda d: d[section].update(values))
    refused(directory, kind=WorldModelError)


@pytest.mark.parametrize("value", [-1, 0])
@pytest.mark.parametrize(
    ("section", "name"),
    [
        ("codec", "width"),
        ("flow", "in_channels"),
        ("flow", "channels"),
        ("flow", "top_channels"),
        ("flow", "head_dim"),
        ("flow", "patch_size"),
        ("flow", "window"),
        ("flow", "context"),
        ("flow", "denoiser_layers"),
        ("flow", "denoiser_look_ahead"),
        ("flow", "noise_std"),
        ("codec", "height"),
        ("codec", "frames"),
        ("codec", "patch"),
        ("codec", "latent_channels"),
        ("heads", "width"),
        ("heads", "latent_size"),
        ("actions", "features"),
    ],
)
def test_sizes_that_no_model_has(directory: Path, section: str, name: str, value: int) -> None:
    if name == "denoiser_layers":
        value -= 1  # none is possible
    edit(directory, lambda d: d[section].update({name: value}))
    refused(directory, f"{name} is {value}", kind=ConfigError)


@pytest.mark.parametrize(
    "starts",
    [
        {"frames": np.zeros((2, 1, 4, 32, 32, 3), np.float32)},
        {"frames": np.zeros((2, 1, 4, 16, 16, 3), np.uint8)},
        {"frames": np.zeros((2, 1, 3, 32, 32, 3), np.uint8)},
        {"frames": np.zeros((0, 1, 4, 32, 32, 3), np.uint8)},
        {"frames": np.zeros((2, 0, 4, 32, 32, 3), np.uint8)},
        {"frames": np.zeros((4, 32, 32, 3), np.uint8)},
        {"frames": None},
        {"actions": None},
        {"actions": np.zeros((3, 2, 1), np.float32)},
        {"actions": np.zeros((5, 1, 1), np.float32)},
        {"actions": np.full((5, 2, 1), np.nan, np.float32)},
        {"actions": np.full((5, 2, 1), 9.0, np.float32)},
        {"actions": np.zeros((5, 2, 3), np.float32)},
    ],
)
def test_starts_that_cannot_be_started_from(directory: Path, starts: dict[str, Any]) -> None:
    with np.load(directory / "starts.npz") as archive:
        values = {**dict(archive), **starts}
    with (directory / "starts.npz").open("wb") as file:
        np.savez(file, **{k: v for k, v in values.items() if v is not None})
    refused(directory, "starts.npz", kind=CheckpointError)


# ---- a full disk -------------------------------------------------------------------------------------------
WRITE = """
import sys
from pathlib import Path
from tests.toy import write_toy
from worldmodel.errors import WorldModelError
try:
    write_toy(Path(sys.argv[1]), seed=3)
except WorldModelError as error:
    print(type(error).__name__, error)
"""


def files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def test_a_world_survives_where_files_may_not_grow(directory: Path) -> None:
    before = files(directory)
    done = python(WRITE, directory, file_size=4000)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("CheckpointError cannot write") and done.stdout.count("\n") == 1
    assert files(directory) == before
    WorldModel.load(directory)


def test_a_world_survives_a_full_disk(original: Path, tmp_path: Path) -> None:
    size = sum(p.stat().st_size for p in original.iterdir()) // 1024
    with tiny_disk(tmp_path / "disk", size + 60) as disk:
        if disk is None:
            pytest.skip("mounting a small file system is not allowed here; the limit on file size is tested")
        world = Path(shutil.copytree(original, disk / "world"))
        before = files(world)
        with pytest.raises(CheckpointError, match="cannot write .* is unchanged") as error:
            write_toy(world, seed=3)
        assert "\n" not in str(error.value)
        assert files(world) == before
        WorldModel.load(world)


def test_a_half_written_file_is_taken_away(tmp_path: Path) -> None:
    file = tmp_path / "notes"
    write_atomic(file, lambda path: path.write_text("old"))

    def half(path: Path) -> None:
        path.write_text("ha")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match="cannot write .* is unchanged"):
        write_atomic(file, half)
    assert files(tmp_path) == {"notes": b"old"}


def test_a_file_is_replaced_at_once(tmp_path: Path) -> None:
    """Whoever has the old file open goes on reading the old file."""
    file = tmp_path / "notes"
    write_atomic(file, lambda path: path.write_text("old"))
    with file.open() as reader:
        write_atomic(file, lambda path: path.write_text("new"))
        assert reader.read() == "old"
    assert file.read_text() == "new"
