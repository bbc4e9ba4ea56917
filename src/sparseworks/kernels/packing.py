"""What packing a matrix starts with, whatever the layout."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseworks.core.errors import InvalidArgument

__all__ = ["offsets", "to_pack"]


def to_pack(
    weight: Tensor, mask: Tensor | None, dtype: torch.dtype, not_a_matrix: str
) -> tuple[Tensor, Tensor]:
    """The matrix on the CPU in `dtype`, and what is kept: `mask`, or without one the non-zeros.

    Args:
        weight: `[rows, columns]`.
        mask: of the same shape.
        dtype: to which the values are rounded.
        not_a_matrix: what to say before the shape of a weight that is none.

    Raises:
        InvalidArgument: not a matrix, a mask of another shape, or weights that are not finite.
    """
    if weight.ndim != 2:
        raise InvalidArgument(f"{not_a_matrix}, not shape {list(weight.shape)}")
    if mask is not None and mask.shape != weight.shape:
        raise InvalidArgument(f"the mask is {list(mask.shape)}, the matrix {list(weight.shape)}")
    dense = weight.detach().cpu().to(dtype)
    if not bool(torch.isfinite(dense).all()):
        raise InvalidArgument(f"the weights are not finite in {str(dtype).split('.')[1]}")
    return dense, dense != 0 if mask is None else mask.cpu().bool()


def offsets(counts: Tensor) -> Tensor:
    """Where each row's share begins, and the end of the last: int64 `[rows + 1]`."""
    start = torch.zeros(counts.numel() + 1, dtype=torch.int64)
    start[1:] = counts.cumsum(0)
    return start
