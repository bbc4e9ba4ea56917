"""Consecutive outputs that share their inputs: what a SIMD kernel runs with one load per input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.patterns.base import Pattern, required
from sparseworks.core.selection import keep_top, keep_top_per_row

__all__ = ["SharedInputs"]


@dataclass(frozen=True)
class SharedInputs(Pattern):
    """Groups of `size` consecutive rows keep the same columns; a unit is one column of a group.

    Unlike `Block(size, 1)` the last group may be short, and every group can be made to keep equally
    many columns (equal work for threads that share the groups). A unit of a short group counts as
    one like any other: it takes as long to run, and its smaller sum lets it go first.

    Args:
        size: rows in a group; the last group has what is left.
        balanced: the numbers of units that groups keep differ by at most 1.
    """

    size: int
    balanced: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InvalidArgument(f"pattern {self}: a group has at least 1 row")

    def __str__(self) -> str:
        return f"shared{self.size}" + ("-balanced" if self.balanced else "")

    def groups(self, rows: int) -> int:
        """Groups in a matrix of so many rows."""
        return -(-rows // self.size)

    def units(self, shape: Sequence[int]) -> int:
        return self.groups(shape[0]) * shape[1]

    def pool(self, scores: Tensor) -> Tensor:
        rows, columns = scores.shape
        full = F.pad(scores.float(), (0, 0, 0, -rows % self.size))
        return full.view(self.groups(rows), self.size, columns).sum(1)

    def select(self, scores: Tensor, keep: int | None = None) -> Tensor:
        keep, pooled = required(self, keep), self.pool(scores)
        if self.balanced:
            kept = _balanced(pooled, keep)
        else:
            kept = keep_top(pooled, keep)
        return kept.repeat_interleave(self.size, 0)[: len(scores)]


def _balanced(pooled: Tensor, keep: int) -> Tensor:
    """floor(keep / groups) of every group, then the best of what comes next in each."""
    each, rest = divmod(keep, len(pooled))
    kept = keep_top_per_row(pooled, each)
    if rest:
        following = keep_top_per_row(pooled, each + 1) & ~kept
        best = pooled.masked_fill(~following, -torch.inf).amax(1)
        kept |= following & keep_top(best, rest)[:, None]
    return kept
