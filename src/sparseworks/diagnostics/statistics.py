"""Intervals for differences: Student's t over paired seeds, bootstrap over samples of one run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Interval", "bootstrap_interval", "paired_interval"]

# two-sided 95 % quantiles of Student's t for 1..30 degrees of freedom
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval; `low` and `high` are infinite for a single value."""

    mean: float
    low: float
    high: float


def paired_interval(differences: Sequence[float]) -> Interval:
    """mean +- t(0.975, n - 1) * s / sqrt(n) of paired differences."""
    n = len(differences)
    mean = math.fsum(differences) / n
    if n == 1:
        return Interval(mean, -math.inf, math.inf)
    variance = math.fsum((d - mean) ** 2 for d in differences) / (n - 1)
    quantile = _T95[n - 2] if n - 2 < len(_T95) else 1.96
    half = quantile * math.sqrt(variance / n)
    return Interval(mean, mean - half, mean + half)


def bootstrap_interval(values: Tensor, *, draws: int = 2000, seed: int = 0) -> Interval:
    """Percentile bootstrap of the mean of `[n]` values."""
    values = values.double().flatten()
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, len(values), (draws, len(values)), generator=generator)
    means = values[index].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(values.mean()), low, high)
