"""y = W[:, index] x[index] + b: a dense W, an x with few live entries.

W is stored by columns (transposed once), so that a dead entry of x costs nothing: its column is
never read. Sums are fp32 and take the columns in the order of the index, whatever the number of
threads. The tokens of a small batch share one index.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseworks.core.errors import InvalidArgument
from sparseworks.kernels.native import instruction_set, module
from sparseworks.kernels.packing import to_pack

__all__ = ["DenseColumns", "gathered", "gathered_reference", "pack_columns", "unpack_columns"]

_LANES = 32  # entries of a column are filled up to whole cache lines


@dataclass(frozen=True)
class DenseColumns:
    """A matrix `[rows, columns]` by columns.

    Args:
        value: fp32 or bf16 `[columns, pitch]`: the transposed matrix, filled up with zeros.
        rows: of the matrix.
    """

    value: Tensor
    rows: int

    @property
    def columns(self) -> int:
        return self.value.shape[0]


def pack_columns(weight: Tensor, mask: Tensor | None = None) -> DenseColumns:
    """Transpose a matrix once; `mask` (if any) is multiplied in.

    Args:
        weight: `[rows, columns]` fp32 or bf16, stored as it is.
        mask: of the same shape.

    Raises:
        InvalidArgument: not a matrix, another dtype, a mask of another shape, or weights that are
            not finite.
    """
    if weight.ndim != 2 or weight.dtype not in (torch.float32, torch.bfloat16):
        raise InvalidArgument(
            f"pack_columns takes a matrix in fp32 or bf16, not {weight.dtype} {list(weight.shape)}"
        )
    dense, kept = to_pack(weight, mask, weight.dtype, "pack_columns takes a matrix")
    if mask is not None:
        dense = torch.where(kept, dense, torch.zeros((), dtype=dense.dtype))
    rows, columns = dense.shape
    value = torch.zeros(columns, -(-rows // _LANES) * _LANES, dtype=dense.dtype)
    value[:, :rows] = dense.t()
    return DenseColumns(value, rows)


def unpack_columns(packed: DenseColumns) -> Tensor:
    """The matrix `[rows, columns]` in its dtype; the inverse of `pack_columns`."""
    return packed.value[:, : packed.rows].t().contiguous()


def gathered_reference(
    packed: DenseColumns, x: Tensor, index: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The same product in torch."""
    live = packed.value[index, : packed.rows].float()
    y = x[..., index].float() @ live
    return y if bias is None else y + bias


def gathered(
    packed: DenseColumns,
    x: Tensor,
    index: Tensor | None = None,
    bias: Tensor | None = None,
    threads: int | None = None,
) -> Tensor:
    """y = W[:, index] x[index] + b.

    Args:
        packed: W.
        x: `[..., columns]` fp32.
        index: int64 `[live]`, which columns count (one that is named twice counts twice). None:
            those where some token of x is not zero.
        bias: `[rows]` fp32.
        threads: None: as many as torch uses.

    Returns:
        `[..., rows]` fp32.

    Raises:
        InvalidArgument: shapes, dtypes or indices that do not fit.
    """
    if x.ndim == 0 or x.shape[-1] != packed.columns or x.dtype != torch.float32:
        raise InvalidArgument(
            f"gathered: x is {x.dtype} {list(x.shape)}, the matrix takes fp32 "
            f"[..., {packed.columns}]"
        )
    if bias is not None and (bias.shape != (packed.rows,) or bias.dtype != torch.float32):
        raise InvalidArgument(
            f"gathered: the bias is {bias.dtype} {list(bias.shape)}, not fp32 [{packed.rows}]"
        )
    flat = x.detach().reshape(-1, packed.columns).contiguous()
    if index is None:
        index = (flat != 0).any(0).nonzero().squeeze(1)
    if index.ndim != 1 or index.dtype != torch.int64:
        raise InvalidArgument(
            f"gathered: the index is {index.dtype} {list(index.shape)}, not int64 [live]"
        )
    native = module()
    if native is None or x.device.type != "cpu":
        return gathered_reference(packed, x, index, bias)
    instruction_set()  # refuses a forced set that is not there
    y = torch.empty(flat.shape[0], packed.rows)
    half = packed.value.dtype == torch.bfloat16
    try:
        (native.gathered_bf16 if half else native.gathered_fp32)(
            packed.value.view(torch.uint16) if half else packed.value,
            index.contiguous(),
            flat,
            None if bias is None else bias.detach().contiguous(),
            y,
            torch.get_num_threads() if threads is None else threads,
        )
    except ValueError as error:
        raise InvalidArgument(str(error)) from None
    return y.view(*x.shape[:-1], packed.rows)
