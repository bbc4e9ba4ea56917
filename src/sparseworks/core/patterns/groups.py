"""Patterns whose unit is a group of weights: blocks, rows and columns, arbitrary groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparseworks.core.errors import InvalidArgument, PatternError
from sparseworks.core.patterns.base import Pattern, required
from sparseworks.core.selection import keep_top

__all__ = ["Block", "Group", "IndexGroups"]


@dataclass(frozen=True)
class Block(Pattern):
    """Blocks of `h` outputs by `w` inputs live or die together."""

    h: int
    w: int

    def __post_init__(self) -> None:
        if self.h < 1 or self.w < 1:
            raise InvalidArgument(f"pattern {self}: block sides must be at least 1")

    def __str__(self) -> str:
        return f"block{self.h}x{self.w}"

    def check(self, shape: Sequence[int], run: int | None = None) -> None:
        run = shape[-1] if run is None else run
        if shape[0] % self.h or run % self.w:
            raise PatternError(
                f"pattern {self} needs a matrix [out, in] divisible by [{self.h}, {self.w}], "
                f"not [{shape[0]}, {run}]"
            )

    def units(self, shape: Sequence[int]) -> int:
        return (shape[0] // self.h) * (shape[1] // self.w)

    def pool(self, scores: Tensor) -> Tensor:
        self.check(scores.shape)
        rows, columns = scores.shape
        blocks = scores.reshape(rows // self.h, self.h, columns // self.w, self.w)
        return blocks.sum(dim=(1, 3), dtype=torch.float32)

    def select(self, scores: Tensor, keep: int | None = None) -> Tensor:
        kept = keep_top(self.pool(scores), required(self, keep))
        rows, columns = scores.shape
        wide = kept[:, None, :, None].expand(-1, self.h, -1, self.w)
        return wide.reshape(rows, columns)


@dataclass(frozen=True)
class Group(Pattern):
    """Whole rows or columns of the matrix, or equal slices of them.

    Args:
        axis: "rows" (output channels) or "columns" (input channels).
        size: consecutive rows or columns that form one unit (a head's width, say).
        stride: a unit is repeated every `stride` rows or columns and holds all of its repetitions:
            the taps of a convolution (columns), the gates of a recurrent layer (rows). 0: none.
    """

    axis: Literal["rows", "columns"] = "rows"
    size: int = 1
    stride: int = 0

    def __post_init__(self) -> None:
        if self.axis not in ("rows", "columns") or self.size < 1:
            raise InvalidArgument(
                f"group pattern axis={self.axis!r} size={self.size}: 'rows' or 'columns', size >= 1"
            )

    def __str__(self) -> str:
        return self.axis if self.size == 1 else f"{self.axis}{self.size}"

    def _extent(self, shape: Sequence[int]) -> int:
        return self.stride or shape[0 if self.axis == "rows" else 1]

    def check(self, shape: Sequence[int], run: int | None = None) -> None:
        extent = self._extent(shape)
        if extent % self.size or shape[0 if self.axis == "rows" else 1] % extent:
            raise PatternError(f"pattern {self}: {extent} {self.axis} do not divide by {self.size}")

    def units(self, shape: Sequence[int]) -> int:
        return self._extent(shape) // self.size

    def pool(self, scores: Tensor) -> Tensor:
        self.check(scores.shape)
        lines = scores.sum(dim=1 if self.axis == "rows" else 0, dtype=torch.float32)
        return lines.view(-1, self._extent(scores.shape)).sum(0).view(-1, self.size).sum(1)

    def select(self, scores: Tensor, keep: int | None = None) -> Tensor:
        lines = keep_top(self.pool(scores), required(self, keep)).repeat_interleave(self.size)
        rows, columns = scores.shape
        if self.axis == "rows":
            return lines.repeat(rows // lines.numel())[:, None].expand(rows, columns).clone()
        return lines.repeat(columns // lines.numel())[None, :].expand(rows, columns).clone()


@dataclass(frozen=True)
class IndexGroups(Pattern):
    """Arbitrary groups of weights, given by an integer label for every weight.

    Args:
        labels: nested tuples are not practical here, so this is a Tensor `[out, in]` of group
            numbers 0..G-1; -1 marks weights that are always kept.
    """

    labels: Tensor

    def __str__(self) -> str:
        return f"groups{self.units(self.labels.shape)}"

    def check(self, shape: Sequence[int], run: int | None = None) -> None:
        if tuple(shape) != tuple(self.labels.shape):
            raise PatternError(
                f"group labels have shape {list(self.labels.shape)}, the matrix {list(shape)}"
            )

    def units(self, shape: Sequence[int]) -> int:
        return int(self.labels.max()) + 1 if self.labels.numel() else 0

    def pool(self, scores: Tensor) -> Tensor:
        self.check(scores.shape)
        free = self.labels >= 0
        pooled = torch.zeros(self.units(scores.shape), dtype=torch.float32, device=scores.device)
        return pooled.index_add_(0, self.labels[free].long(), scores[free].float())

    def select(self, scores: Tensor, keep: int | None = None) -> Tensor:
        kept = keep_top(self.pool(scores), required(self, keep))
        return torch.where(self.labels >= 0, kept[self.labels.clamp_min(0).long()], True)
