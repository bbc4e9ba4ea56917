"""Budgets from the sensitivity of groups of tensors (blocks of a model): how it becomes numbers.

A rule turns sensitivities, sizes and a sparsity into weights to keep per group; every tensor of a
group then has the density of its group, in whole units of its pattern. What rounding leaves over
goes to the tensors that lost most by it, so the whole sparsity is as near as the patterns allow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sparseworks.core.densities import Budget, Scores, TensorSpec, no_fixed_density
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.patterns import Unstructured, check_sparsity, count_dropped

__all__ = ["Rule", "Sizes", "by_groups", "filled", "rescaled", "shifted", "whole_units"]

Sizes = Mapping[str, int]
Rule = Callable[[Sizes, float], Mapping[str, float]]
"""(weights per group, sparsity) -> weights to keep per group, adding up to the whole."""

_HALVINGS = 80  # of a bisection over doubles


def by_groups(group_of: Mapping[str, str], rule: Rule, name: str) -> Budget:
    """A budget that gives every group what a rule says, uniform inside of it.

    Args:
        group_of: tensor name -> group.
        rule: weights to keep per group.
        name: of the budget, for errors.
    """

    def budget(
        specs: Sequence[TensorSpec], sparsity: float, scores: Scores = None
    ) -> dict[str, int]:
        check_sparsity(sparsity)
        no_fixed_density(specs, name)
        sizes: dict[str, int] = {}
        for spec in specs:
            group = group_of[spec.name]
            sizes[group] = sizes.get(group, 0) + spec.weights
        keep = rule(sizes, sparsity)
        wanted = {}
        for spec in specs:
            group = group_of[spec.name]
            wanted[spec.name] = spec.weights * keep[group] / sizes[group]
        total = sum(sizes.values())
        return whole_units(specs, wanted, total - count_dropped(total, sparsity))

    return budget


def whole_units(
    specs: Sequence[TensorSpec], wanted: Mapping[str, float], allowed: int
) -> dict[str, int]:
    """Units kept per tensor: `wanted` weights rounded down, then the rest by largest remainder.

    Args:
        specs: all tensors.
        wanted: tensor name -> weights to keep, adding up to `allowed` at most.
        allowed: weights that the whole may keep.
    """
    keep: dict[str, int] = {}
    weights: dict[str, float] = {}
    for spec in specs:
        per = spec.pattern.weights_per_unit(spec.view)
        units = int(wanted[spec.name] / per + 1e-6)
        keep[spec.name] = spec.pattern.reachable(spec.view, units)
        weights[spec.name] = keep[spec.name] * per
    missing = allowed - sum(weights.values())
    by_remainder = sorted(specs, key=lambda s: weights[s.name] - wanted[s.name])
    grown = True
    while grown:
        grown = False
        for spec in by_remainder:
            rows = isinstance(spec.pattern, Unstructured) and spec.pattern.scope == "row"
            step = spec.view[0] if rows else 1
            cost = step * spec.pattern.weights_per_unit(spec.view)
            more = spec.pattern.reachable(spec.view, keep[spec.name] + step)
            if cost <= missing + 1e-6 and more == keep[spec.name] + step:
                keep[spec.name] = more
                missing -= cost
                grown = True
    return keep


def shifted(wanted: Mapping[str, float], sizes: Sizes, sparsity: float) -> dict[str, float]:
    """Densities moved up or down together until they add up: clip(wanted_g + c, 0, 1) * size_g.

    Args:
        wanted: group -> density, any real number.
    """
    total = sum(sizes.values())
    target = total - count_dropped(total, sparsity)
    low = -max(wanted[g] for g in sizes) - 1.0
    high = 1.0 - min(wanted[g] for g in sizes) + 1.0

    def kept(c: float) -> dict[str, float]:
        return {g: min(1.0, max(0.0, wanted[g] + c)) * n for g, n in sizes.items()}

    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(kept(middle).values()) <= target else (low, middle)
    return kept(low)


def rescaled(wanted: Mapping[str, float], sizes: Sizes, amount: float) -> dict[str, float]:
    """min(1, c * wanted_g) * size_g with c such that they add up to `amount`.

    Args:
        wanted: group -> a number above 0: a density, or a sparsity.
        amount: of weights, at most all.
    """
    return filled({g: wanted[g] * n for g, n in sizes.items()}, sizes, amount)


def filled(
    shares: Mapping[str, float],
    sizes: Sizes,
    amount: float,
    least: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """`least_g` for every group, the rest in proportion to the shares, no group beyond its size.

    Groups that are full drop out and the others share again.

    Args:
        shares: group -> a number of at least 0; where all are 0 their sizes count.
        amount: weights to give, at most all of them.
        least: group -> weights that it has first; together at most `amount`.

    Raises:
        InvalidArgument: what is given first is more than there is.
    """
    found = {g: float(least[g]) if least else 0.0 for g in sizes}
    rest = amount - sum(found.values())
    if rest < -1e-6:
        raise InvalidArgument(
            f"{sum(found.values()):.0f} weights are given first and only {amount:.0f} may be kept"
        )
    open_ = set(sizes)
    while open_ and rest > 1e-9:
        most = max(shares[g] for g in open_)
        weight = {g: max(shares[g], 0.0) / most if most > 0 else 0.0 for g in open_}
        if not most > 0:
            weight = {g: float(sizes[g] - found[g]) for g in open_}
        total = sum(weight.values())
        if not total > 0:
            break
        full = {g for g in open_ if found[g] + rest * weight[g] / total >= sizes[g]}
        if not full:
            for g in open_:
                found[g] += rest * weight[g] / total
            break
        for g in full:
            rest -= sizes[g] - found[g]
            found[g] = float(sizes[g])
        open_ -= full
    return found
