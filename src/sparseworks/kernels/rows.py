"""Three layouts of a sparse matrix by rows, for the product with one vector.

- `MaskedRows`: a bit a column and packed bf16 values; 2 bytes a kept weight. With AVX-512 VBMI2, 32
  columns are expanded at once.
- `IndexedRows`: a 16-bit column index and a bf16 value; 4 bytes a kept weight, faster from about
  88 % sparsity on, because nothing is spent on zeros.
- `IntegerRows`: a bit a column and packed 8-bit integers with one scale for 128 columns of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparseworks.kernels.packing import Checked, is_tensor, offsets_fault

__all__ = ["GROUP", "WIDE", "WORD", "IndexedRows", "IntegerRows", "MaskedRows", "Packed"]

WORD = 32
WIDE = 64
GROUP = 128  # columns that share a scale
_BITS_OF_BYTE = np.array([byte.bit_count() for byte in range(256)], np.uint8)


class _Rows(Checked):
    start: Tensor
    columns: int

    @property
    def rows(self) -> int:
        return self.start.numel() - 1


@dataclass(frozen=True)
class MaskedRows(_Rows):
    """A matrix `[rows, columns]` as bits and bf16 values.

    Args:
        start: int64 `[rows + 1]`; row r holds values start[r] .. start[r + 1].
        mask: uint32 `[rows, ceil(columns / 32)]`, lowest bit first.
        value: bf16, the kept values by rows, then 32 zeros so that whole vectors can be read.
        columns: of the matrix.

    Raises:
        InvalidArgument: its parts do not fit together.
    """

    start: Tensor
    mask: Tensor
    value: Tensor
    columns: int

    def fault(self) -> str:
        if fault := offsets_fault(self.start):
            return fault
        if not is_tensor(self.mask, torch.uint32, self.rows, -(-self.columns // WORD)):
            return "mask is not uint32 [rows, ceil(columns / 32)]"
        if not is_tensor(self.value, torch.bfloat16, int(self.start[-1]) + WORD):
            return "value is not bf16 [start[-1] + 32]"
        return _mask_fault(self.mask, self.start, self.columns)


@dataclass(frozen=True)
class IndexedRows(_Rows):
    """A matrix `[rows, columns]` as column indices and bf16 values.

    Args:
        start: int64 `[rows + 1]`, multiples of 16.
        column: uint16; each row is filled up with column 0.
        value: bf16; each row is filled up with zeros.
        columns: of the matrix.

    Raises:
        InvalidArgument: its parts do not fit together.
    """

    start: Tensor
    column: Tensor
    value: Tensor
    columns: int

    def fault(self) -> str:
        if fault := offsets_fault(self.start, every=16):
            return fault
        count = int(self.start[-1])
        if not is_tensor(self.column, torch.uint16, count):
            return "column is not uint16 [start[-1]]"
        if not is_tensor(self.value, torch.bfloat16, count):
            return "value is not bf16 [start[-1]]"
        if count and int(self.column.numpy().max()) >= self.columns:
            return f"column names more than the {self.columns} that there are"
        return ""


@dataclass(frozen=True)
class IntegerRows(_Rows):
    """A matrix `[rows, columns]` as bits, 8-bit integers and scales.

    Args:
        start: int64 `[rows + 1]`.
        mask: uint64 `[rows, 2 ceil(columns / 128)]`, lowest bit first.
        value: int8, the kept values by rows, then 64 zeros.
        scale: fp32 `[rows, ceil(columns / 128)]`; weight = scale * value.
        columns: of the matrix.

    Raises:
        InvalidArgument: its parts do not fit together.
    """

    start: Tensor
    mask: Tensor
    value: Tensor
    scale: Tensor
    columns: int

    def fault(self) -> str:
        if fault := offsets_fault(self.start):
            return fault
        groups = -(-self.columns // GROUP)
        if not is_tensor(self.mask, torch.uint64, self.rows, groups * GROUP // WIDE):
            return "mask is not uint64 [rows, 2 ceil(columns / 128)]"
        if not is_tensor(self.value, torch.int8, int(self.start[-1]) + WIDE):
            return "value is not int8 [start[-1] + 64]"
        if not is_tensor(self.scale, torch.float32, self.rows, groups):
            return "scale is not fp32 [rows, ceil(columns / 128)]"
        return _mask_fault(self.mask, self.start, self.columns)


Packed = MaskedRows | IndexedRows | IntegerRows


def _mask_fault(mask: Tensor, start: Tensor, columns: int) -> str:
    """Every row has as many bits as values, all of them in its columns."""
    if not mask.numel():
        return "start counts values of no columns" if int(start[-1]) else ""
    held = np.ascontiguousarray(mask.numpy()).view(np.uint8).reshape(mask.shape[0], -1)
    if not np.array_equal(_BITS_OF_BYTE[held].sum(1), start.diff().numpy()):
        return "mask has other numbers of bits than start counts"
    inside = np.packbits(np.arange(held.shape[1] * 8) < columns, bitorder="little")
    return "mask has bits past the last column" if (held & ~inside).any() else ""
