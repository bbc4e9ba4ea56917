"""What packing a matrix starts with, whatever the layout, and what every packed matrix promises."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparseworks.core.errors import InvalidArgument

__all__ = ["Checked", "is_tensor", "offsets", "offsets_fault", "to_pack"]


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


class Checked:
    """Base of packed matrices.

    Native code follows their offsets and positions without another look, so that one that is made
    by hand, copied or unpickled is checked once, here.

    Raises:
        InvalidArgument: its parts do not fit together.
    """

    def __post_init__(self) -> None:
        if fault := self.fault():
            raise InvalidArgument(f"{type(self).__name__}: {fault}; pack the matrix again")

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    def fault(self) -> str:
        """What does not fit, "" where all does."""
        raise NotImplementedError


def is_tensor(value: Any, dtype: torch.dtype, *shape: int) -> bool:
    """Whether a part is a tensor of this dtype and shape."""
    return isinstance(value, Tensor) and value.dtype == dtype and tuple(value.shape) == shape


def offsets_fault(start: Any, every: int = 1) -> str:
    """Why `start` is not what `offsets` makes of some counts, all multiples of `every`; or ""."""
    if not isinstance(start, Tensor) or start.dtype != torch.int64 or start.ndim != 1:
        return "start is not int64 [rows + 1]"
    if not len(start) or int(start[0]) != 0 or bool((start.diff() < 0).any()):
        return "start does not rise from 0"
    return f"start has no multiples of {every}" if bool((start % every != 0).any()) else ""
