"""What a packed file says about each tensor, and the parts it is stored in.

| layout | parts of tensor `name` |
| --- | --- |
| dense | `name` |
| bitmask | `name::values` (flat order), `name::bitmask` (1 bit a weight: stored or not) |
| nm | `name::values`, `name::codes` (one code a run of m, see `codes`) |
| grid | `name::integers`, `name::scales`, `name::zeros`, `name::live` (1 bit a group) |

A weight that is not stored is +0.0 (all bits zero), or -0.0 (only the top bit set) where
`name::signs` holds a 1; that part has one bit per weight not stored and is left out when there is
no -0.0. The mask of a tensor is its set of stored weights (`mask` = "stored"), all of it ("full"),
or bits of its own in `name::mask` ("own").

A grid is a quantized weight, scale * (integer - zero) in groups of columns of its matrix; groups
that are not `live` are 0 and nothing of them is stored (the parts `zeros` and `live` are left out
where there are none).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from sparseworks.core.errors import CheckpointError
from sparseworks.io.bits import has_signed_zero
from sparseworks.io.codes import LARGEST_RUN, code_bits
from sparseworks.io.container import STORED_AS

__all__ = ["FORMAT_VERSION", "METADATA_KEY", "Record", "dtype_name", "part_name"]

FORMAT_VERSION = 1
METADATA_KEY = "sparseworks"
_OTHER_DTYPES = (torch.complex32, torch.complex128)  # the container knows them as bytes only
_ALL_DTYPES = {str(d).removeprefix("torch."): d for d in (*STORED_AS, *_OTHER_DTYPES)}
_LAYOUTS = ("dense", "bitmask", "nm", "grid")
_ORDERS = ("linear", "transposed", "conv", "packed", "experts", "experts_transposed", "recurrent")
_MASKS = ("none", "stored", "full", "own")


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" and the like."""
    return str(dtype).removeprefix("torch.")


def part_name(name: str, part: str) -> str:
    return f"{name}::{part}" if part else name


@dataclass(frozen=True)
class Record:
    """One tensor of a packed file.

    Args:
        dtype: "float32" and the like.
        shape: of the tensor.
        layout: "dense", "bitmask", "nm" or "grid".
        stored: values stored.
        nonzero: weights that are not zero (-0.0 is).
        signs: whether there is a `signs` part.
        mask: "none", "stored", "full" or "own".
        kept: weights that the mask keeps (0 without a mask).
        pattern: of the mask, in its short form.
        names: parameter names that the mask record uses for this tensor.
        n, m: of layout "nm".
        axis: the axis along which the runs of m lie; the weights are stored with it moved last.
        bits, group: of layout "grid": of an integer, and columns of a group.
        zeros: whether its groups have zero points.
        order: how the axes of its tensor map to the matrix (`View.layout`).
        hash: BLAKE2b of this record (without the hash) and the bytes of its parts.
    """

    dtype: str
    shape: tuple[int, ...]
    layout: str = "dense"
    stored: int = 0
    nonzero: int = 0
    signs: bool = False
    mask: str = "none"
    kept: int = 0
    pattern: str = ""
    names: tuple[str, ...] = ()
    n: int = 0
    m: int = 0
    axis: int = -1
    bits: int = 0
    group: int = 0
    zeros: bool = False
    order: str = ""
    hash: str = ""

    @property
    def torch_dtype(self) -> torch.dtype:
        return _ALL_DTYPES[self.dtype]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def dense_bytes(self) -> int:
        return self.numel * self.torch_dtype.itemsize

    @property
    def moved(self) -> bool:
        """Whether the weights are stored in another order than that of the tensor."""
        return self.layout == "nm" and self.axis != len(self.shape) - 1

    @property
    def rows(self) -> int:
        """Of the matrix of a grid."""
        first = self.shape[0] if self.shape else 1
        if self.order == "transposed":
            return self.shape[1]
        if self.order == "experts":
            return first * self.shape[1]
        return first * self.shape[2] if self.order == "experts_transposed" else first

    def parts(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Part -> stored dtype and shape; "" is the tensor itself."""
        dtype, n = self.torch_dtype, self.numel
        native = dtype in STORED_AS
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        if self.layout == "dense":
            found[""] = (dtype, self.shape) if native else (torch.uint8, (self.dense_bytes,))
        elif self.layout == "grid":
            kept, groups = self.stored // self.group, n // self.group
            found["integers"] = (torch.uint8, ((self.stored * self.bits + 7) // 8,))
            found["scales"] = (torch.float16, (kept,))
            if self.zeros:
                found["zeros"] = (torch.uint8, ((kept * self.bits + 7) // 8,))
            if kept < groups:
                found["live"] = (torch.uint8, ((groups + 7) // 8,))
        else:
            found["values"] = (dtype, (self.stored,))
            if self.layout == "bitmask":
                found["bitmask"] = (torch.uint8, ((n + 7) // 8,))
            else:
                bits = n // self.m * code_bits(self.n, self.m)
                found["codes"] = (torch.uint8, ((bits + 7) // 8,))
            if self.signs:
                found["signs"] = (torch.uint8, ((n - self.stored + 7) // 8,))
        if self.mask == "own":
            found["mask"] = (torch.uint8, ((n + 7) // 8,))
        return found

    @property
    def nbytes(self) -> int:
        return sum(d.itemsize * math.prod(s) for d, s in self.parts().values())

    @property
    def signed_zero_bytes(self) -> int:
        """Of `nbytes`, what tells -0.0 from +0.0: the part `signs`, or the -0.0 among the values.

        A weight that its mask keeps is stored whatever it is, and costs nothing here.
        """
        if not has_signed_zero(self.torch_dtype) or self.layout in ("dense", "grid"):
            return 0
        if self.signs:
            return (self.numel - self.stored + 7) // 8
        if self.mask == "stored":
            return 0
        return max(0, self.stored - self.nonzero) * self.torch_dtype.itemsize

    def to_json(self) -> dict[str, Any]:
        """Plain values; what has its default is left out."""
        return {
            f.name: list(v) if isinstance(v, tuple) else v
            for f, v in ((f, getattr(self, f.name)) for f in fields(self))
            if f.name in ("dtype", "shape") or v != f.default
        }

    def seal(self) -> bytes:
        """The bytes of this record that its hash begins with."""
        unused = () if self.layout == "grid" else ("bits", "group", "zeros", "order")
        plain = {k: v for k, v in asdict(self).items() if k != "hash" and k not in unused}
        return json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, where: str, entry: Any) -> Record:
        """A record whose values make sense together.

        Raises:
            CheckpointError: they do not; begins with `where`.
        """
        record = _typed(where, entry)
        total = record.numel
        nm = record.layout == "nm"
        runs = record.shape[record.axis] if nm and 0 <= record.axis < len(record.shape) else 0
        sound = (
            record.dtype in _ALL_DTYPES
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
            and (
                not nm
                or (
                    0 < record.n <= record.m <= LARGEST_RUN
                    and runs % record.m == 0
                    and record.stored == total // record.m * record.n
                )
            )
            and (record.layout != "grid" or _sound_grid(record))
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
        and record.stored % record.group == 0
        and record.torch_dtype.is_floating_point
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
