"""Small things that one call of `prune` works with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from sparseworks.core.errors import ModelError
from sparseworks.core.evidence import Collector
from sparseworks.core.masks import MaskEntry, Masks
from sparseworks.core.types import TensorResult
from sparseworks.kernels.zeroing import keep_only
from sparseworks.models.hooks import refresh
from sparseworks.models.ranks import Ranks
from sparseworks.models.views import View
from sparseworks.weights.oneshot.base import CACHED, in_cache

__all__ = ["LazyScores", "check_finite", "diagonal_error", "put", "share"]


class LazyScores(Mapping[str, Tensor]):
    """Scores that are computed when a budget first looks at one; most budgets never do."""

    def __init__(self, compute: Callable[[], dict[str, Tensor]]) -> None:
        self._compute = compute
        self._scores: dict[str, Tensor] | None = None

    def _all(self) -> dict[str, Tensor]:
        if self._scores is None:
            self._scores = self._compute()
        return self._scores

    def __getitem__(self, name: str) -> Tensor:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


class _Job(Protocol):
    ranks: Ranks
    record: Masks
    results: dict[str, TensorResult]
    warnings: list[str]


@torch.no_grad()
def share(job: _Job, views: Sequence[View], owner: Mapping[str, int]) -> None:
    """Give what each rank made of its weights to all others."""
    if job.ranks.size == 1:
        return
    for view in views:
        mine = owner[view.name] == job.ranks.rank
        told = None
        if mine:
            weight = view.parameter.detach().cpu()
            warned = [w for w in job.warnings if w.startswith(f"{view.name}: ")]
            told = weight, job.record.entry(view.name), job.results[view.name], warned
        weight, entry, result, warned = job.ranks.broadcast(told, owner[view.name])
        if not mine:
            assert isinstance(entry, MaskEntry)
            view.parameter.copy_(weight)
            job.record = job.record.merged(Masks({view.name: entry}, job.record.method))
            job.results[view.name] = result
            job.warnings += warned


def diagonal_error(view: View, dense: Tensor, new: Tensor, evidence: Collector) -> float | None:
    """sum (dW_ij n_j)^2 / sum (W_ij n_j)^2: the output error if inputs were uncorrelated."""
    norm = getattr(evidence, "norm", None)
    if norm is None:
        return None
    rows = dense.shape[0] // view.groups
    change = energy = 0.0
    for first, last in in_cache(dense):
        scale = (
            norm[torch.arange(first, last, device=norm.device) // rows] if view.groups > 1 else norm
        )
        part = torch.mul(dense[first:last], scale)
        energy += float(torch.linalg.vector_norm(part)) ** 2
        torch.sub(dense[first:last], new[first:last], out=part).mul_(scale)
        change += float(torch.linalg.vector_norm(part)) ** 2
    return change / energy if energy > 0 else 0.0


@torch.no_grad()
def put(view: View, weight: Tensor, mask: Tensor) -> None:
    """Write a solution; what the mask drops is 0, not the -0.0 of solvers that multiply by masks,
    which costs a lossless file a bit a zero."""
    if view.layout != "linear":
        view.write(torch.where(mask, weight, 0.0))
        return
    for first, last in in_cache(weight):
        keep_only(mask[first:last], view.parameter[first:last].copy_(weight[first:last]))
    refresh(view.module)


def check_finite(views: Sequence[View], told: str = "") -> None:
    """Raise where a weight is NaN or Inf.

    Args:
        told: after that, of what this means.
    """
    for view in views:
        weight = view.parameter.detach()
        # numbers of 16 bits are summed a tenth as fast as those that they become in the cache
        sums = torch.stack([p.float().sum() for p in torch.split(weight.flatten(), CACHED)])
        if not bool(torch.isfinite(sums).all()):
            bad = int((~torch.isfinite(weight)).sum())
            if bad:
                raise ModelError(f"{view.name}: {bad} weights are NaN or Inf{told}")
