"""Kernels that skip zeros: one op per file, the torch reference beside the native fast path."""

from sparseworks.kernels.block import (
    BlockRows,
    block_product,
    block_product_reference,
    pack_blocks,
    unpack_blocks,
)
from sparseworks.kernels.gathered import (
    DenseColumns,
    gathered,
    gathered_reference,
    pack_columns,
    unpack_columns,
)
from sparseworks.kernels.native import available, has_amx, instruction_set
from sparseworks.kernels.nm import (
    GroupedRows,
    nm_product,
    nm_product_reference,
    pack_nm,
    unpack_nm,
)
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
    "BlockRows",
    "DenseColumns",
    "GroupedRows",
    "IndexedRows",
    "IntegerRows",
    "MaskedRows",
    "available",
    "block_product",
    "block_product_reference",
    "gathered",
    "gathered_reference",
    "has_amx",
    "instruction_set",
    "nm_product",
    "nm_product_reference",
    "pack_blocks",
    "pack_columns",
    "pack_index",
    "pack_integer",
    "pack_mask",
    "pack_nm",
    "spmv",
    "spmv_reference",
    "unpack",
    "unpack_blocks",
    "unpack_columns",
    "unpack_nm",
]
