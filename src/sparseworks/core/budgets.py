"""Budgets: who pays. `(specs, sparsity, scores) -> number of units kept per tensor`.

The numbers add up exactly to what the whole allows: N - floor(sparsity * N) weights over all
tensors, less what a pattern cannot reach (blocks, rows), which `shortfall` reports.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sparseworks.core.densities import (
    Budget,
    Scores,
    TensorSpec,
    er,
    erk,
    erk_plus,
    no_fixed_density,
    scaled_densities,
    uniform,
    uniform_plus,
)
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.masks import Masks
from sparseworks.core.patterns import check_sparsity, count_dropped
from sparseworks.core.selection import check_scores, joint_keep_counts

__all__ = [
    "Budget",
    "TensorSpec",
    "by_masks",
    "by_sensitivity",
    "er",
    "erk",
    "erk_plus",
    "get_budget",
    "global_",
    "per_tensor",
    "shortfall",
    "uniform",
    "uniform_plus",
]


def by_sensitivity(sensitivity: Mapping[str, float]) -> Budget:
    """Densities in proportion to a given sensitivity per tensor, clipped at 1.

    Args:
        sensitivity: tensor name -> positive number; higher = keep more.
    """

    def budget(
        specs: Sequence[TensorSpec], sparsity: float, scores: Scores = None
    ) -> dict[str, int]:
        check_sparsity(sparsity)
        no_fixed_density(specs, "by_sensitivity")
        for spec in specs:
            value = sensitivity.get(spec.name)
            if value is None or not (value > 0 and math.isfinite(value)):
                raise InvalidArgument(
                    f"sensitivity of {spec.name!r} is {value}; a positive number is needed"
                )
        return scaled_densities(specs, {s.name: sensitivity[s.name] for s in specs}, sparsity)

    return budget


def by_masks(record: Masks) -> Budget:
    """The layer densities of other masks, and not their positions ("SNIP ratios").

    At the sparsity of the record every tensor keeps exactly as many weights as there; at another
    one the densities are scaled, clipped at 1. A tensor that the record empties keeps a weight.
    (Liu et al. 2022, The Unreasonable Effectiveness of Random Pruning.)
    """
    kept = {n: max(1, record.entry(n).kept) / math.prod(record.entry(n).shape) for n in record}
    return by_sensitivity(kept)


def per_tensor(sparsities: Mapping[str, float]) -> Budget:
    """An explicit sparsity for every tensor; those not named take the overall one."""

    def budget(
        specs: Sequence[TensorSpec], sparsity: float, scores: Scores = None
    ) -> dict[str, int]:
        unknown = sorted(set(sparsities) - {s.name for s in specs})
        if unknown:
            raise InvalidArgument(f"sparsity given for {unknown[0]!r}, which is not pruned here")
        return {
            s.name: s.pattern.keep(s.view, check_sparsity(sparsities.get(s.name, sparsity)))
            for s in specs
        }

    return budget


def global_(specs: Sequence[TensorSpec], sparsity: float, scores: Scores = None) -> dict[str, int]:
    """One threshold over all tensors: units compete by their mean score per weight."""
    check_sparsity(sparsity)
    no_fixed_density(specs, "global")
    if scores is None:
        raise InvalidArgument("the global budget compares scores; this method gives none up front")
    pooled = [s.pattern.pool(scores[s.name]) / s.pattern.weights_per_unit(s.view) for s in specs]
    sizes = [s.pattern.weights_per_unit(s.view) for s in specs]
    total = sum(s.weights for s in specs)
    allowed = total - count_dropped(total, sparsity)
    if len(set(sizes)) == 1:
        counts = joint_keep_counts(pooled, int(allowed / sizes[0]))
    else:  # units of different sizes: the largest common threshold that fits
        low, high = 0, sum(check_scores(p) for p in pooled)  # masked units cannot be kept
        while low < high:
            middle = (low + high + 1) // 2
            counts = joint_keep_counts(pooled, middle)
            if sum(c * size for c, size in zip(counts, sizes)) <= allowed:
                low = middle
            else:
                high = middle - 1
        counts = joint_keep_counts(pooled, low)
    return {s.name: s.pattern.reachable(s.view, c) for s, c in zip(specs, counts)}


def shortfall(specs: Sequence[TensorSpec], keep: Mapping[str, int], sparsity: float) -> int:
    """Weights that the whole allows and the patterns could not keep (negative: kept more)."""
    total = sum(s.weights for s in specs)
    kept = sum(round(keep[s.name] * s.pattern.weights_per_unit(s.view)) for s in specs)
    return total - count_dropped(total, sparsity) - kept


_NAMED: dict[str, Budget] = {
    "uniform": uniform,
    "uniform+": uniform_plus,
    "er": er,
    "erk": erk,
    "erk+": erk_plus,
    "global": global_,
}


def get_budget(budget: str | Mapping[str, float] | Budget) -> Budget:
    """A budget from its name, a mapping tensor name -> sparsity, or itself.

    Raises:
        InvalidArgument: no budget has this name.
    """
    if isinstance(budget, str):
        if budget not in _NAMED:
            raise InvalidArgument(
                f"unknown budget {budget!r}; use one of {', '.join(_NAMED)} (`prune` also measures "
                "owl, alpha, ecoflap and cfsp)"
            )
        return _NAMED[budget]
    if isinstance(budget, Mapping):
        return per_tensor(budget)
    return budget
