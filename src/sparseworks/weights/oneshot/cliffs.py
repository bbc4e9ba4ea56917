"""Curves of the quality over the sparsity, and where they fall off."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["ComponentsResult", "Curve", "find_cliff", "steepness"]


@dataclass(frozen=True)
class Curve:
    """Quality of the pipeline with one component pruned.

    Args:
        weights: prunable weights of the component.
        sparsities: rising, the first is 0.
        quality: at each of them.
        cliff: the largest sparsity before the fall.
        steepness: largest slope over the median slope before it.
    """

    weights: int
    sparsities: tuple[float, ...]
    quality: tuple[float, ...]
    cliff: float
    steepness: float


@dataclass(frozen=True)
class ComponentsResult:
    """What was found and done.

    Args:
        curves: per component.
        sparsity: chosen per component.
        quality: of the pruned pipeline.
        overall: share of zeros over the prunable weights of all components.
        trials: (sparsity per component, quality) of every combination that was tried.
    """

    curves: Mapping[str, Curve]
    sparsity: Mapping[str, float]
    quality: float
    overall: float
    trials: tuple[tuple[Mapping[str, float], float], ...]

    def __str__(self) -> str:
        lines = [f"{self.overall:.1%} of the weights pruned, quality {self.quality:.4g}"]
        for name, curve in self.curves.items():
            lines.append(
                f"  {name}: {self.sparsity[name]:.1%} of {curve.weights:,} weights "
                f"(cliff at {curve.cliff:.1%})"
            )
        return "\n".join(lines)


def find_cliff(
    sparsities: Iterable[float], quality: Iterable[float], least: float, kappa: float = 5.0
) -> int:
    """Index of the last sparsity before the fall.

    Args:
        sparsities: rising.
        quality: at each of them.
        least: quality below which there is nothing to keep.
        kappa: how many times the median slope so far is a fall.
    """
    s, q = list(sparsities), list(quality)
    slopes: list[float] = []
    for i in range(1, len(s)):
        slope = abs(q[i] - q[i - 1]) / (s[i] - s[i - 1])
        usual = statistics.median(slopes) if len(slopes) >= 2 else float("inf")
        matters = q[i - 1] - q[i] > 0.1 * (q[0] - least)
        if q[i] < least or (matters and slope > kappa * usual):
            return i - 1
        slopes.append(slope)
    return len(s) - 1


def steepness(quality: list[float]) -> float:
    """Largest fall of a curve over the median change before it."""
    changes = [b - a for a, b in itertools.pairwise(quality)]
    worst = min(range(len(changes)), key=changes.__getitem__)
    before = [abs(c) for c in changes[:worst]]
    return -changes[worst] / max(statistics.median(before), 1e-12) if before else 1.0
