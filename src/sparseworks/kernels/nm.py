"""Y = activation(X W^T + b + residual) with at most N kept of every M columns, M = 2, 4, 8 or 16.

16 rows lie side by side: for each slot of a group of columns, 16 values and 16 positions of 2 bits
(fp32, M = 4) or 4. The group's activations are broadcast and a permutation gives every row its own,
so that a single vector x and a batch use the same layout. With fp32 values everything is fp32; bf16
values are kept as pairs for AVX-512 BF16, x is rounded to bf16 and sums are fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseworks.core.errors import InvalidArgument, PatternError
from sparseworks.kernels.epilogue import dense_product, product
from sparseworks.kernels.packing import Checked, is_tensor, to_pack

__all__ = ["GroupedRows", "nm_product", "nm_product_reference", "pack_nm", "unpack_nm"]

_LANES = 16
_TOP_OF_FIELDS = -0x77777778  # the highest bit of every four


@dataclass(frozen=True)
class GroupedRows(Checked):
    """A matrix `[rows, columns]` in strips of 16 rows and groups of `width` columns.

    Args:
        value: fp32 `[strips, groups, slots, 16]`, or bf16 `[strips, groups, slots, 16, 2]`.
        position: uint32 `[strips, groups, slots, words]`: where in its group a value lies, 2 bits
            a value (width 4), else 4 bits; neighbouring values lie in different words.
        width: columns of a group: M, or a few joined groups of the pattern.
        rows, columns: of the matrix.
        pattern: N, M.

    Raises:
        InvalidArgument: its parts do not fit together.
    """

    value: Tensor
    position: Tensor
    width: int
    rows: int
    columns: int
    pattern: tuple[int, int]

    def fault(self) -> str:
        half = self.value.ndim == 5
        if self.width not in ((8, 16) if half else (4, 8, 16)):
            return f"no groups of {self.width} columns"
        slots = self.slots
        lead = (-(-self.rows // _LANES), -(-self.columns // self.width), slots)
        lanes = (_LANES, 2) if half else (_LANES,)
        if not is_tensor(self.value, torch.bfloat16 if half else torch.float32, *lead, *lanes):
            return "value does not fit the rows, columns and width"
        words = 4 if half else 1 if self.width == 4 else 2
        if not 1 <= slots <= self.width or not is_tensor(self.position, torch.uint32, *lead, words):
            return "position does not fit the rows, columns and width"
        # four bits can name 16 columns, the others hold no more than there are
        outside = self.width == 8 and (self.position.view(torch.int32) & _TOP_OF_FIELDS).any()
        return "position names columns outside a group" if outside else ""

    @property
    def slots(self) -> int:
        return self.value.shape[2]


def pack_nm(
    weight: Tensor,
    mask: Tensor | None = None,
    pattern: tuple[int, int] = (2, 4),
    dtype: torch.dtype = torch.float32,
) -> GroupedRows:
    """Pack a matrix: the entries of `mask`, or the non-zeros without one.

    Args:
        weight: `[rows, columns]`; groups are M neighbouring columns, the last one may be short.
        mask: of the same shape.
        pattern: N, M.
        dtype: of the values, fp32 or bf16 (rounded).

    Raises:
        PatternError: M is not 2, 4, 8 or 16, N is not 1 .. M, or a group keeps more than N.
        InvalidArgument: not a matrix, a mask of another shape, another dtype, or weights that are
            not finite.
    """
    n, m = pattern
    if m not in (2, 4, 8, 16) or not 1 <= n <= m:
        raise PatternError(f"N:M needs M = 2, 4, 8 or 16 and 1 <= N <= M, not {n}:{m}")
    if dtype not in (torch.float32, torch.bfloat16):
        raise InvalidArgument(f"values are fp32 or bf16, not {dtype}")
    half = dtype == torch.bfloat16
    dense, kept = to_pack(weight, mask, dtype, "pack_nm takes a matrix")
    rows, columns = dense.shape
    width = max(m, 8 if half else 4)
    fill = (0, -columns % width, 0, -rows % _LANES)
    dense = torch.nn.functional.pad(dense, fill)
    kept = torch.nn.functional.pad(kept, fill)
    counts = kept.view(dense.shape[0], -1, m).sum(2)
    if counts.numel() and int(counts.max()) > n:
        row, group = divmod(int(counts.argmax()), counts.shape[1])
        raise PatternError(
            f"row {row} keeps {int(counts.max())} of columns {group * m} .. {group * m + m - 1}, "
            f"more than {n}:{m} allows; project the mask onto the pattern first"
        )
    slots = n * (width // m)
    kept = kept.view(dense.shape[0], -1, width)
    order = (~kept).to(torch.uint8).argsort(dim=2, stable=True)[:, :, :slots]
    value = torch.where(kept, dense.view(kept.shape), torch.zeros((), dtype=dtype)).gather(2, order)
    if half and slots % 2:
        value = torch.nn.functional.pad(value, (0, 1))
        order = torch.nn.functional.pad(order, (0, 1))
    pair = 2 if half else 1
    shape = (dense.shape[0] // _LANES, _LANES, kept.shape[1], value.shape[2] // pair, pair)
    value = value.view(shape).permute(0, 2, 3, 1, 4).contiguous()
    order = order.view(shape).permute(0, 2, 3, 1, 4).contiguous().flatten(3)
    return GroupedRows(
        value if half else value.squeeze(4),
        _positions(order, width, half),
        width,
        rows,
        columns,
        pattern,
    )


def unpack_nm(packed: GroupedRows) -> Tensor:
    """The dense matrix in the dtype of the values; the inverse of `pack_nm`."""
    strips, groups, slots = packed.value.shape[:3]
    half = packed.value.ndim == 5
    order = _unpositions(packed.position, packed.width, half)
    value = packed.value.flatten(3)
    pair = 2 if half else 1
    shape = (strips, groups, slots, _LANES, pair)
    lay = (0, 3, 1, 2, 4)
    order = order.view(shape).permute(lay).flatten(3)
    value = value.view(shape).permute(lay).flatten(3)
    dense = torch.zeros(strips, _LANES, groups, packed.width, dtype=value.dtype)
    dense.scatter_add_(3, order, value)
    dense = dense.reshape(strips * _LANES, groups * packed.width)
    return dense[: packed.rows, : packed.columns].contiguous()


def nm_product_reference(
    packed: GroupedRows,
    x: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The same product through a dense fp32 matrix in torch."""
    return dense_product(unpack_nm(packed), x, bias, activation, residual, dtype)


def nm_product(
    packed: GroupedRows,
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
        x: `[..., columns]` fp32 or bf16; with bf16 values it is rounded to bf16.
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
        half = packed.value.dtype == torch.bfloat16
        value = packed.value.view(-1)
        (native.nm_bf16 if half else native.nm_fp32)(
            value.view(torch.uint16) if half else value,
            packed.position.view(-1),
            packed.width,
            packed.slots,
            *given,
        )

    return product(
        "nm_product", packed, unpack_nm, run, x, bias, activation, residual, dtype, threads
    )


def _fields(width: int, half: bool) -> tuple[int, int]:
    """How many words hold the positions of a slot, and how many bits each has."""
    if half:
        return 8, 16
    return (1, 32) if width == 4 else (2, 32)


def _positions(order: Tensor, width: int, half: bool) -> Tensor:
    """Pack positions `[..., values]`: value v in word v % words at field v // words."""
    words, bits = _fields(width, half)
    field = 2 if width == 4 else 4
    parts = order.view(*order.shape[:-1], -1, words)
    shifts = field * torch.arange(parts.shape[-2]).unsqueeze(1)
    packed: Tensor = (parts << shifts).sum(-2)
    if bits == 16:
        packed = packed.view(*packed.shape[:-1], -1, 2)
        packed = packed[..., 0] + (packed[..., 1] << 16)
    return packed.to(torch.uint32)


def _unpositions(position: Tensor, width: int, half: bool) -> Tensor:
    """The inverse of `_positions`."""
    words, bits = _fields(width, half)
    field = 2 if width == 4 else 4
    packed = position.view(torch.int32).long() & 0xFFFFFFFF
    if bits == 16:
        packed = torch.stack([packed & 0xFFFF, packed >> 16], -1).flatten(-2)
    shifts = field * torch.arange(_LANES * (2 if half else 1) // words).unsqueeze(1)
    order: Tensor = (packed.unsqueeze(-2) >> shifts) & (2**field - 1)
    return order.flatten(-2)
