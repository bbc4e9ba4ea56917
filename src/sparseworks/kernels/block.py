"""Y = activation(X W^T + b + residual) with a block-sparse W in bf16.

Kept blocks are whole; a dense matrix keeps them all. The packed matrix is cut into strips of 32
rows where both halves of every strip keep the same blocks, else of 16, and stores pairs of columns
beside each other, as AVX-512 BF16 multiplies them. Without that extension the same layout is
multiplied in fp32. x is rounded to bf16, sums are fp32 (AVX-512 BF16 takes subnormal numbers as
zero). AMX tiles are not used, also where the processor has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseworks.core.errors import PatternError
from sparseworks.kernels.epilogue import dense_product, product
from sparseworks.kernels.packing import Checked, is_tensor, offsets, offsets_fault, to_pack

__all__ = ["BlockRows", "block_product", "block_product_reference", "pack_blocks", "unpack_blocks"]

_UNIT = 16  # rows and columns of the smallest block


@dataclass(frozen=True)
class BlockRows(Checked):
    """A matrix `[rows, columns]` as kept blocks of `height` rows and 16 columns.

    Args:
        start: int64 `[strips + 1]`; strip s holds blocks start[s] .. start[s + 1].
        column: uint16 per block, in units of 16 columns, ascending in each strip.
        value: bf16 `[blocks, 8, height, 2]`: pairs of columns, then rows.
        rows, columns: of the matrix; blocks reach over its edges with zeros.
        block: the pattern's own blocks, rows and columns.

    Raises:
        InvalidArgument: its parts do not fit together.
    """

    start: Tensor
    column: Tensor
    value: Tensor
    rows: int
    columns: int
    block: tuple[int, int]

    def fault(self) -> str:
        if fault := offsets_fault(self.start):
            return fault
        blocks = int(self.start[-1])
        if not is_tensor(self.column, torch.uint16, blocks):
            return "column is not uint16 [start[-1]]"
        shapes = [(blocks, _UNIT // 2, height, 2) for height in (_UNIT, 2 * _UNIT)]
        if not any(is_tensor(self.value, torch.bfloat16, *shape) for shape in shapes):
            return "value is not bf16 [start[-1], 8, 16 or 32, 2]"
        if self.start.numel() - 1 != -(-self.rows // self.height):
            return f"start does not count strips of {self.height} of {self.rows} rows"
        if blocks and int(self.column.numpy().max()) * _UNIT >= self.columns:
            return f"column names blocks past the {self.columns} columns"
        return ""

    @property
    def height(self) -> int:
        return self.value.shape[2]

    @property
    def density(self) -> float:
        """Share of the matrix (filled up to whole blocks) that is multiplied."""
        units = -(-self.columns // _UNIT)
        return self.column.numel() / max(1, units * (self.start.numel() - 1))


def pack_blocks(
    weight: Tensor, mask: Tensor | None = None, block: tuple[int, int] = (16, 32)
) -> BlockRows:
    """Pack a matrix, rounded to bf16: every block that holds an entry of `mask` (without one: a
    non-zero). Entries of a kept block outside the mask are zero.

    Raises:
        PatternError: a block that is not a multiple of 16 x 16, or more than 2^20 columns.
        InvalidArgument: not a matrix, a mask of another shape, or weights that are not finite.
    """
    if min(block) < 1 or block[0] % _UNIT or block[1] % _UNIT:
        raise PatternError(f"blocks are multiples of 16 x 16, not {block[0]} x {block[1]}")
    dense, kept = to_pack(weight, mask, torch.bfloat16, "pack_blocks takes a matrix")
    rows, columns = dense.shape
    if columns > _UNIT << 16:
        raise PatternError(f"{columns} columns do not fit 16-bit indices of blocks")
    dense = torch.where(kept, dense, torch.zeros((), dtype=dense.dtype))
    high, wide = block[0] // _UNIT, block[1] // _UNIT
    blocks = _filled(kept, *block).view(-(-rows // block[0]), block[0], -1, block[1])
    grid = blocks.any(3).any(1).repeat_interleave(high, 0).repeat_interleave(wide, 1)
    strips, units = -(-rows // _UNIT), -(-columns // _UNIT)
    grid = grid[:strips, :units]
    if strips % 2:  # the half strip beyond the edge may keep what its other half keeps
        grid = torch.cat([grid, grid[-1:]])
    tall = strips > 1 and torch.equal(grid[0::2], grid[1::2])
    height = 2 * _UNIT if tall else _UNIT
    grid = grid[0::2] if tall else grid[:strips]
    full = _filled(dense, height, _UNIT).view(-1, height, units, _UNIT).transpose(1, 2)
    value = full[grid].view(-1, height, _UNIT // 2, 2).transpose(1, 2).contiguous()
    column = grid.nonzero()[:, 1].to(torch.uint16)
    return BlockRows(offsets(grid.sum(1)), column, value, rows, columns, block)


def unpack_blocks(packed: BlockRows) -> Tensor:
    """The dense bf16 matrix; the inverse of `pack_blocks` but for its rounding."""
    strips, units = packed.start.numel() - 1, -(-packed.columns // _UNIT)
    full = torch.zeros(strips, units, packed.height, _UNIT, dtype=torch.bfloat16)
    strip = torch.repeat_interleave(torch.arange(strips), packed.start.diff())
    full[strip, packed.column.long()] = packed.value.transpose(1, 2).flatten(2)
    dense = full.transpose(1, 2).reshape(strips * packed.height, units * _UNIT)
    return dense[: packed.rows, : packed.columns].contiguous()


def block_product_reference(
    packed: BlockRows,
    x: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The same product through a dense fp32 matrix in torch."""
    return dense_product(unpack_blocks(packed), x, bias, activation, residual, dtype)


def block_product(
    packed: BlockRows,
    x: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
    threads: int | None = None,
) -> Tensor:
    """Y = activation(X W^T + b + residual).

    Args:
        packed: W.
        x: `[..., columns]` fp32 or bf16; fp32 is rounded to bf16.
        bias: `[rows]` fp32.
        activation: "none", "relu", "gelu", "gelu_tanh", "silu", ...
        residual: `[..., rows]` in the dtype of the result.
        dtype: of the result, fp32 or bf16; None: as x.
        threads: None: as many as torch uses.

    Returns:
        `[..., rows]`.

    Raises:
        InvalidArgument: shapes, dtypes or activations that do not fit.
    """

    def run(native: Any, *given: Any) -> None:
        native.block(packed.start, packed.column, packed.value.view(torch.uint16), *given)

    return product(
        "block_product", packed, unpack_blocks, run, x, bias, activation, residual, dtype, threads
    )


def _filled(matrix: Tensor, height: int, width: int) -> Tensor:
    """With zeros up to whole blocks."""
    rows, columns = matrix.shape
    return torch.nn.functional.pad(matrix, (0, -columns % width, 0, -rows % height))
