"""Shards as transformers writes them, filled in any order: every tensor's place is known before."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sparseworks.core.errors import CheckpointError, InvalidArgument
from sparseworks.io.atomic import need_space
from sparseworks.io.container import STORED_AS, Container, Part, as_bytes, header_bytes
from sparseworks.io.plain import PlainCheckpoint
from sparseworks.io.writing import write_at

__all__ = ["Shards", "parse_size"]

_UNITS = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1}


def parse_size(text: str | int) -> int:
    """Bytes of "5GB", "200MB" or a number.

    Raises:
        InvalidArgument: not a size of at least a byte.
    """
    given = str(text).strip().upper()
    unit = next((u for u in _UNITS if given.endswith(u)), "")
    try:
        size = int(float(given.removesuffix(unit)) * _UNITS.get(unit, 1))
    except ValueError:
        size = 0
    if size < 1:
        raise InvalidArgument(f"size {text!r}: use a number with KB, MB or GB, as 5GB")
    return size


class Shards:
    """`model-00001-of-0000N.safetensors` and their index, or one `model.safetensors`.

    Args:
        folder: that holds them; files of the right size that are there are gone on with.
        layout: empty tensors by name, in order.
        largest: bytes of a shard at most (a tensor that is larger has a shard of its own).
        parameters: of the model, for the index.
    """

    def __init__(
        self, folder: Path, layout: Mapping[str, Tensor], largest: int, parameters: int
    ) -> None:
        from huggingface_hub import split_torch_state_dict_into_shards

        self.folder, self.parameters = folder, parameters
        split = split_torch_state_dict_into_shards(
            dict(layout), filename_pattern="model{suffix}.safetensors", max_shard_size=largest
        )
        self.files = split.filename_to_tensors
        self.places = split.tensor_to_filename
        self.total = sum(t.numel() * t.element_size() for t in layout.values())
        self._parts: dict[str, tuple[Part, int]] = {}  # with where the data of its file starts
        self._headers: dict[str, bytes] = {}
        for file, names in self.files.items():
            parts = _parts({n: layout[n] for n in names})
            header = header_bytes(parts, {"format": "pt"})
            self._headers[file] = header
            self._parts |= {n: (p, len(header)) for n, p in parts.items()}

    def create(self) -> None:
        """Files of full size, with their headers, whose tensors are still zero.

        Raises:
            CheckpointError: the disk cannot take them.
        """
        need_space(self.folder / "model.safetensors", self.total)
        for file, header in self._headers.items():
            with open(self.folder / file, "wb", buffering=0) as handle:
                handle.truncate(self._size(file))
                write_at(handle.fileno(), memoryview(header), 0)
                os.fsync(handle.fileno())

    def _size(self, file: str) -> int:
        return len(self._headers[file]) + max(
            (self._parts[n][0].end for n in self.files[file]), default=0
        )

    def check(self) -> None:
        """Raise unless the files that are there are those of this layout."""
        for file, header in self._headers.items():
            path = self.folder / file
            if not path.is_file() or path.stat().st_size != self._size(file):
                raise CheckpointError(f"{path}: missing or of another size; start anew")
            with open(path, "rb") as handle:
                if handle.read(len(header)) != header:
                    raise CheckpointError(f"{path}: of another model; start anew")

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors in their places, on the disk when this returns."""
        touched = set()
        for name, tensor in tensors.items():
            part, start = self._parts[name]
            if tuple(tensor.shape) != part.shape or tensor.dtype != part.dtype:
                raise CheckpointError(f"{name}: changed its shape or dtype")
            file = self.places[name]
            touched.add(file)
            with open(self.folder / file, "rb+", buffering=0) as handle:
                values = as_bytes(tensor.detach().cpu().contiguous())
                write_at(handle.fileno(), values, start + part.start)
        for file in touched:
            with open(self.folder / file, "rb+") as handle:
                os.fsync(handle.fileno())

    def open(self) -> PlainCheckpoint:
        """The files as a checkpoint; tensors that are not written yet are zero in it."""
        paths = [self.folder / f for f in self.files]
        return PlainCheckpoint(self.folder, {p: Container(p) for p in paths})

    def write_index(self) -> None:
        """The index, where there are several files."""
        if len(self.files) > 1:
            metadata = {"total_parameters": self.parameters, "total_size": self.total}
            text = json.dumps(
                {"metadata": metadata, "weight_map": self.places}, indent=2, sort_keys=True
            )
            (self.folder / "model.safetensors.index.json").write_text(text + "\n")


def _parts(layout: Mapping[str, Tensor]) -> dict[str, Part]:
    """Where the tensors of a file go: wide dtypes first, then by name, as safetensors orders."""
    parts: dict[str, Part] = {}
    position = 0
    for name, tensor in sorted(layout.items(), key=lambda e: (-e[1].element_size(), e[0])):
        if tensor.dtype not in STORED_AS:
            raise CheckpointError(f"{name}: safetensors has no dtype for {tensor.dtype}")
        size = tensor.element_size() * torch.Size(tensor.shape).numel()
        parts[name] = Part(name, tensor.dtype, tuple(tensor.shape), position, position + size)
        position += size
    return parts
