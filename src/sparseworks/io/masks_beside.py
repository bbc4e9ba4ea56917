"""Masks without weights: a file of their own, or beside the weights of a plain folder,
`masks/<anything>.safetensors`.

Each file holds the packed bits of some parameters by the model's own names, their patterns in its
metadata. They are in a folder of their own because some readers take every safetensors file of a
model folder for weights.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sparseworks.core.errors import CheckpointError, InvalidArgument
from sparseworks.core.masks import MaskEntry, Masks, masks, unpack_bits
from sparseworks.io.atomic import atomic_file
from sparseworks.io.container import Container
from sparseworks.io.sealed import check_seal, write_sealed

__all__ = ["FOLDER", "load_masks", "read_beside", "save_masks", "write_beside"]

FOLDER = "masks"
_METHOD = "sparseworks.method"


def write_beside(path: Path, record: Masks) -> None:
    """Write some masks as one file, the same bytes for the same masks."""
    packed = {n: record.entry(n).packed for n in sorted(record)}
    patterns = {n: record.entry(n).pattern for n in packed}
    with atomic_file(path) as temporary:
        write_sealed(packed, temporary, {**patterns, _METHOD: record.method})


def save_masks(source: nn.Module | Masks, path: str | os.PathLike[str]) -> int:
    """Write masks alone, a bit a weight: what a task learned over weights that others share.

    Args:
        source: a record, or a model that has one.
        path: of the file, which ends in ".safetensors"; replaced atomically.

    Returns:
        Bytes of the file.

    Raises:
        InvalidArgument: the model has no masks, or another kind of path.
    """
    target, record = Path(path), masks(source) if isinstance(source, nn.Module) else source
    if not record:
        raise InvalidArgument(f"{target}: there are no masks to save")
    if target.suffix != ".safetensors":
        raise InvalidArgument(f"{target}: masks go into a file that ends in .safetensors")
    write_beside(target, record)
    return target.stat().st_size


def load_masks(path: str | os.PathLike[str], model: nn.Module) -> Masks:
    """The masks of a file that `save_masks` wrote; the model stays as it is.

    They start another task (`sw.transform(model, "maskllm", prior=...)`), or go onto the weights:
    `record.apply(model)`, then `sw.attach(model, record)`.

    Args:
        path: of the file.
        model: with parameters of these names and sizes.

    Raises:
        CheckpointError: no such file, damaged, or masks of another model.
    """
    file, parameters = Path(path), dict(model.named_parameters(remove_duplicate=False))
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    return Masks(*_entries(file, parameters))


def _entries(file: Path, parameters: Mapping[str, Tensor]) -> tuple[dict[str, MaskEntry], str]:
    """The masks of a file, and the method that chose them."""
    entries = {}
    with Container(file) as bits:
        for name, part in bits.parts.items():
            if (
                name not in parameters
                or part.dtype != torch.uint8
                or part.nbytes != (parameters[name].numel() + 7) // 8
            ):
                raise CheckpointError(f"{file}: {name!r} is not a mask of this model")
            packed, shape = bits.elements(part), tuple(parameters[name].shape)
            kept = int(unpack_bits(packed, shape).sum())
            entries[name] = MaskEntry(packed, shape, kept, bits.metadata.get(name, ""))
        check_seal(file, {n: e.packed for n, e in entries.items()}, bits.metadata)
        return entries, bits.metadata.get(_METHOD, "")


def read_beside(folder: Path, model: nn.Module) -> Masks | None:
    """The record of the masks that are beside the weights and that the weights still obey.

    Raises:
        CheckpointError: masks of another model.
    """
    files = sorted((folder / FOLDER).glob("*.safetensors"))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    entries: dict[str, MaskEntry] = {}
    method = ""
    for file in files:
        found, method = _entries(file, parameters)
        entries |= found
    return Masks(entries, method).obeyed_by(model) if entries else None
