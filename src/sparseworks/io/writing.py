"""A model as one packed safetensors file, or as a plain one.

A packed file is a valid safetensors file: any reader of the format can list and read its parts (see
`records` for their names). Its header says how each tensor is stored and carries a hash for each
tensor and one for itself, so that damage is found and the tensor is named. Tensors are written one
at a time, a slice at a time: beside the model, memory holds one slice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.core.types import Progress
from sparseworks.io.atomic import need_space
from sparseworks.io.container import STORED_AS, Part, as_bytes, header_bytes, refuse_pickle
from sparseworks.io.encoding import Plan, encode, plan
from sparseworks.io.gather import ModelTensors, gather, integers_by_tensor, masks_by_tensor
from sparseworks.io.packed import DIGEST_KEY, ZERO_DIGEST, hasher, header_digest
from sparseworks.io.records import METADATA_KEY, Record, dtype_name, oldest_version, part_name
from sparseworks.io.summary import CheckpointInfo, of_records

__all__ = ["refuse_pickle_target", "write_at", "write_dense", "write_packed"]


def refuse_pickle_target(path: Path) -> None:
    """Saving under a pickle's name would make every reader guess wrong."""
    try:
        refuse_pickle(path)
    except ValueError:
        raise InvalidArgument(
            f"{path}: {path.suffix} is the name of a pickle; use a name that ends in .safetensors"
        ) from None


@torch.no_grad()
def write_packed(
    model: nn.Module, path: Path, progress: Progress | None = None, signed_zeros: bool = True
) -> CheckpointInfo:
    """Write a packed file at `path` (no renaming, no flush) and say what it holds."""
    found = gather(model)
    entries, method = masks_by_tensor(model, found)
    integers = integers_by_tensor(model, found)
    plans = {}
    for name, tensor in found.tensors.items():
        entry, names = entries.get(name, (None, ()))
        plans[name] = plan(name, tensor, entry, names, signed_zeros, integers.get(name))
    parts = lay_out(plans)
    records = {name: replace(p.record, hash=ZERO_DIGEST) for name, p in plans.items()}
    header = _header(parts, records, found, method, type(model).__name__, ZERO_DIGEST)
    size = len(header) + sum(p.nbytes for p in parts.values())
    need_space(path, size)
    with open(path, "wb", buffering=0) as file:
        file.truncate(size)
        for i, (name, p) in enumerate(plans.items()):
            if progress is not None:
                progress(i, len(plans), name)
            digest = _write_tensor(file.fileno(), name, p, parts, len(header))
            records[name] = replace(p.record, hash=digest)
        if progress is not None:
            progress(len(plans), len(plans), "header")
        header = _header(parts, records, found, method, type(model).__name__, ZERO_DIGEST)
        own = header_digest(header[8:], ZERO_DIGEST)
        header = _header(parts, records, found, method, type(model).__name__, own)
        write_at(file.fileno(), memoryview(header), 0)
    return of_records(path, records, size, method, found.ties)


@torch.no_grad()
def write_dense(model: nn.Module, path: Path) -> None:
    """Write a plain safetensors file; a tied name is noted in the metadata, as the format does."""
    found = gather(model)
    plans = {
        name: Plan(Record(dtype_name(tensor.dtype), tuple(tensor.shape)), tensor)
        for name, tensor in found.tensors.items()
    }
    for name, p in plans.items():
        if p.tensor.dtype not in STORED_AS:
            raise ModelError(f"{name}: safetensors has no dtype for {p.tensor.dtype}")
    parts = lay_out(plans)
    header = header_bytes(parts, {"format": "pt", **found.ties})
    size = len(header) + sum(p.nbytes for p in parts.values())
    need_space(path, size)
    with open(path, "wb", buffering=0) as file:
        file.truncate(size)
        write_at(file.fileno(), memoryview(header), 0)
        for name, p in plans.items():
            _write_tensor(file.fileno(), name, p, parts, len(header))


def lay_out(plans: Mapping[str, Plan]) -> dict[str, Part]:
    """Where each part goes: wide dtypes first, so that all are aligned and no gaps are needed."""
    wanted = [
        (part_name(name, part), dtype, shape)
        for name, p in plans.items()
        for part, (dtype, shape) in p.record.parts().items()
    ]
    wanted.sort(key=lambda w: -w[1].itemsize)
    parts: dict[str, Part] = {}
    position = 0
    for name, dtype, shape in wanted:
        if name in parts:
            raise ModelError(f"{name}: a tensor of the model has the name of a stored part")
        size = dtype.itemsize * torch.Size(shape).numel()
        parts[name] = Part(name, dtype, shape, position, position + size)
        position += size
    return parts


def _header(
    parts: Mapping[str, Part],
    records: Mapping[str, Record],
    found: ModelTensors,
    method: str,
    model: str,
    digest: str,
) -> bytes:
    own = {
        "version": oldest_version(records.values()),
        "method": method,
        "model": model,
        "ties": found.ties,
        "tensors": {name: r.to_json() for name, r in records.items()},
    }
    text = json.dumps(own, separators=(",", ":"))
    return header_bytes(parts, {"format": "pt", METADATA_KEY: text, DIGEST_KEY: digest})


def _write_tensor(
    descriptor: int, name: str, p: Plan, parts: Mapping[str, Part], data_start: int
) -> str:
    """Write every part of a tensor where it belongs; returns the hash."""
    h = hasher()
    h.update(p.record.seal())
    written = dict.fromkeys(p.record.parts(), 0)
    for part, values in encode(p):
        view = as_bytes(values)
        place = parts[part_name(name, part)]
        if written[part] + len(view) <= place.nbytes:
            write_at(descriptor, view, data_start + place.start + written[part])
        written[part] += len(view)
        h.update(view)
    if any(size != parts[part_name(name, part)].nbytes for part, size in written.items()):
        raise ModelError(f"{name}: changed while it was being saved; stop training first")
    return str(h.hexdigest())


def write_at(descriptor: int, view: memoryview, offset: int) -> None:
    """All bytes of a view at an offset of an open file."""
    while len(view):
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done
