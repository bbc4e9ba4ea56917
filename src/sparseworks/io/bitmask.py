"""compressed-tensors folders of format "sparse-bitmask" and "sparse-24-bitmask".

Each sparse weight `module.weight` is stored as `module.compressed` (its non-zero values in row
order), `module.bitmask` (uint8 `[..., ceil(columns / 8)]`, lowest bit first, each row padded to a
whole byte), `module.shape`, and, unstructured only, `module.row_offsets`. Early versions kept
".weight" in these names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sparseworks.core.errors import CheckpointError
from sparseworks.core.masks import unpack_bits
from sparseworks.io.bits import count_true, words
from sparseworks.io.checkpoint import Checkpoint, Stored
from sparseworks.io.plain import PlainCheckpoint

__all__ = ["FORMATS", "BitmaskCheckpoint", "sparsity_format"]

FORMATS = ("sparse-bitmask", "sparse-24-bitmask")
_PARTS = ("compressed", "bitmask", "shape", "row_offsets")


def sparsity_format(config: Mapping[str, Any]) -> str:
    """The compressed-tensors sparsity format of a config.json, "" when it has none.

    It stands in `quantization_config` or `compression_config`, or alone as `sparsity_config`.
    """
    for key in ("quantization_config", "compression_config"):
        outer = config.get(key)
        if isinstance(outer, dict) and isinstance(outer.get("sparsity_config"), dict):
            return str(outer["sparsity_config"].get("format", ""))
    alone = config.get("sparsity_config")
    return str(alone.get("format", "")) if isinstance(alone, dict) else ""


class BitmaskCheckpoint(Checkpoint):
    """Dense tensors out of a compressed-tensors folder.

    Raises:
        CheckpointError: a part is missing or of the wrong size; names the tensor.
    """

    kind = "compressed-tensors"

    def __init__(self, plain: PlainCheckpoint, format: str) -> None:
        super().__init__(plain.path)
        self._plain = plain
        self.file_bytes = plain.file_bytes
        self._prefixes: dict[str, str] = {}
        self.tensors: dict[str, Stored] = {}
        needed = _PARTS if format == "sparse-bitmask" else _PARTS[:3]
        taken = set()
        for key in plain.tensors:
            prefix, _, last = key.rpartition(".")
            if last == "compressed" and f"{prefix}.bitmask" in plain.tensors:
                name = prefix if prefix.endswith(".weight") else f"{prefix}.weight"
                self._prefixes[name] = prefix
                taken |= {f"{prefix}.{part}" for part in _PARTS}
                self.tensors[name] = self._stored(name, prefix, needed)
        for key, stored in plain.tensors.items():
            if key in taken:
                continue
            if key in self.tensors or key.rpartition(".")[2] == "bitmask":
                raise CheckpointError(f"{self.path}: tensor {key!r} has parts that do not fit")
            self.tensors[key] = stored

    def _stored(self, name: str, prefix: str, needed: tuple[str, ...]) -> Stored:
        where = f"{self.path}: tensor {name!r}"
        for part in needed:
            if f"{prefix}.{part}" not in self._plain.tensors:
                raise CheckpointError(f"{where}: its part {part!r} is missing")
        parts = {
            part: self._plain.tensors[f"{prefix}.{part}"]
            for part in _PARTS
            if f"{prefix}.{part}" in self._plain.tensors
        }
        if parts["shape"].numel > 64 or parts["shape"].dtype.is_floating_point:
            raise CheckpointError(f"{where}: its stored shape is malformed")
        shape = tuple(int(s) for s in self._plain.read(f"{prefix}.shape").reshape(-1))
        count, mask = parts["compressed"].numel, parts["bitmask"]
        columns = shape[-1] if shape else 0
        if (
            not shape
            or any(s < 0 for s in shape)
            or mask.dtype != torch.uint8
            or mask.numel != math.prod(shape[:-1]) * ((columns + 7) // 8)
            or count > math.prod(shape)
        ):
            raise CheckpointError(f"{where}: shape {list(shape)} does not fit its bitmask")
        nbytes = sum(p.nbytes for p in parts.values())
        return Stored(parts["compressed"].dtype, shape, "bitmask", nbytes, count)

    def _rows(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """(start, bool) of slices of whole rows."""
        shape = self.tensors[name].shape
        rows, columns = math.prod(shape[:-1]), shape[-1]
        if not rows * columns:
            return
        width = (columns + 7) // 8
        packed = self._plain.read(f"{self._prefixes[name]}.bitmask").view(rows, width)
        step = max(1, (1 << 22) // columns)
        for row in range(0, rows, step):
            part = packed[row : row + step]
            bits = unpack_bits(part.reshape(-1), (part.shape[0], width * 8))
            if bool(bits[:, columns:].any()):
                raise CheckpointError(
                    f"{self.path}: tensor {name!r}: bits are set past its columns"
                )
            yield row * columns, bits[:, :columns].reshape(-1)

    def verify(self, name: str) -> None:
        if name not in self._prefixes:
            return
        stored, prefix = self.tensors[name], self._prefixes[name]
        counts = [count_true(mask) for _, mask in self._rows(name)]
        if sum(counts) != stored.nonzero:
            raise CheckpointError(
                f"{self.path}: tensor {name!r}: {sum(counts)} bits are set for "
                f"{stored.nonzero} values"
            )
        if f"{prefix}.row_offsets" in self._plain.tensors and stored.numel:
            kept = torch.cat([m for _, m in self._rows(name)]).view(-1, stored.shape[-1]).sum(1)
            # for more than two axes the writer's cumulative sum runs along the first one only
            offsets = self._plain.read(f"{prefix}.row_offsets").reshape(-1)
            if len(stored.shape) == 2 and not torch.equal(offsets.long(), kept.cumsum(0) - kept):
                raise CheckpointError(
                    f"{self.path}: tensor {name!r}: row_offsets contradict its bits"
                )

    def slices(self, name: str) -> Iterator[tuple[int, Tensor]]:
        if name not in self._prefixes:
            yield from self._plain.slices(name)
            return
        values = self._plain.read(f"{self._prefixes[name]}.compressed").reshape(-1)
        position = 0
        for start, mask in self._rows(name):
            count = count_true(mask)
            weights = torch.zeros(mask.numel(), dtype=values.dtype)
            words(weights).masked_scatter_(mask, words(values[position : position + count]))
            position += count
            yield start, weights

    def close(self) -> None:
        self._plain.close()
