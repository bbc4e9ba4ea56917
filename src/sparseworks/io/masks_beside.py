"""The masks of a plain folder, beside its weights: `masks/<anything>.safetensors`.

Each file holds the packed bits of some parameters by the model's own names, their patterns in its
metadata. They are in a folder of their own because some readers take every safetensors file of a
model folder for weights.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from sparseworks.core.errors import CheckpointError
from sparseworks.core.masks import MaskEntry, Masks, unpack_bits
from sparseworks.io.atomic import atomic_file
from sparseworks.io.container import Container, Part, as_bytes, header_bytes
from sparseworks.io.writing import write_at

__all__ = ["FOLDER", "read_beside", "write_beside"]

FOLDER = "masks"
_METHOD = "sparseworks.method"


def write_beside(path: Path, record: Masks) -> None:
    """Write some masks as one file, the same bytes for the same masks."""
    packed = {n: record.entry(n).packed for n in sorted(record)}
    parts, position = {}, 0
    for name, bits in packed.items():
        parts[name] = Part(name, torch.uint8, (bits.numel(),), position, position + bits.numel())
        position += bits.numel()
    patterns = {n: record.entry(n).pattern for n in packed}
    header = header_bytes(parts, {**patterns, _METHOD: record.method})
    with atomic_file(path) as temporary, open(temporary, "wb", buffering=0) as file:
        write_at(file.fileno(), memoryview(header), 0)
        for name, bits in packed.items():
            write_at(file.fileno(), as_bytes(bits), len(header) + parts[name].start)


def read_beside(folder: Path, model: nn.Module) -> Masks | None:
    """The record of the masks that are beside the weights and that the weights still obey.

    Raises:
        CheckpointError: masks of another model.
    """
    files = sorted((folder / FOLDER).glob("*.safetensors"))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    entries, method = {}, ""
    for file in files:
        with Container(file) as bits:
            method = bits.metadata.get(_METHOD, "")
            for name, part in bits.parts.items():
                if name not in parameters or part.nbytes != (parameters[name].numel() + 7) // 8:
                    raise CheckpointError(f"{file}: {name!r} is not a mask of this model")
                packed, shape = bits.elements(part), tuple(parameters[name].shape)
                kept = int(unpack_bits(packed, shape).sum())
                entries[name] = MaskEntry(packed, shape, kept, bits.metadata.get(name, ""))
    return Masks(entries, method).obeyed_by(model) if entries else None
