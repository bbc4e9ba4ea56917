"""Columns removed from left to right, each compensated by those after it.

For each row w of a matrix, with upper triangular U: for j = 0 .. n - 1

    e_j = (w_j - w'_j) / U_jj,  w_k -= e_j U_jk for k > j,

w'_j being w_j where the mask keeps it, else 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparseworks.kernels.native import module

__all__ = ["eliminate", "eliminate_reference"]

_SUB = 32


def eliminate_reference(
    values: Tensor,
    mask: Tensor,
    factor: Tensor,
    *,
    quantize: Callable[[Tensor], Tensor] | None = None,
    choose: Callable[[Tensor, int], Tensor] | None = None,
    width: int = 1,
) -> float:
    """The same in torch, one column at a time, contiguous; products bring in most of what is
    compensated, 32 columns together.

    Args:
        quantize: maps kept values `[rows]` onto a grid, whose error is compensated too.
        choose: `(values [width, rows], first column) -> mask` of the next `width` columns, which
            is written into `mask`.
    """
    work, kept = values.t().contiguous(), mask.t().contiguous()
    errors = torch.empty_like(work)
    size = len(work)
    sub = width * max(1, min(_SUB, size) // width)
    for first in range(0, size, sub):
        last = min(first + sub, size)
        for j in range(first, last):
            if choose is not None and j % width == 0:
                kept[j : j + width] = choose(work[j : j + width], j)
            new = work[j] * kept[j]
            if quantize is not None:
                new = quantize(new) * kept[j]
            error = torch.sub(work[j], new, out=errors[j]).div_(factor[j, j])
            work[j] = new
            if j + 1 < last:
                work[j + 1 : last].addr_(factor[j, j + 1 : last], error, alpha=-1.0)
        if last < size:
            work[last:].addmm_(factor[first:last, last:].t(), errors[first:last], alpha=-1.0)
    values.copy_(work.t())
    if choose is not None:
        mask.copy_(kept.t())
    return float(torch.linalg.vector_norm(errors)) ** 2


def eliminate(values: Tensor, mask: Tensor, factor: Tensor) -> float:
    """Remove what the mask does not keep, in place.

    Args:
        values: `[rows, n]`; w' when this returns.
        mask: bool `[rows, n]`.
        factor: U, upper triangular, `[n, n]`.

    Returns:
        The sum of the squares of all e_j.
    """
    native = module()
    fits = values.device.type == "cpu" and values.dtype == torch.float32
    if native is None or not fits or not (values.is_contiguous() and mask.is_contiguous()):
        return eliminate_reference(values, mask, factor)
    rows, n = values.shape
    lower = factor.t().contiguous()
    total: float = native.eliminate(
        values.data_ptr(), mask.data_ptr(), lower.data_ptr(), rows, n, torch.get_num_threads()
    )
    return total
