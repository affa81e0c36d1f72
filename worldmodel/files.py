"""Configurations, tensors and JSON on disk: atomic writes, strict reads, one-line errors, no pickle."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import secrets
import tempfile
import time
import tokenize
import types
import typing
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import safetensors

from worldmodel.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

Config = TypeVar("Config")

DAMAGED_ARRAYS = (OSError, ValueError, KeyError, EOFError, RuntimeError, MemoryError) + (
    zipfile.BadZipFile,
    zlib.error,
    tokenize.TokenError,
    SyntaxError,
)
"""What numpy raises for a damaged file of arrays."""


def config_from_dict(cls: type[Config], mapping: Mapping[str, Any], where: str) -> Config:
    """The dataclass ``cls`` from a mapping.

    Nested dataclasses are built, lists become tuples, and an int is accepted for a float. ``where`` names the
    source in errors (a file name).

    Raises:
        ConfigError: unknown or missing keys, all listed, or a value of the wrong type.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where}: expected an object with keys, got {type(mapping).__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    required = {
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    problems = []
    if unknown := sorted(set(mapping) - set(fields)):
        problems.append(f"unknown keys: {', '.join(unknown)} (known: {', '.join(fields)})")
    if missing := sorted(required - set(mapping)):
        problems.append(f"missing keys: {', '.join(missing)}")
    if problems:
        raise ConfigError(f"{where}: {'; '.join(problems)}")
    hints = typing.get_type_hints(cls)
    return cls(**{name: _convert(hints[name], value, f"{where}: {name}") for name, value in mapping.items()})


def config_to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as a JSON-ready dict (tuples become lists); `config_from_dict` is its inverse."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def different(old: Any, new: Any, where: str = "") -> list[str]:
    """Where two JSON values differ, as "key.key"."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [where]
    prefix = f"{where}." if where else ""
    return [d for k in old | new for d in different(old.get(k), new.get(k), f"{prefix}{k}")]


def require_at_least(minimum: int, config: Any, *names: str) -> None:
    """Check sizes of a configuration; a field may also be a tuple of sizes.

    Raises:
        ConfigError: the first field that is below ``minimum``.
    """
    for name in names:
        value = getattr(config, name)
        if any(size < minimum for size in (value if isinstance(value, tuple) else (value,))):
            raise ConfigError(f"{type(config).__name__}: {name} is {value}, expected at least {minimum}")


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise ConfigError(f"{where}: {value!r} is not one of {', '.join(map(repr, arguments))}")
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else config_from_dict(hint, value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}: expected a list, got {value!r:.80}")
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_convert(arguments[0], item, where) for item in value)
        if len(arguments) != len(value):
            raise ConfigError(f"{where}: expected {len(arguments)} values, got {len(value)}")
        return tuple(_convert(kind, item, where) for kind, item in zip(arguments, value, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    kind = origin or hint
    if not isinstance(value, kind) or (isinstance(value, bool) and kind in (int, float)):
        raise ConfigError(f"{where}: expected {getattr(kind, '__name__', kind)}, got {value!r:.80}")
    return value


def _convert_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    if isinstance(value, Mapping) and "kind" in value:  # a union of dataclasses that say what they are
        for kind in kinds:
            if dataclasses.is_dataclass(kind) and getattr(kind, "kind", None) == value["kind"]:
                return _convert(kind, value, where)
    failures = []
    for kind in kinds:
        if kind is not type(None):
            try:
                return _convert(kind, value, where)
            except ConfigError as error:
                failures.append(error)
    raise failures[0]


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` on a temporary file in the same folder, flush it to disk, then rename it to ``path``.

    Raises:
        CheckpointError: the file cannot be written (a full disk, say); an older file there is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode & 0o777  # as the umask has it; those of safetensors are private
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)
        os.replace(temporary, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {path} ({error}); what was there is unchanged; free some space or write elsewhere"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # where the folder is no folder, there is nothing to remove
            temporary.unlink(missing_ok=True)


LEFTOVER = re.compile(r"\.(.+\.[0-9a-f]{8}\.tmp|tmp\w{6})")
"""Names of temporary files, ours and those of safetensors."""


def remove_leftovers(folder: Path, seconds: float = 3600.0) -> None:
    """Remove what writes that were killed left anywhere in a folder: temporary files untouched for so long."""
    for path in Path(folder).rglob(".*"):
        if LEFTOVER.fullmatch(path.name):
            with contextlib.suppress(OSError):  # another process was faster
                if time.time() - path.stat().st_mtime > seconds:
                    path.unlink()


def writable(folder: Path) -> None:
    """Try whether a folder can be made and written to, before hours of work whose result is to lie there.

    Raises:
        CheckpointError: it cannot be made, or no file can be written in it.
    """
    made: list[Path] = []
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CheckpointError(
            f"cannot write into {folder} ({error.strerror}); choose another place"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # not made, or another process writes there already
            for path in made:
                path.rmdir()


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Tensors (any dtype) and string metadata to one safetensors file, atomically.

    Raises:
        CheckpointError: as `write_atomic`.
    """
    from safetensors.torch import save_file  # here: configurations and videos are written without torch

    ready = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomic(path, lambda temporary: save_file(ready, temporary, dict(metadata or {})))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        CheckpointError: no such file, or truncated or corrupt.
    """
    from safetensors.torch import load_file

    return _reading(path, lambda: load_file(path))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], bytes]:
    """The tensors of a safetensors file, or of the shards that ``NAME.index.json`` lists, and what identifies them.

    Tensors are mapped from the files, not read, until they are used. The identity of a whole file is its bytes, that of
    shards the index, which holds their digests.

    Raises:
        CheckpointError: missing, truncated or corrupt; names the file.
    """
    index = path.with_name(f"{path.name}.index.json")
    if path.is_file() or not index.is_file():
        return load_tensors(path), _reading(path, path.read_bytes)
    listing = read_json(index)
    try:
        owners = {str(name): str(file) for name, file in listing["weight_map"].items()}
        digests = {str(file): str(digest) for file, digest in listing["metadata"]["sha256"].items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is not an index of shards ({error!r:.80}); recreate it") from error
    tensors: dict[str, Tensor] = {}
    for file in sorted(digests):
        if Path(file).name != file:
            raise CheckpointError(f"{index} names {file!r}, which is not a file beside it")
        tensors |= load_tensors(path.with_name(file))
    if set(tensors) != set(owners):
        raise CheckpointError(f"{index} and its shards hold different tensors; convert the weights again")
    return tensors, index.read_bytes()


def read_pth(path: Path) -> dict[str, Tensor]:
    """The state dict of a PyTorch ``.pth``, mapped from the file; no code in it is run.

    Raises:
        CheckpointError: truncated, not a checkpoint, or not a plain state dict.
    """
    import torch

    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except Exception as error:  # a damaged file makes torch raise almost anything; nothing of it was run
        size = path.stat().st_size / 1e9
        raise CheckpointError(
            f"{path} ({size:.2f} GB) is truncated or not a PyTorch state dict "
            f"({' '.join(str(error).split()):.100}); download it again"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        what = (
            f"keys {', '.join(map(str, list(state)[:6]))}"
            if isinstance(state, Mapping)
            else type(state).__name__
        )
        raise CheckpointError(f"{path} is not a state dict of tensors ({what}); give the published file")
    return dict(state)


def save_shards(path: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = 2 * 10**9) -> None:
    """Named tensors, drawn one by one, to shards of about ``shard_bytes`` beside ``path``, and their index last.

    Raises:
        CheckpointError: as `write_atomic`.
    """
    owners: dict[str, int] = {}
    shards: list[str] = []
    waiting: dict[str, Tensor] = {}

    def flush() -> None:
        name = path.with_name(f".{path.name}.{len(shards)}.part")
        save_tensors(name, waiting)
        shards.append(_sha256(name))
        owners.update(dict.fromkeys(waiting, len(shards)))
        waiting.clear()

    total = 0
    for name, tensor in tensors:
        waiting[name] = tensor
        total += tensor.nbytes
        if sum(t.nbytes for t in waiting.values()) >= shard_bytes:
            flush()
    if waiting:
        flush()
    names = [f"{path.stem}-{i + 1:05d}-of-{len(shards):05d}{path.suffix}" for i in range(len(shards))]
    for i, name in enumerate(names):
        os.replace(path.with_name(f".{path.name}.{i}.part"), path.with_name(name))
    index = {
        "metadata": {"total_size": total, "sha256": dict(zip(names, shards, strict=True))},
        "weight_map": {name: names[shard - 1] for name, shard in owners.items()},
    }
    write_json(path.with_name(f"{path.name}.index.json"), index)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_metadata(path: Path) -> dict[str, str]:
    """The string metadata of a safetensors file; reads the header only.

    Raises:
        CheckpointError: no such file, or truncated or corrupt.
    """

    def read() -> dict[str, str]:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})

    return _reading(path, read)


def write_json(path: Path, data: Any) -> None:
    """JSON, indented, finite numbers only, atomically.

    Raises:
        CheckpointError: as `write_atomic`.
    """
    write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """Numbers for `write_json`: None for what is not finite."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Text as UTF-8, atomically. Raises CheckpointError as `write_atomic`."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        CheckpointError: no such file, or not JSON.
    """
    return _reading(path, lambda: json.loads(Path(path).read_text(encoding="utf-8")))


Result = TypeVar("Result")


def _reading(path: Path, read: Callable[[], Result]) -> Result:
    try:
        return read()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except (OSError, safetensors.SafetensorError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{path} is truncated or corrupt ({reason}); restore or recreate it") from error
