"""Kernels that skip zeros: one op per file, the torch reference beside the native fast path."""

from sparseworks.kernels.gathered import (
    DenseColumns,
    gathered,
    gathered_reference,
    pack_columns,
    unpack_columns,
)
from sparseworks.kernels.native import available, instruction_set
from sparseworks.kernels.spmm import SparseRows, pack_rows, spmm, spmm_reference, unpack_rows
from sparseworks.kernels.spmv import (
    IndexedRows,
    IntegerRows,
    MaskedRows,
    pack_index,
    pack_integer,
    pack_mask,
    spmv,
    spmv_reference,
    unpack,
)

__all__ = [
    "DenseColumns",
    "IndexedRows",
    "IntegerRows",
    "MaskedRows",
    "SparseRows",
    "available",
    "gathered",
    "gathered_reference",
    "instruction_set",
    "pack_columns",
    "pack_index",
    "pack_integer",
    "pack_mask",
    "pack_rows",
    "spmm",
    "spmm_reference",
    "spmv",
    "spmv_reference",
    "unpack",
    "unpack_columns",
    "unpack_rows",
]
