"""The highest scores of a tensor or of every row, by bisection in the cache.

The reference is in `core.selection`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseworks.core.selection import keep_top, keep_top_per_row
from sparseworks.kernels.native import module

__all__ = ["keep_largest", "keep_largest_per_row"]


def keep_largest(scores: Tensor, keep: int) -> Tensor:
    """Bool mask of the `keep` highest scores of the whole tensor: `keep_top`, for tensors that fit
    into a cache.

    Raises:
        InvalidArgument: NaN scores, `keep` out of range, or fewer eligible scores than `keep`.
    """
    mask = _native(scores, 1, scores.numel(), keep)
    return keep_top(scores, keep) if mask is None else mask


def keep_largest_per_row(scores: Tensor, keep: int) -> Tensor:
    """Bool mask `[rows, columns]` of the `keep` highest scores of every row: `keep_top_per_row`.

    Raises:
        InvalidArgument: NaN scores, `keep` out of range, or a row with fewer eligible scores.
    """
    mask = _native(scores, scores.shape[0], scores.shape[1], keep)
    return keep_top_per_row(scores, keep) if mask is None else mask


def _native(scores: Tensor, rows: int, columns: int, keep: int) -> Tensor | None:
    """The mask; None where this cannot be, or where there is something to complain about."""
    native = module()
    fits = scores.device.type == "cpu" and scores.dtype == torch.float32 and scores.is_contiguous()
    if native is None or not fits or not 0 <= keep <= columns:
        return None
    mask = torch.empty(scores.shape, dtype=torch.bool)
    threads = torch.get_num_threads()
    done = native.keep_largest(scores.data_ptr(), mask.data_ptr(), rows, columns, keep, threads)
    return mask if done else None
