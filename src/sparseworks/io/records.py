"""What a packed file says about each tensor, and the parts it is stored in.

| layout | parts of tensor `name` |
| --- | --- |
| dense | `name` |
| bitmask | `name::values` (flat order), `name::bitmask` (1 bit a weight: stored or not) |
| nm | `name::values`, `name::codes` (one code a run of m, see `codes`) |
| grid | `name::integers`, `name::scales`, `name::zeros`, and where they lie (below) |

A weight that is not stored is +0.0 (all bits zero), or -0.0 (only the top bit set) where
`name::signs` holds a 1; that part has one bit per weight not stored and is left out when there is
no -0.0. The mask of a tensor is its set of stored weights (`mask` = "stored"), all of it ("full"),
or bits of its own in `name::mask` ("own").

A grid is a quantized weight, scale * (integer - zero) in groups of columns of its matrix. Integers
that are not stored are their group's zero, so that the weight is 0; of groups that are not live
nothing is stored. Which are, in the order of the matrix:

| places | stored are | parts |
| --- | --- | --- |
| "" | the integers of live groups | `name::live` (1 bit a group; left out where all are) |
| "live" | some integers of live groups | that, `name::bitmask` (1 bit a weight of live groups) |
| "all" | some; groups without any are not live | `name::bitmask` (1 bit a weight) |
| "nm" | n of every m | `name::codes` |

Files with such places are of version 2 of the format, all others of version 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from sparseworks.io.bits import has_signed_zero
from sparseworks.io.codes import code_bits
from sparseworks.io.container import STORED_AS

__all__ = [
    "DTYPES",
    "FORMAT_VERSION",
    "METADATA_KEY",
    "Record",
    "dtype_name",
    "oldest_version",
    "part_name",
]

FORMAT_VERSION = 2  # the newest that is read
METADATA_KEY = "sparseworks"
_OTHER_DTYPES = (torch.complex32, torch.complex128)  # the container knows them as bytes only
DTYPES = {str(d).removeprefix("torch."): d for d in (*STORED_AS, *_OTHER_DTYPES)}


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" and the like."""
    return str(dtype).removeprefix("torch.")


def part_name(name: str, part: str) -> str:
    return f"{name}::{part}" if part else name


def oldest_version(records: Iterable[Record]) -> int:
    """The first version of the format that has all of them, which a file of them is of."""
    return 2 if any(r.places for r in records) else 1


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
        n, m: of layout "nm", or of a grid's places "nm".
        axis: the axis along which the runs of m lie; the weights are stored with it moved last.
        bits, group: of layout "grid": of an integer, and columns of a group.
        zeros: whether its groups have zero points.
        order: how the axes of its tensor map to the matrix (`View.layout`).
        places: of layout "grid": how the file says which integers are stored.
        groups: live ones, where a grid has places.
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
    places: str = ""
    groups: int = 0
    hash: str = ""

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

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

    @property
    def live_groups(self) -> int:
        """Groups of a grid whose scales are stored."""
        return self.groups if self.places else self.stored // self.group

    @property
    def bitmask_bits(self) -> int:
        """Of the part `bitmask`."""
        return self.live_groups * self.group if self.places == "live" else self.numel

    def parts(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Part -> stored dtype and shape; "" is the tensor itself."""
        dtype, n = self.torch_dtype, self.numel
        native = dtype in STORED_AS
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        if self.layout == "dense":
            found[""] = (dtype, self.shape) if native else (torch.uint8, (self.dense_bytes,))
        elif self.layout == "grid":
            live, groups = self.live_groups, n // self.group
            found["integers"] = (torch.uint8, ((self.stored * self.bits + 7) // 8,))
            found["scales"] = (torch.float16, (live,))
            if self.zeros:
                found["zeros"] = (torch.uint8, ((live * self.bits + 7) // 8,))
            if live < groups and self.places in ("", "live"):
                found["live"] = (torch.uint8, ((groups + 7) // 8,))
        else:
            found["values"] = (dtype, (self.stored,))
        if self.layout == "bitmask" or self.places in ("live", "all"):
            found["bitmask"] = (torch.uint8, ((self.bitmask_bits + 7) // 8,))
        if "nm" in (self.layout, self.places):
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
        unused = {"hash"} if self.places else {"hash", "places", "groups"}
        if self.layout != "grid":
            unused |= {"bits", "group", "zeros", "order"}
        plain = {k: v for k, v in asdict(self).items() if k not in unused}
        return json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()
