"""Budgets: who pays. `(specs, sparsity, scores) -> number of units kept per tensor`.

The numbers add up exactly to what the whole allows: N - floor(sparsity * N) weights over all
tensors, less what a pattern cannot reach (blocks, rows), which `shortfall` reports.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.patterns import Pattern, Unstructured, check_sparsity, count_dropped
from sparseworks.core.selection import joint_keep_counts

__all__ = [
    "Budget",
    "TensorSpec",
    "by_sensitivity",
    "erk",
    "get_budget",
    "global_",
    "per_tensor",
    "shortfall",
    "uniform",
]


@dataclass(frozen=True)
class TensorSpec:
    """What a budget knows of a tensor: its name, its own shape, its 2-D view and its pattern."""

    name: str
    shape: tuple[int, ...]
    view: tuple[int, int]
    pattern: Pattern

    @property
    def weights(self) -> int:
        return math.prod(self.shape)


Scores = Mapping[str, Tensor] | None
Budget = Callable[[Sequence[TensorSpec], float, Scores], dict[str, int]]


def uniform(specs: Sequence[TensorSpec], sparsity: float, scores: Scores = None) -> dict[str, int]:
    """The same sparsity for every tensor: units - floor(s * units) each."""
    check_sparsity(sparsity)
    return {s.name: s.pattern.keep(s.view, sparsity) for s in specs}


def erk(specs: Sequence[TensorSpec], sparsity: float, scores: Scores = None) -> dict[str, int]:
    """Erdos-Renyi-Kernel densities: d_l = eps * (sum of dims) / (product of dims).

    eps is such that sum d_l N_l = (1 - s) sum N_l; tensors whose d_l would exceed 1 are dense and
    eps is solved again for the rest. (Evci et al. 2020, Rigging the Lottery.)
    """
    check_sparsity(sparsity)
    _no_fixed_density(specs, "erk")
    raw = {s.name: sum(s.shape) / s.weights for s in specs}
    return _scaled_densities(specs, raw, sparsity)


def by_sensitivity(sensitivity: Mapping[str, float]) -> Budget:
    """Densities in proportion to a given sensitivity per tensor, clipped at 1.

    Args:
        sensitivity: tensor name -> positive number; higher = keep more.
    """

    def budget(
        specs: Sequence[TensorSpec], sparsity: float, scores: Scores = None
    ) -> dict[str, int]:
        check_sparsity(sparsity)
        _no_fixed_density(specs, "by_sensitivity")
        for spec in specs:
            value = sensitivity.get(spec.name)
            if value is None or not (value > 0 and math.isfinite(value)):
                raise InvalidArgument(
                    f"sensitivity of {spec.name!r} is {value}; a positive number is needed"
                )
        return _scaled_densities(specs, {s.name: sensitivity[s.name] for s in specs}, sparsity)

    return budget


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
    _no_fixed_density(specs, "global")
    if scores is None:
        raise InvalidArgument("the global budget compares scores; this method gives none up front")
    pooled = [s.pattern.pool(scores[s.name]) / s.pattern.weights_per_unit(s.view) for s in specs]
    sizes = [s.pattern.weights_per_unit(s.view) for s in specs]
    total = sum(s.weights for s in specs)
    allowed = total - count_dropped(total, sparsity)
    if len(set(sizes)) == 1:
        counts = joint_keep_counts(pooled, int(allowed / sizes[0]))
    else:  # units of different sizes: the largest common threshold that fits
        low, high = 0, sum(p.numel() for p in pooled)
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


_NAMED: dict[str, Budget] = {"uniform": uniform, "erk": erk, "global": global_}


def get_budget(budget: str | Mapping[str, float] | Budget) -> Budget:
    """A budget from its name ("uniform", "erk", "global"), a mapping name -> sparsity, or itself.

    Raises:
        InvalidArgument: no budget has this name.
    """
    if isinstance(budget, str):
        if budget not in _NAMED:
            raise InvalidArgument(f"unknown budget {budget!r}; use one of {', '.join(_NAMED)}")
        return _NAMED[budget]
    if isinstance(budget, Mapping):
        return per_tensor(budget)
    return budget


def _no_fixed_density(specs: Sequence[TensorSpec], budget: str) -> None:
    for spec in specs:
        if spec.pattern.fixed_density is not None:
            raise InvalidArgument(
                f"pattern {spec.pattern} has one density; budget {budget!r} cannot vary it"
                " (use budget 'uniform')"
            )


def _scaled_densities(
    specs: Sequence[TensorSpec], raw: Mapping[str, float], sparsity: float
) -> dict[str, int]:
    """Densities eps * raw clipped at 1 by making the largest dense, then exact integers."""
    total = sum(s.weights for s in specs)
    allowed = total - count_dropped(total, sparsity)
    dense: set[str] = set()
    eps = 0.0
    while len(dense) < len(specs):
        open_ = [s for s in specs if s.name not in dense]
        room = allowed - sum(s.weights for s in specs if s.name in dense)
        eps = room / sum(raw[s.name] * s.weights for s in open_)
        top = max(raw[s.name] for s in open_)
        if eps * top <= 1.0:
            break
        dense |= {s.name for s in open_ if raw[s.name] == top}
    wanted = {
        s.name: float(s.weights) if s.name in dense else eps * raw[s.name] * s.weights
        for s in specs
    }
    keep = {name: math.floor(value) for name, value in wanted.items()}
    by_remainder = sorted(specs, key=lambda s: keep[s.name] - wanted[s.name])
    missing = allowed - sum(keep.values())
    while missing > 0:
        grown = 0
        for spec in by_remainder:
            if missing and keep[spec.name] < spec.weights:
                keep[spec.name] += 1
                missing -= 1
                grown += 1
        if not grown:
            break
    return {
        s.name: keep[s.name]
        if isinstance(s.pattern, Unstructured) and s.pattern.scope == "tensor"
        else s.pattern.reachable(
            s.view, math.floor(keep[s.name] / s.pattern.weights_per_unit(s.view) + 1e-9)
        )
        for s in specs
    }
