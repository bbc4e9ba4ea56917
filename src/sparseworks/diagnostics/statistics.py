"""Intervals for differences: Student's t over paired seeds, bootstrap over samples of one run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

__all__ = ["Interval", "bootstrap_interval", "paired_interval", "student_quantile"]


@dataclass(frozen=True)
class Interval:
    """A mean with its interval; `low` and `high` are infinite for a single value."""

    mean: float
    low: float
    high: float


@cache
def student_quantile(level: float, freedom: int) -> float:
    """q with P(|T| <= q) = level for Student's t.

    With x = atan(q / sqrt(freedom)) the probability is a finite sum (Abramowitz and Stegun 1964,
    26.7.3 and 26.7.4), which rises with x; bisection inverts it.

    Args:
        level: in (0, 1).
        freedom: degrees of freedom, at least 1.
    """

    def probability(x: float) -> float:
        odd, cosine = freedom % 2 == 1, math.cos(x)
        term, total = (cosine, 0.0) if odd else (1.0, 0.0)
        for k in range(2 if odd else 1, freedom, 2):
            total += term
            term *= cosine * cosine * k / (k + 1)
        return 2 / math.pi * (x + math.sin(x) * total) if odd else math.sin(x) * total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < level else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def paired_interval(differences: Sequence[float], level: float = 0.95) -> Interval:
    """mean +- q s / sqrt(n) of paired differences, q the quantile of Student's t at `level`."""
    n = len(differences)
    mean = math.fsum(differences) / n
    if n == 1:
        return Interval(mean, -math.inf, math.inf)
    variance = math.fsum((d - mean) ** 2 for d in differences) / (n - 1)
    half = student_quantile(level, n - 1) * math.sqrt(variance / n)
    return Interval(mean, mean - half, mean + half)


def bootstrap_interval(values: Tensor, *, draws: int = 2000, seed: int = 0) -> Interval:
    """95 % percentile bootstrap of the mean of `[n]` values."""
    values = values.double().flatten()
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, len(values), (draws, len(values)), generator=generator)
    means = values[index].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(values.mean()), low, high)
