"""y = W x + b for one vector x, with a sparse W: a bit per column and packed bf16 values.

Sums are fp32. A kept weight takes 2 bytes and every weight one bit; with AVX-512 VBMI2 32 columns
are expanded at once, elsewhere a portable loop walks the bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseworks.core.errors import InvalidArgument
from sparseworks.kernels.native import instruction_set, module

__all__ = ["MaskedRows", "pack_mask", "spmv", "spmv_reference", "unpack_mask"]

_WORD = 32


@dataclass(frozen=True)
class MaskedRows:
    """A matrix `[rows, columns]` as bits and values.

    Args:
        start: int64 `[rows + 1]`; row r holds values start[r] .. start[r + 1].
        mask: uint32 `[rows, ceil(columns / 32)]`, lowest bit first.
        value: bf16, the kept values by rows, then 32 zeros so that whole vectors can be read.
        columns: of the matrix.
    """

    start: Tensor
    mask: Tensor
    value: Tensor
    columns: int

    @property
    def rows(self) -> int:
        return self.start.numel() - 1


def pack_mask(weight: Tensor, mask: Tensor | None = None) -> MaskedRows:
    """Pack a matrix, rounded to bf16: the entries of `mask`, or the non-zeros without one.

    Raises:
        InvalidArgument: not a matrix, a mask of another shape, or weights that are not finite.
    """
    if weight.ndim != 2:
        raise InvalidArgument(f"pack_mask takes a matrix, not shape {list(weight.shape)}")
    if mask is not None and mask.shape != weight.shape:
        raise InvalidArgument(f"the mask is {list(mask.shape)}, the matrix {list(weight.shape)}")
    dense = weight.detach().cpu().to(torch.bfloat16)
    if not bool(torch.isfinite(dense).all()):
        raise InvalidArgument("the weights are not finite in bf16")
    kept = dense != 0 if mask is None else mask.cpu().bool()
    rows, columns = dense.shape
    start = torch.zeros(rows + 1, dtype=torch.int64)
    start[1:] = kept.sum(1).cumsum(0)
    words = -(-columns // _WORD)
    bits = torch.nn.functional.pad(kept, (0, words * _WORD - columns)).view(rows, words, _WORD)
    packed = (bits.long() << torch.arange(_WORD)).sum(2).to(torch.uint32)
    value = torch.cat([dense[kept], torch.zeros(_WORD, dtype=torch.bfloat16)])
    return MaskedRows(start, packed, value, columns)


def unpack_mask(packed: MaskedRows) -> Tensor:
    """The dense bf16 matrix; the inverse of `pack_mask`."""
    bits = (packed.mask.long().unsqueeze(2) >> torch.arange(_WORD)) & 1
    kept = bits.flatten(1)[:, : packed.columns].bool()
    dense = torch.zeros(kept.shape, dtype=torch.bfloat16)
    dense[kept] = packed.value[:-_WORD]
    return dense


def spmv_reference(packed: MaskedRows, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same product through a dense fp32 matrix in torch."""
    return torch.nn.functional.linear(x, unpack_mask(packed).float(), bias)


def spmv(
    packed: MaskedRows, x: Tensor, bias: Tensor | None = None, threads: int | None = None
) -> Tensor:
    """y = W x + b.

    Args:
        packed: W.
        x: `[columns]` fp32.
        bias: `[rows]` fp32.
        threads: None: as many as torch uses.

    Returns:
        `[rows]` fp32.

    Raises:
        InvalidArgument: shapes or dtypes that do not fit.
    """
    if x.shape != (packed.columns,) or x.dtype != torch.float32:
        raise InvalidArgument(
            f"spmv: x is {x.dtype} {list(x.shape)}, the matrix takes fp32 [{packed.columns}]"
        )
    native = module()
    if native is None or x.device.type != "cpu":
        return spmv_reference(packed, x, bias)
    instruction_set()  # refuses a forced set that is not there
    y = torch.empty(packed.rows)
    native.spmv(
        packed.start,
        packed.mask,
        packed.value.view(torch.uint16),
        x.detach().contiguous(),
        None if bias is None else bias.detach(),
        y,
        torch.get_num_threads() if threads is None else threads,
    )
    return y
