"""Densities that follow from shapes alone: who pays, before any weight has been looked at.

| name | density d_l of a tensor |
| --- | --- |
| uniform | the same everywhere |
| uniform+ | first tensor 1, last max(d, 0.2), the same everywhere else |
| er | eps (out + in) / (out in), kernel sizes ignored |
| erk | eps (sum of dims) / (product of dims) |
| erk+ | last tensor 1, erk on the others |

eps is such that sum d_l N_l = d sum N_l; tensors whose d_l would exceed 1 are dense and eps is
solved again for the rest. Sources: Mocanu et al. 2018, Scalable Training of Artificial Neural
Networks with Adaptive Sparse Connectivity (er); Evci et al. 2020, Rigging the Lottery (erk); Liu et
al. 2022, The Unreasonable Effectiveness of Random Pruning (uniform+, erk+).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.patterns import Pattern, Unstructured, check_sparsity, count_dropped

__all__ = [
    "Budget",
    "Scores",
    "TensorSpec",
    "er",
    "erk",
    "erk_plus",
    "no_fixed_density",
    "scaled_densities",
    "uniform",
    "uniform_plus",
]

_LEAST_LAST = 0.2  # density of the classifier under uniform+


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


def uniform_plus(
    specs: Sequence[TensorSpec], sparsity: float, scores: Scores = None
) -> dict[str, int]:
    """Uniform, but the first tensor is dense and the last has density max(d, 0.2).

    First and last are in the order in which the model registers its tensors. The others share what
    is left, so that the whole sparsity is exact.

    Raises:
        InvalidArgument: those two alone take more than the whole may keep.
    """
    check_sparsity(sparsity)
    no_fixed_density(specs, "uniform+")
    first, last = specs[0], specs[-1]
    held = {last.name: last.weights - count_dropped(last.weights, min(sparsity, 1 - _LEAST_LAST))}
    held[first.name] = first.weights
    return scaled_densities(specs, dict.fromkeys((s.name for s in specs), 1.0), sparsity, held)


def er(specs: Sequence[TensorSpec], sparsity: float, scores: Scores = None) -> dict[str, int]:
    """Erdos-Renyi densities: d_l = eps * (out + in) / (out * in), kernel sizes ignored."""
    check_sparsity(sparsity)
    no_fixed_density(specs, "er")
    raw = {s.name: sum(s.shape[:2]) / math.prod(s.shape[:2]) for s in specs}
    return scaled_densities(specs, raw, sparsity)


def erk(specs: Sequence[TensorSpec], sparsity: float, scores: Scores = None) -> dict[str, int]:
    """Erdos-Renyi-Kernel densities: d_l = eps * (sum of dims) / (product of dims)."""
    check_sparsity(sparsity)
    no_fixed_density(specs, "erk")
    return scaled_densities(specs, _erk_ratios(specs), sparsity)


def erk_plus(specs: Sequence[TensorSpec], sparsity: float, scores: Scores = None) -> dict[str, int]:
    """ERK on all tensors but the last (in the model's order), which is dense.

    Raises:
        InvalidArgument: the last tensor alone is more than the whole may keep.
    """
    check_sparsity(sparsity)
    no_fixed_density(specs, "erk+")
    last = specs[-1]
    return scaled_densities(specs, _erk_ratios(specs), sparsity, {last.name: last.weights})


def _erk_ratios(specs: Sequence[TensorSpec]) -> dict[str, float]:
    return {s.name: sum(s.shape) / s.weights for s in specs}


def no_fixed_density(specs: Sequence[TensorSpec], budget: str) -> None:
    """Refuse patterns such as N:M, whose density no budget can vary."""
    for spec in specs:
        if spec.pattern.fixed_density is not None:
            raise InvalidArgument(
                f"pattern {spec.pattern} has one density; budget {budget!r} cannot vary it"
                " (use budget 'uniform')"
            )


def scaled_densities(
    specs: Sequence[TensorSpec],
    raw: Mapping[str, float],
    sparsity: float,
    held: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Densities eps * raw clipped at 1 by making the largest dense, then exact integers.

    Args:
        specs: all tensors.
        raw: tensor name -> positive number.
        sparsity: of the whole.
        held: tensor name -> weights that it keeps whatever eps is.

    Raises:
        InvalidArgument: the held tensors leave nothing for the others.
    """
    total = sum(s.weights for s in specs)
    fixed = dict(held or {})
    allowed = total - count_dropped(total, sparsity) - sum(fixed.values())
    free = [s for s in specs if s.name not in fixed]
    if fixed and allowed < len(free):
        raise InvalidArgument(
            f"sparsity={sparsity:g} leaves nothing for the other tensors when "
            f"{', '.join(map(repr, fixed))} keep {sum(fixed.values())} weights; ask for less "
            "sparsity or use budget 'erk'"
        )
    dense: set[str] = set()
    eps = 0.0
    while len(dense) < len(free):
        open_ = [s for s in free if s.name not in dense]
        room = allowed - sum(s.weights for s in free if s.name in dense)
        eps = room / sum(raw[s.name] * s.weights for s in open_)
        top = max(raw[s.name] for s in open_)
        if eps * top <= 1.0:
            break
        dense |= {s.name for s in open_ if raw[s.name] == top}
    wanted = {
        s.name: float(s.weights) if s.name in dense else eps * raw[s.name] * s.weights for s in free
    }
    keep = {name: math.floor(value) for name, value in wanted.items()}
    by_remainder = sorted(free, key=lambda s: keep[s.name] - wanted[s.name])
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
    keep |= fixed
    return {
        s.name: keep[s.name]
        if isinstance(s.pattern, Unstructured) and s.pattern.scope == "tensor"
        else s.pattern.reachable(
            s.view, math.floor(keep[s.name] / s.pattern.weights_per_unit(s.view) + 1e-9)
        )
        for s in specs
    }
