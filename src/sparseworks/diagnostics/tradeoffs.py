"""What a comparison trades: its axes, the points of several seeds, and the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparseworks.core.errors import InvalidArgument
from sparseworks.diagnostics.statistics import paired_interval

__all__ = [
    "AXES",
    "Axis",
    "best_within",
    "mean_and_interval",
    "pareto_front",
    "present",
    "quality_label",
    "told_of",
]


@dataclass(frozen=True)
class Axis:
    """One thing that is measured of every model.

    Args:
        name: public string.
        column: of the rows; "" stands for the column of the metric.
        label: with its unit, of a value divided by `scale`.
        higher_is_better: direction; of the quality it is that of the metric.
    """

    name: str
    column: str
    label: str
    higher_is_better: bool = False
    scale: float = 1.0


AXES = (
    Axis("quality", "", "", True),
    Axis("size", "bytes", "file (MB)", scale=1e6),
    Axis("flops", "flops", "MFLOPs a sample, zeros skipped", scale=1e6),
    Axis("latency", "latency_ms", "compiled, ms a call"),
    Axis("speedup", "speedup", "times the speed of dense torch", True),
    Axis("sparsity", "sparsity", "zeros (%)", True, 0.01),
    Axis("seconds", "seconds", "seconds to make"),
)


def present(
    rows: Sequence[Mapping[str, Any]], metric: str, unit: str, higher: bool
) -> dict[str, Axis]:
    """The axes that all rows have a value of; the quality is that of the metric."""
    label = quality_label(metric, unit)
    named = {
        a.name: a if a.column else Axis(a.name, metric, label, higher) for a in AXES
    }  # fmt: skip
    return {
        name: axis for name, axis in named.items()
        if all(row.get(axis.column) is not None for row in rows)
    }  # fmt: skip


def quality_label(metric: str, unit: str) -> str:
    """Of the axis of a metric, with its unit."""
    return f"{metric} ({unit.strip()})" if unit.strip() else metric


def told_of(axes: Mapping[str, Axis]) -> dict[str, dict[str, Any]]:
    """Axes as JSON values, by their names."""
    return {
        name: {"column": a.column, "label": a.label, "scale": a.scale,
               "higher_is_better": a.higher_is_better}
        for name, a in axes.items()
    }  # fmt: skip


def pareto_front(
    points: Sequence[tuple[float, float]], higher_is_better: tuple[bool, bool]
) -> list[bool]:
    """Which points no other one beats.

    a beats b where it is at least as good on both axes and better on one; so of points that are
    equal all are on the front or none is. In order of the first axis from its best end, the second
    one breaking ties, a point is beaten by one before it, or by none.

    Args:
        points: (x, y), none of them NaN.
        higher_is_better: of x and of y; False: lower.

    Raises:
        InvalidArgument: a NaN, which is neither better nor worse.
    """
    if any(math.isnan(v) for point in points for v in point):
        raise InvalidArgument("a front needs values: NaN is neither better nor worse")
    costs = [tuple(-v if up else v for v, up in zip(p, higher_is_better)) for p in points]
    on: set[tuple[float, ...]] = set()
    least = math.inf
    for cost in sorted(set(costs)):
        if cost[1] < least or not on:
            on.add(cost)
            least = cost[1]
    return [cost in on for cost in costs]


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean and its 95 % interval over seeds (Student's t), which one seed has none of."""
    if len(values) > 1 and min(values) == max(values):
        return values[0], values[0], values[0]  # not what rounding makes of their sum
    found = paired_interval(values)
    return (found.mean, None, None) if len(values) < 2 else (found.mean, found.low, found.high)


def best_within(
    points: Sequence[Mapping[str, Any]], axis: Axis, dense: float, higher: bool, share: float
) -> Mapping[str, Any] | None:
    """The point that is best on an axis of those whose quality is within `share` of the dense one's
    (relative, on the means); None where there is none.

    Args:
        points: with `values`, by axis (mean, low, high).
        axis: not the quality.
        dense: its quality.
        higher: is more quality better?
        share: the loss that is allowed.
    """

    def loss(point: Mapping[str, Any]) -> float:
        value: float = point["values"]["quality"][0]
        return ((dense - value) if higher else (value - dense)) / max(abs(dense), 1e-12)

    kept = [p for p in points if loss(p) <= share]
    sign = -1 if axis.higher_is_better else 1
    return min(kept, key=lambda p: sign * p["values"][axis.name][0], default=None)
