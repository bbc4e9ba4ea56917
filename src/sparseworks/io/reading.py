"""A record of a packed file, read with every doubt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from sparseworks.core.errors import CheckpointError
from sparseworks.io.codes import LARGEST_RUN
from sparseworks.io.container import STORED_AS
from sparseworks.io.records import DTYPES, Record

__all__ = ["read_record"]

_LAYOUTS = ("dense", "bitmask", "nm", "grid")
_ORDERS = ("linear", "transposed", "conv", "packed", "experts", "experts_transposed", "recurrent")
_MASKS = ("none", "stored", "full", "own")
_PLACES = ("", "live", "all", "nm")


def read_record(where: str, entry: Any) -> Record:
    """A record whose values make sense together.

    Args:
        where: what an error begins with.
        entry: as `Record.to_json` makes it.

    Raises:
        CheckpointError: they do not.
    """
    record = _typed(where, entry)
    total = record.numel
    nm = record.layout == "nm"
    runs = record.shape[record.axis] if nm and 0 <= record.axis < len(record.shape) else 0
    sound = (
        record.dtype in DTYPES
        and record.layout in _LAYOUTS
        and record.mask in _MASKS
        and record.stored <= total
        and record.kept <= total
        and record.nonzero <= total
        and (record.layout == "dense" or record.torch_dtype in STORED_AS)
        and (record.mask != "full" or record.kept == total)
        and (record.mask != "stored" or record.kept == record.stored)
        and (record.mask != "stored" or record.layout != "dense")
        and ((record.mask != "none") == bool(record.names))
        and (not nm or (_sound_runs(record) and runs % record.m == 0))
        and (_sound_grid(record) if record.layout == "grid" else not record.places)
    )
    if not sound:
        raise CheckpointError(f"{where}: its record contradicts itself: {entry}")
    return record


def _sound_grid(record: Record) -> bool:
    """A matrix of whole groups, in an order that the axes allow."""
    axes = 3 if record.order.startswith("experts") else 2
    return (
        record.order in _ORDERS
        and len(record.shape) >= axes
        and (record.order in ("conv", "linear") or len(record.shape) == axes)
        and 1 <= record.bits <= 8
        and record.group > 0
        and record.numel > 0
        and record.numel // record.rows % record.group == 0
        and record.torch_dtype.is_floating_point
        and _sound_places(record)
    )


def _sound_places(record: Record) -> bool:
    """As many integers as live groups, and runs of n of m, can have."""
    if not record.places:
        return record.stored % record.group == 0
    some = record.places != "live"  # a live group has one
    return (
        record.places in _PLACES
        and record.groups * record.group <= record.numel
        and (record.groups if some else 0) <= record.stored <= record.groups * record.group
        and (record.places != "nm" or _sound_runs(record))
    )


def _sound_runs(record: Record) -> bool:
    """Runs of m that keep n each."""
    return (
        0 < record.n <= record.m <= LARGEST_RUN
        and record.numel % record.m == 0
        and record.stored == record.numel // record.m * record.n
    )


def _typed(where: str, entry: Any) -> Record:
    """A record with every field of its type; whole numbers are not negative."""
    if not isinstance(entry, Mapping):
        raise CheckpointError(f"{where}: its record is not a map")
    values: dict[str, Any] = {}
    known = {f.name: f.type for f in fields(Record)}
    for key, value in entry.items():
        kind = known.get(key)
        if kind == "tuple[int, ...]":
            good = isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)
        elif kind == "tuple[str, ...]":
            good = isinstance(value, list) and all(isinstance(v, str) for v in value)
        elif kind == "int":
            good = type(value) is int and (value >= 0 or key == "axis")
        else:
            good = type(value).__name__ == kind
        if not good:
            raise CheckpointError(f"{where}: its record has a bad {key!r}: {value!r}")
        values[key] = tuple(value) if isinstance(value, list) else value
    if not {"dtype", "shape"} <= set(values):
        raise CheckpointError(f"{where}: its record has no dtype or shape")
    return Record(**values)
