"""What a one-shot method is: a score, and sometimes a solver. `prune` does the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from sparseworks.core.budgets import Budget
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.evidence import Collector
from sparseworks.core.masks import Masks
from sparseworks.core.patterns import NM, Pattern, Unstructured
from sparseworks.core.registry import MethodInfo
from sparseworks.core.types import Progress, PruneResult
from sparseworks.kernels.selection import keep_largest_per_row
from sparseworks.kernels.zeroing import keep_only
from sparseworks.models.calls import Batch, Loss
from sparseworks.models.views import View

__all__ = [
    "CACHED", "Found", "OneShot", "Search", "Solution", "Staged", "Target", "Work", "in_cache",
]  # fmt: skip

CACHED = 1 << 18  # numbers, of which some fp32 copies stay in a cache


def in_cache(matrix: Tensor) -> Iterator[tuple[int, int]]:
    """Rows (from, to) of which some fp32 copies stay in a cache: a pass over memory that is new to
    the process takes several times one over what is at hand."""
    step = max(1, CACHED // max(1, matrix.shape[1]))
    for first in range(0, matrix.shape[0], step):
        yield first, min(first + step, matrix.shape[0])


@dataclass(frozen=True)
class Target:
    """One weight that is about to be pruned.

    Args:
        view: its matrix view.
        pattern: the zeros that are legal.
        keep: units to keep.
        allowed: bool matrix, False where an earlier call masked the weight; None: all allowed.
        seed: for methods that draw at random.
    """

    view: View
    pattern: Pattern
    keep: int
    allowed: Tensor | None = None
    seed: int = 0


@dataclass(frozen=True)
class Solution:
    """New weights and their mask, both as matrices `[groups * out, in]`.

    Args:
        weight: fp32, masked entries exactly 0.
        mask: bool.
        error: relative output error, where the solver knows it.
    """

    weight: Tensor
    mask: Tensor
    error: float | None = None


class Work(Protocol):
    """One call of `prune`, as far as a method sees it; it may add warnings."""

    model: nn.Module
    pattern: Pattern
    budget: Budget
    batches: Sequence[Batch] | None
    record: Masks
    warnings: list[str]

    def score_all(self, views: Sequence[View], evidence: Mapping[str, Any]) -> dict[str, Tensor]:
        """Scores of all tensors by name."""


@dataclass(frozen=True, kw_only=True)
class OneShot(ABC):
    """Base of one-shot methods; subclasses are frozen dataclasses whose fields are options.

    Args:
        pattern: legal zeros, where the call names none.
        budget: who pays, where the call names none.
    """

    pattern: str | Pattern = "unstructured"
    budget: str | Mapping[str, float] | Budget = "uniform"

    info: ClassVar[MethodInfo]
    rounds: ClassVar[int] = 1
    collector: ClassVar[type[Collector] | None] = None
    propagate: Literal["pruned", "dense"] = "pruned"

    def by_rows(self) -> bool:
        """Do `score` and `select` of a row look at this row alone?"""
        return False

    def score(self, target: Target, weight: Tensor, evidence: Any) -> Tensor:
        """fp32 scores of the weights, higher = keep; `[groups, out, in]` as `weight` is."""
        raise NotImplementedError

    def select(self, target: Target, scores: Tensor) -> Tensor:
        """The mask `[groups * out, in]`; a method with its own comparison group overrides this."""
        rows = max(1, scores.shape[0])
        if target.pattern == Unstructured("row") and target.keep % rows == 0:
            return keep_largest_per_row(scores, target.keep // rows)
        return target.pattern.select(scores, target.keep)

    def prepare(self, work: Work, views: Sequence[View], sparsity: float) -> Callable[[], None]:
        """Change the model, function unchanged, before anything is scored; returns what undoes it.

        Args:
            work: the call that this is a part of.
            sparsity: that is reached in the end.
        """
        return lambda: None

    def gather(
        self,
        model: nn.Module,
        views: Sequence[View],
        batches: Sequence[Batch],
        loss: Loss | None,
    ) -> Mapping[str, Any]:
        """Evidence that needs the whole model (gradients), per tensor name."""
        return {}

    def solve(self, target: Target, weight: Tensor, evidence: Any) -> Solution:
        """Mask the lowest scores; solvers that also change the kept weights override this.

        Args:
            weight: fp32 matrix `[groups * out, in]`.
        """
        rowwise = isinstance(target.pattern, NM) or target.pattern == Unstructured("row")
        if rowwise and self.by_rows() and target.view.groups == 1:
            with suppress(InvalidArgument):  # which says it of all rows, below
                return self._solve_by_rows(target, weight, evidence)
        scores = self.matrix_scores(target, weight, evidence)
        mask = self.select(target, scores)
        return Solution(torch.where(mask, weight, 0.0), mask)

    def _solve_by_rows(self, target: Target, weight: Tensor, evidence: Any) -> Solution:
        """The same, some rows at a time."""
        keep = target.keep // max(1, weight.shape[0])
        if keep * weight.shape[0] != target.keep:
            raise InvalidArgument("not as many of every row")
        new = torch.empty_like(weight, memory_format=torch.contiguous_format)
        mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
        for first, last in in_cache(weight):
            allowed = None if target.allowed is None else target.allowed[first:last]
            part = replace(target, keep=keep * (last - first), allowed=allowed)
            rows = weight[first:last]
            mask[first:last] = self.select(part, self.matrix_scores(part, rows, evidence))
            keep_only(mask[first:last], new[first:last].copy_(rows))
        return Solution(new, mask)

    def matrix_scores(self, target: Target, weight: Tensor, evidence: Any) -> Tensor:
        """Scores `[groups * out, in]`, -inf where the weight is already masked."""
        grouped = weight.view(target.view.groups, -1, weight.shape[1])
        found = self.score(target, grouped, evidence)
        if getattr(found, "shape", None) != grouped.shape:
            raise InvalidArgument(
                f"method {self.info.name!r}: score returned {_shape_of(found)} for "
                f"{target.view.name}; one number per weight, {list(grouped.shape)}, is needed"
            )
        scores = found.reshape(weight.shape)
        if target.allowed is not None:
            scores = scores.masked_fill(~target.allowed, -torch.inf)
        return scores


def _shape_of(value: Any) -> str:
    """ "shape [2, 3]" of a tensor, "a float" of what is none."""
    if isinstance(value, Tensor):
        return f"shape {list(value.shape)}"
    return f"a {type(value).__name__}"


@dataclass(frozen=True)
class Found:
    """What a search chose: how a one-shot method is to prune.

    Args:
        method: name or object of the one-shot method.
        sparsity: parameter name -> sparsity; weights that are not named stay dense.
        figures: what the search has to say, in JSON values.
    """

    method: Any
    sparsity: Mapping[str, float]
    figures: Mapping[str, Any]


class Search(ABC):
    """Base of methods that find sparsities by trying them; `prune` then prunes once to these."""

    info: ClassVar[MethodInfo]

    @abstractmethod
    def find(
        self,
        model: nn.Module,
        batches: Sequence[Batch] | None,
        *,
        seed: int,
        progress: Progress | None,
    ) -> Found:
        """Sparsities for a model, which stays as it is."""


class Staged(ABC):
    """Base of methods of several stages, the last of which is a call of `prune` of its own."""

    info: ClassVar[MethodInfo]

    @abstractmethod
    def prune(
        self, model: nn.Module, call: Callable[..., PruneResult], **given: Any
    ) -> PruneResult:
        """All stages, or nothing where one fails.

        Args:
            call: `sparseworks.prune`.
            given: what that was called with.
        """
