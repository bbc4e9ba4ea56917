"""Patterns whose unit is a single weight: unstructured, N:M, banded."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparseworks.core.errors import InvalidArgument, PatternError
from sparseworks.core.patterns.base import Pattern, count_dropped, required
from sparseworks.core.selection import (
    check_scores,
    keep_top,
    keep_top_in_runs,
    keep_top_per_row,
)

__all__ = ["NM", "Banded", "Unstructured"]


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
        keep = required(self, keep)
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
        eligible = check_scores(scores)
        if self.m in (2, 4, 8) and sys.byteorder == "little":
            mask = keep_top_in_runs(scores, self.n, self.m)
        else:
            mask = self._select_runs(scores.reshape(-1, self.m)).view(scores.shape)
        if eligible < scores.numel() and bool((mask & torch.isneginf(scores)).any()):
            raise InvalidArgument(
                f"pattern {self}: a run has fewer than {self.n} eligible scores (-inf elsewhere)"
            )
        return mask

    def _select_runs(self, runs: Tensor) -> Tensor:
        """Keep the n largest of each row of `[runs, m]`; ties keep the lowest index."""
        mask = torch.empty(runs.shape, dtype=torch.bool, device=runs.device)
        step = max(1, (1 << 20) // self.m)
        for start in range(0, runs.shape[0], step):
            columns = runs[start : start + step].float().t().contiguous()
            mask[start : start + step] = self.select_columns(columns).t()
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
        beats = torch.empty(scores.shape[1:], dtype=torch.float32, device=scores.device)
        for i in range(self.m):
            for j in range(i + 1, self.m):
                first_wins = torch.ge(scores[i], scores[j], out=beats).to(torch.int8)
                rank[j] += first_wins
                rank[i] -= first_wins
        return rank < self.n


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
