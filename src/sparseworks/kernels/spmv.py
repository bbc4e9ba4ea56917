"""y = W x + b for one vector x (decoding), with a sparse W in one of three layouts (`rows`).

Sums are fp32. Where the processor multiplies bf16, x is split into two bf16 numbers (16 bits of
mantissa); with integers x keeps 15 bits of its largest entry.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseworks.core.errors import InvalidArgument, PatternError
from sparseworks.kernels.native import instruction_set, module
from sparseworks.kernels.packing import offsets, to_pack
from sparseworks.kernels.rows import (
    GROUP,
    WIDE,
    WORD,
    IndexedRows,
    IntegerRows,
    MaskedRows,
    Packed,
)

__all__ = ["IndexedRows", "IntegerRows", "MaskedRows", "pack_index", "pack_integer", "pack_mask",
           "spmv", "spmv_reference", "unpack"]  # fmt: skip

_MATRIX = "a matrix is packed"


def pack_mask(weight: Tensor, mask: Tensor | None = None) -> MaskedRows:
    """Pack a matrix, rounded to bf16: the entries of `mask`, or the non-zeros without one.

    Raises:
        InvalidArgument: not a matrix, a mask of another shape, or weights that are not finite.
    """
    dense, kept = to_pack(weight, mask, torch.bfloat16, _MATRIX)
    bits = _words(kept, WORD, WORD).to(torch.uint32)
    value = torch.cat([dense[kept], torch.zeros(WORD, dtype=torch.bfloat16)])
    return MaskedRows(offsets(kept.sum(1)), bits, value, dense.shape[1])


def pack_index(weight: Tensor, mask: Tensor | None = None) -> IndexedRows:
    """Pack a matrix, rounded to bf16, with 16-bit column indices.

    Raises:
        PatternError: more than 65,536 columns.
        InvalidArgument: as `pack_mask`.
    """
    dense, kept = to_pack(weight, mask, torch.bfloat16, _MATRIX)
    if dense.shape[1] > 1 << 16:
        raise PatternError(f"{dense.shape[1]} columns do not fit 16-bit indices")
    counts = kept.sum(1)
    start = offsets((counts + 15) // 16 * 16)
    row, found = kept.nonzero(as_tuple=True)
    first = offsets(counts)
    place = start[row] + torch.arange(row.numel()) - first[row]
    column = torch.zeros(int(start[-1]), dtype=torch.int32)
    value = torch.zeros(int(start[-1]), dtype=torch.bfloat16)
    column[place], value[place] = found.to(torch.int32), dense[row, found]
    return IndexedRows(start, column.to(torch.uint16), value, dense.shape[1])


def pack_integer(weight: Tensor, mask: Tensor | None = None) -> IntegerRows:
    """Pack a matrix in 8 bits: value = round(w / scale), scale = max |w| / 127 over 128 columns.

    Raises:
        InvalidArgument: as `pack_mask`.
    """
    dense, kept = to_pack(weight, mask, torch.float32, _MATRIX)
    rows, columns = dense.shape
    padded = torch.nn.functional.pad(dense, (0, -columns % GROUP))
    grouped = padded.view(rows, -1, GROUP)
    scale = grouped.abs().amax(2) / 127
    integers = (grouped / scale.clamp_min(1e-38)[:, :, None]).round().to(torch.int8)
    value = integers.view(rows, -1)[:, :columns][kept]
    bits = _words(kept, GROUP, WIDE).view(torch.uint64)
    value = torch.cat([value, torch.zeros(WIDE, dtype=torch.int8)])
    return IntegerRows(offsets(kept.sum(1)), bits, value, scale.contiguous(), columns)


def unpack(packed: Packed) -> Tensor:
    """The dense matrix, bf16 or (from integers) fp32; exact inverse of what was rounded."""
    if isinstance(packed, IndexedRows):
        wide = torch.zeros(packed.rows, packed.columns, dtype=torch.bfloat16)
        row = torch.repeat_interleave(torch.arange(packed.rows), packed.start.diff())
        kept = packed.value != 0
        wide[row[kept], packed.column.long()[kept]] = packed.value[kept]
        return wide
    word = WORD if isinstance(packed, MaskedRows) else WIDE
    held = packed.mask.view(torch.int32 if word == WORD else torch.int64).long()
    bits = (held.unsqueeze(2) >> torch.arange(word)) & 1
    kept = bits.flatten(1)[:, : packed.columns].bool()
    dense = torch.zeros(kept.shape, dtype=packed.value.dtype)
    dense[kept] = packed.value[:-word]
    if isinstance(packed, MaskedRows):
        return dense
    return dense.float() * packed.scale.repeat_interleave(GROUP, 1)[:, : packed.columns]


def spmv_reference(packed: Packed, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same product through a dense fp32 matrix in torch."""
    return torch.nn.functional.linear(x, unpack(packed).float(), bias)


def spmv(
    packed: Packed, x: Tensor, bias: Tensor | None = None, threads: int | None = None
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
    given = (
        x.detach().contiguous(),
        None if bias is None else bias.detach(),
        y,
        torch.get_num_threads() if threads is None else threads,
    )
    if isinstance(packed, MaskedRows):
        native.spmv_masked(packed.start, packed.mask, packed.value.view(torch.uint16), *given)
    elif isinstance(packed, IndexedRows):
        native.spmv_indexed(packed.start, packed.column, packed.value.view(torch.uint16), *given)
    else:
        native.spmv_integer(packed.start, packed.mask, packed.value, packed.scale, *given)
    return y


def _words(kept: Tensor, group: int, word: int) -> Tensor:
    """Bits `[rows, words]` as int64, columns filled up to a multiple of `group`."""
    rows, columns = kept.shape
    bits = torch.nn.functional.pad(kept, (0, -columns % group)).view(rows, -1, word)
    return (bits.long() << torch.arange(word)).sum(2)
