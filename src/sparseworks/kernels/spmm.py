"""Y = X W^T + b with a sparse W in fp32: compressed rows with 16-bit column indices.

The native kernel transposes tiles of 64 tokens to [columns][tokens], so that a kept weight is one
broadcast times a run of tokens, holds the accumulators of two rows in registers, and writes whole
lines. A kept weight takes 6 bytes; a matrix may have at most 65,536 columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseworks.core.errors import InvalidArgument, PatternError
from sparseworks.kernels.native import instruction_set, module

__all__ = ["SparseRows", "pack_rows", "spmm", "spmm_reference", "unpack_rows"]

_MAX_COLUMNS = 1 << 16


@dataclass(frozen=True)
class SparseRows:
    """A matrix `[rows, columns]` by rows.

    Args:
        start: int64 `[rows + 1]`; row r holds entries start[r] .. start[r + 1].
        column: uint16 per entry, ascending in each row.
        value: fp32 per entry.
        columns: of the matrix.
    """

    start: Tensor
    column: Tensor
    value: Tensor
    columns: int

    @property
    def rows(self) -> int:
        return self.start.numel() - 1

    @property
    def nnz(self) -> int:
        return self.value.numel()


def pack_rows(weight: Tensor, mask: Tensor | None = None) -> SparseRows:
    """Pack a matrix: the entries of `mask`, or the non-zeros where there is none.

    Raises:
        PatternError: more than 65,536 columns.
        InvalidArgument: not a matrix, or not finite.
    """
    if weight.ndim != 2:
        raise InvalidArgument(f"pack_rows takes a matrix, not shape {list(weight.shape)}")
    if weight.shape[1] > _MAX_COLUMNS:
        raise PatternError(f"{weight.shape[1]} columns do not fit 16-bit indices")
    dense = weight.detach().float().cpu()
    if not bool(torch.isfinite(dense).all()):
        raise InvalidArgument("the weights are not finite")
    kept = dense != 0 if mask is None else mask.cpu()
    start = torch.zeros(dense.shape[0] + 1, dtype=torch.int64)
    start[1:] = kept.sum(1).cumsum(0)
    column = kept.nonzero()[:, 1].to(torch.uint16)
    return SparseRows(start, column, dense[kept].contiguous(), dense.shape[1])


def unpack_rows(packed: SparseRows) -> Tensor:
    """The dense fp32 matrix; the inverse of `pack_rows`."""
    dense = torch.zeros(packed.rows, packed.columns)
    row = torch.repeat_interleave(torch.arange(packed.rows), packed.start.diff())
    dense[row, packed.column.long()] = packed.value
    return dense


def spmm_reference(packed: SparseRows, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same product through a dense matrix in torch."""
    return torch.nn.functional.linear(x, unpack_rows(packed), bias)


def spmm(
    packed: SparseRows, x: Tensor, bias: Tensor | None = None, threads: int | None = None
) -> Tensor:
    """Y = X W^T + b.

    Args:
        packed: W.
        x: `[..., columns]` fp32.
        bias: `[rows]` fp32.
        threads: None: as many as torch uses.

    Returns:
        `[..., rows]` fp32.

    Raises:
        InvalidArgument: shapes or dtypes that do not fit.
    """
    if x.shape[-1] != packed.columns or x.dtype != torch.float32:
        raise InvalidArgument(
            f"spmm: x is {x.dtype} [..., {x.shape[-1]}], the matrix takes fp32 "
            f"[..., {packed.columns}]"
        )
    native = module()
    if native is None or x.device.type != "cpu":
        return spmm_reference(packed, x, bias)
    instruction_set()  # refuses a forced set that is not there
    flat = x.detach().reshape(-1, packed.columns).contiguous()
    y = torch.empty(flat.shape[0], packed.rows)
    native.spmm(
        packed.start,
        packed.column,
        packed.value,
        flat,
        None if bias is None else bias.detach(),
        y,
        torch.get_num_threads() if threads is None else threads,
    )
    return y.view(*x.shape[:-1], packed.rows)
