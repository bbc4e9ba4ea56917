"""Kernels that skip zeros: one op per file, the torch reference beside the native fast path."""

from sparseworks.kernels.native import available, instruction_set
from sparseworks.kernels.spmm import SparseRows, pack_rows, spmm, spmm_reference, unpack_rows

__all__ = [
    "SparseRows",
    "available",
    "instruction_set",
    "pack_rows",
    "spmm",
    "spmm_reference",
    "unpack_rows",
]
