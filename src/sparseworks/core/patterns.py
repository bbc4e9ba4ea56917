"""Patterns: which zeros are legal inside one tensor, and who competes with whom.

A pattern works on the 2-D view `[out, in]` of a parameter (see `sparseworks.models.views`). Its
heart is `select(scores, keep) -> bool mask`: pure, deterministic, exactly `keep` units.

A *unit* is what a pattern moves: one weight, one block, one row. The score of a unit is the sum of
the scores of its weights, so methods only score weights.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

import torch
from torch import Tensor

from sparseworks.core.errors import InvalidArgument, PatternError
from sparseworks.core.selection import check_scores, keep_top, keep_top_per_row

__all__ = [
    "NM",
    "Banded",
    "Block",
    "Group",
    "IndexGroups",
    "Pattern",
    "Unstructured",
    "check_sparsity",
    "count_dropped",
    "parse_pattern",
]


def check_sparsity(sparsity: float) -> float:
    """Return the sparsity as a float in [0, 1).

    Raises:
        InvalidArgument: not a number in [0, 1).
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)):
        raise InvalidArgument(f"sparsity={sparsity!r} is not a number; give a fraction in [0, 1)")
    if not 0.0 <= sparsity < 1.0:
        hint = f"; did you mean {sparsity / 100:g}?" if 1.0 < sparsity < 100.0 else ""
        raise InvalidArgument(f"sparsity={sparsity:g} is not in [0, 1){hint}")
    return float(sparsity)


def count_dropped(units: int, sparsity: float) -> int:
    """floor(sparsity * units) in exact decimal arithmetic, so that 0.29 of 100 is 29, not 28."""
    return math.floor(Decimal(repr(float(sparsity))) * units)


class Pattern(ABC):
    """The zeros that are legal in a matrix `[out, in]`."""

    fixed_density: float | None = None
    """The one density this pattern has (N:M), or None when it takes any."""

    @abstractmethod
    def units(self, shape: Sequence[int]) -> int:
        """Number of units in a matrix of this shape."""

    @abstractmethod
    def pool(self, scores: Tensor) -> Tensor:
        """Unit scores (fp32) from weight scores `[out, in]`: their sum over each unit."""

    @abstractmethod
    def select(self, scores: Tensor, keep: int | None = None) -> Tensor:
        """Bool mask `[out, in]`, True = kept, with the `keep` units of the highest scores.

        Ties keep the lowest flat index; -inf is never kept; NaN is refused. `keep` is a number of
        units; None is allowed where the pattern has one density only.
        """

    def check(self, shape: Sequence[int], run: int | None = None) -> None:  # noqa: B027
        """Raise `PatternError` with the reason when a matrix cannot take this pattern.

        Args:
            shape: `[out, in]`.
            run: how many consecutive inputs belong together (channels at a fixed tap of a
                convolution); None: all of them.
        """

    def keep(self, shape: Sequence[int], sparsity: float) -> int:
        """Units kept in one matrix at this sparsity: units - floor(sparsity * units)."""
        total = self.units(shape)
        return total - count_dropped(total, sparsity)

    def reachable(self, shape: Sequence[int], keep: int) -> int:
        """The largest number of units, at most `keep`, that `select` can keep."""
        return min(keep, self.units(shape))

    def weights_per_unit(self, shape: Sequence[int]) -> float:
        """Weights in one unit."""
        return math.prod(shape) / max(1, self.units(shape))


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Any weight may be zero.

    Args:
        scope: "tensor": all weights compete; "row": the weights of each output row compete, and
            every row keeps the same number.
    """

    scope: Literal["tensor", "row"] = "tensor"

    def __post_init__(self) -> None:
        if self.scope not in ("tensor", "row"):
            raise InvalidArgument(f"Unstructured scope {self.scope!r}: 'tensor' or 'row'")

    def __str__(self) -> str:
        return "unstructured" if self.scope == "tensor" else "row"

    def units(self, shape: Sequence[int]) -> int:
        return math.prod(shape)

    def pool(self, scores: Tensor) -> Tensor:
        return scores.float()

    def keep(self, shape: Sequence[int], sparsity: float) -> int:
        if self.scope == "tensor":
            return super().keep(shape, sparsity)
        rows, columns = shape
        return rows * (columns - count_dropped(columns, sparsity))

    def reachable(self, shape: Sequence[int], keep: int) -> int:
        if self.scope == "tensor":
            return super().reachable(shape, keep)
        return shape[0] * min(shape[1], keep // max(1, shape[0]))

    def select(self, scores: Tensor, keep: int | None = None) -> Tensor:
        keep = _required(self, keep)
        if self.scope == "tensor":
            return keep_top(scores, keep)
        rows = scores.shape[0]
        if keep % max(1, rows):
            raise InvalidArgument(f"row pattern: keep={keep} is not a multiple of {rows} rows")
        return keep_top_per_row(scores, keep // max(1, rows))


@dataclass(frozen=True)
class NM(Pattern):
    """At most `n` non-zeros in every `m` consecutive inputs (2:4 and the like).

    For a convolution the m inputs are channels at a fixed tap.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n <= self.m:
            raise InvalidArgument(
                f"pattern {self.n}:{self.m}: N:M keeps N of every M inputs, so 0 < N <= M"
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def fixed_density(self) -> float:  # type: ignore[override]
        return self.n / self.m

    def units(self, shape: Sequence[int]) -> int:
        return math.prod(shape)

    def pool(self, scores: Tensor) -> Tensor:
        return scores.float()

    def check(self, shape: Sequence[int], run: int | None = None) -> None:
        run = shape[-1] if run is None else run
        if run % self.m:
            raise PatternError(
                f"pattern {self} needs the number of inputs to be a multiple of {self.m}, not {run}"
            )

    def keep(self, shape: Sequence[int], sparsity: float) -> int:
        return self.units(shape) // self.m * self.n

    def reachable(self, shape: Sequence[int], keep: int) -> int:
        return self.units(shape) // self.m * self.n

    def select(self, scores: Tensor, keep: int | None = None) -> Tensor:
        self.check(scores.shape)
        fixed = self.keep(scores.shape, 0.0)
        if keep is not None and keep != fixed:
            raise InvalidArgument(f"pattern {self} keeps {fixed} of {scores.numel()}, not {keep}")
        check_scores(scores)
        runs = scores.reshape(-1, self.m)
        mask = torch.empty(runs.shape, dtype=torch.bool, device=scores.device)
        step = max(1, (1 << 22) // self.m)
        for start in range(0, runs.shape[0], step):
            mask[start : start + step] = self._select_runs(runs[start : start + step].float())
        return mask.view(scores.shape)

    def _select_runs(self, runs: Tensor) -> Tensor:
        """Keep the n largest of each row of `[runs, m]`; ties keep the lowest index."""
        mask = self.select_columns(runs.t().contiguous()).t()
        if bool((mask & torch.isneginf(runs)).any()):
            raise InvalidArgument(
                f"pattern {self}: a run has fewer than {self.n} eligible scores (-inf elsewhere)"
            )
        return mask

    def select_columns(self, scores: Tensor) -> Tensor:
        """Mask of the n largest of every column of `[m, runs]`; ties keep the lowest index."""
        if self.m > 32:
            order = torch.sort(scores, dim=0, descending=True, stable=True).indices[: self.n]
            mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
            return mask.scatter_(0, order, True)
        rank = torch.empty(scores.shape, dtype=torch.int8, device=scores.device)
        for i in range(self.m):  # rank of an entry = how many others beat it
            rank[i] = self.m - 1 - i
        for i in range(self.m):
            for j in range(i + 1, self.m):
                first_wins = (scores[i] >= scores[j]).view(torch.int8)
                rank[j] += first_wins
                rank[i] -= first_wins
        return rank < self.n


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
        kept = keep_top(self.pool(scores), _required(self, keep))
        rows, columns = scores.shape
        wide = kept[:, None, :, None].expand(-1, self.h, -1, self.w)
        return wide.reshape(rows, columns)


@dataclass(frozen=True)
class Group(Pattern):
    """Whole rows or columns of the matrix, or equal slices of them.

    Args:
        axis: "rows" (output channels) or "columns" (input channels).
        size: consecutive rows or columns that form one unit (a head's width, say).
        stride: for columns of a convolution, the taps repeat every `stride` columns; a unit then
            holds its channels at every tap. 0: no repetition.
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
        if self.axis == "rows":
            return shape[0]
        return self.stride or shape[1]

    def check(self, shape: Sequence[int], run: int | None = None) -> None:
        extent = self._extent(shape)
        if extent % self.size or (self.axis == "columns" and self.stride and shape[1] % extent):
            raise PatternError(f"pattern {self}: {extent} {self.axis} do not divide by {self.size}")

    def units(self, shape: Sequence[int]) -> int:
        return self._extent(shape) // self.size

    def pool(self, scores: Tensor) -> Tensor:
        self.check(scores.shape)
        if self.axis == "rows":
            lines = scores.sum(dim=1, dtype=torch.float32)
        else:
            lines = scores.reshape(-1, self._extent(scores.shape)).sum(dim=0, dtype=torch.float32)
        return lines.view(-1, self.size).sum(1)

    def select(self, scores: Tensor, keep: int | None = None) -> Tensor:
        lines = keep_top(self.pool(scores), _required(self, keep)).repeat_interleave(self.size)
        rows, columns = scores.shape
        if self.axis == "rows":
            return lines[:, None].expand(rows, columns).clone()
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
        kept = keep_top(self.pool(scores), _required(self, keep))
        return torch.where(self.labels >= 0, kept[self.labels.clamp_min(0).long()], True)


@dataclass(frozen=True)
class Banded(Pattern):
    """Diagonals of the matrix as units: |column - row * in / out| <= width is kept.

    The mask does not depend on the scores beyond their shape; `keep` may be omitted. It is the
    local window of attention, and the static baseline of sparse layers.
    """

    width: int

    def __post_init__(self) -> None:
        if self.width < 0:
            raise InvalidArgument(f"band width {self.width} is negative")

    def __str__(self) -> str:
        return f"band{self.width}"

    def _band(self, shape: Sequence[int], device: torch.device | None = None) -> Tensor:
        rows, columns = shape
        centre = torch.arange(rows, device=device)[:, None] * columns // max(1, rows)
        return (torch.arange(columns, device=device)[None, :] - centre).abs() <= self.width

    def units(self, shape: Sequence[int]) -> int:
        return math.prod(shape)

    def pool(self, scores: Tensor) -> Tensor:
        return scores.float()

    def keep(self, shape: Sequence[int], sparsity: float) -> int:
        return int(self._band(shape).sum())

    def reachable(self, shape: Sequence[int], keep: int) -> int:
        return self.keep(shape, 0.0)

    def select(self, scores: Tensor, keep: int | None = None) -> Tensor:
        check_scores(scores)
        return self._band(scores.shape, scores.device)


def _required(pattern: Pattern, keep: int | None) -> int:
    if keep is None:
        raise InvalidArgument(f"pattern {pattern} needs the number of units to keep")
    return keep


_GRAMMAR = (
    (r"unstructured|tensor", lambda _: Unstructured("tensor")),
    (r"row", lambda _: Unstructured("row")),
    (r"(\d+):(\d+)", lambda g: NM(int(g[1]), int(g[2]))),
    (r"block(\d+)x(\d+)", lambda g: Block(int(g[1]), int(g[2]))),
    (r"block(\d+)", lambda g: Block(int(g[1]), int(g[1]))),
    (r"(?:rows|channels)(\d*)", lambda g: Group("rows", int(g[1] or 1))),
    (r"columns(\d*)", lambda g: Group("columns", int(g[1] or 1))),
    (r"band(\d+)", lambda g: Banded(int(g[1]))),
)


def parse_pattern(pattern: str | Pattern) -> Pattern:
    """A pattern from its short form; `str(pattern)` gives it back.

    "unstructured", "row" (unstructured, per row), "2:4", "block16x16", "rows", "rows64",
    "channels", "columns", "columns64", "band3".

    Raises:
        InvalidArgument: the text is none of these.
    """
    if isinstance(pattern, Pattern):
        return pattern
    for expression, build in _GRAMMAR:
        if found := re.fullmatch(expression, str(pattern).strip().lower()):
            return build(found)
    raise InvalidArgument(
        f"unknown pattern {pattern!r}; use 'unstructured', 'row', 'N:M', 'blockHxW', 'rows[S]', "
        "'columns[S]' or 'band[W]'"
    )
