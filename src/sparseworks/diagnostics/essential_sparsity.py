"""Essential sparsity: how much of a trained model one-shot pruning removes almost for free
(Jaiswal et al. 2023, The Emergence of Essential Sparsity in Large Pre-trained Models).

With A(s) the metric of the model pruned in one shot to sparsity s, the loss of quality is

    drop(s) = 1 - A(s) / A(0)   (higher is better),   1 - A(0) / A(s)   (lower is better)

and s* = max {s : drop(t) <= tolerance for every measured t <= s}. How sharp the curve turns is the
slope after over the slope before the one breakpoint of its best piecewise-linear fit.

In our quick setting (claim 032) a Llama with 6M parameters is free to 20 %, not to the 30 % that
the paper finds for large models, a ResNet-20 to 30 or 40 %, and random masks to 0 %. A small
network that is fine-tuned under the mask is free to 20 to 60 %, under random masks to 0 to 30 %.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparseworks.core import registry
from sparseworks.core.errors import DataError, InvalidArgument
from sparseworks.core.patterns import check_sparsity
from sparseworks.core.registry import MethodInfo
from sparseworks.diagnostics.measurement import Measurement
from sparseworks.diagnostics.metrics import Metric
from sparseworks.models.views import find_prunable

__all__ = ["Breakpoint", "Curve", "EssentialSparsity", "near_zero", "one_breakpoint", "overlap"]

_GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Breakpoint:
    """A continuous line with one kink: `start + before * x`, and slope `after` from `at` on."""

    at: float
    start: float
    before: float
    after: float
    residual: float

    @property
    def sharpness(self) -> float:
        """after / before; infinite where the curve does not fall before the kink."""
        return self.after / self.before if self.before > 0 else math.copysign(math.inf, self.after)


def one_breakpoint(x: Sequence[float], y: Sequence[float]) -> Breakpoint:
    """The continuous two-piece line of least squared residual, by Hudson's exact search.

    min over a, b, c, k of sum_i (y_i - a - b x_i - c max(0, x_i - k))^2

    Between two neighbouring x the best k is where the lines of both sides meet; every x inside is
    tried as well (Hudson 1966, Fitting Segmented Curves Whose Join Points Have to be Estimated).

    Args:
        x: at least four strictly rising numbers; each piece spans at least two of them.
        y: as many finite numbers.

    Raises:
        InvalidArgument: fewer numbers, or x that does not rise.
    """
    if len(x) != len(y) or len(x) < 4:
        raise InvalidArgument(f"a kink needs at least 4 points, not {len(x)} and {len(y)}")
    if any(b <= a for a, b in pairwise(x)):
        raise InvalidArgument(f"x must rise strictly: {list(x)}")
    xs, ys = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    kinks = list(x[1:-1])
    for i in range(2, len(x) - 1):
        (a, b), (c, d) = (_line(xs[part], ys[part]) for part in (slice(i), slice(i, None)))
        meet = (c - a) / (b - d) if b != d else math.nan
        if x[i - 1] < meet < x[i]:
            kinks.append(meet)
    return min((_kinked(xs, ys, k) for k in kinks), key=lambda f: f.residual)


def _line(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Intercept and slope."""
    centred = x - x.mean()
    slope = float((centred * y).sum() / (centred * centred).sum())
    return float(y.mean()) - slope * float(x.mean()), slope


def _kinked(x: Tensor, y: Tensor, at: float) -> Breakpoint:
    design = torch.stack([torch.ones_like(x), x, (x - at).clamp_min(0)], 1)
    found = torch.linalg.lstsq(design, y[:, None], driver="gelsd").solution
    start, before, turn = found.flatten().tolist()
    residual = float((design @ found - y[:, None]).square().sum())
    return Breakpoint(at, start, before, before + turn, residual)


@dataclass(frozen=True)
class Curve:
    """What one-shot pruning costs at every sparsity.

    Args:
        metric: name of what was measured.
        sparsities: rising, the first is 0.
        values: of the metric.
        drops: relative loss of quality; 0 at sparsity 0.
        tolerance: a drop that counts as free.
    """

    metric: str
    sparsities: tuple[float, ...]
    values: tuple[float, ...]
    drops: tuple[float, ...]
    tolerance: float

    @property
    def essential(self) -> float:
        """s*: the largest measured sparsity up to which every drop is within the tolerance."""
        free = 0.0
        for sparsity, drop in zip(self.sparsities, self.drops):
            if drop > self.tolerance:
                break
            free = sparsity
        return free

    @property
    def breakpoint(self) -> Breakpoint:
        """Where and how sharply the drop sets in."""
        return one_breakpoint(self.sparsities, self.drops)

    def __str__(self) -> str:
        rows = [
            f"  {s:6.1%}  {self.metric} {v:.4g}  drop {d:+.2%}"
            for s, v, d in zip(self.sparsities, self.values, self.drops)
        ]
        kink = self.breakpoint
        told = (
            f"essential sparsity {self.essential:.0%} at a drop of {self.tolerance:.1%}; the curve "
            f"turns at {kink.at:.0%}, {kink.sharpness:.3g} times steeper after it"
        )
        return "\n".join([told, *rows])


@dataclass(frozen=True)
class EssentialSparsity(Measurement):
    """Measure the curve: `EssentialSparsity()(model, metric)`.

    Args:
        method: registered one-shot method.
        budget: how the sparsity is spread over tensors; the paper's is one global threshold.
        tolerance: relative drop that counts as free.
        sparsities: rising, in (0, 1); at least three.
    """

    method: str = "magnitude"
    budget: str = "global"
    tolerance: float = 0.01
    sparsities: tuple[float, ...] = _GRID

    info: ClassVar[MethodInfo] = MethodInfo(
        name="essential-sparsity",
        title="The Emergence of Essential Sparsity in Large Pre-trained Models: "
        "The Weights that Matter",
        authors="Jaiswal et al.",
        year=2023,
        card="032",
        room="diagnostics",
        kind="measurement",
        budget="global",
        cost="an evaluation per sparsity",
        summary="the sparsity up to which one-shot pruning is nearly free, and how sharp it ends",
        call="sw.methods.EssentialSparsity()(model, metric)",
        command="sparseworks curve MODEL --data DATA --eval-data DATA --out OUT",
    )

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip((0.0, *self.sparsities), self.sparsities))
        if len(self.sparsities) < 3 or not rising:
            raise InvalidArgument(
                f"sparsities={self.sparsities}: at least three that rise, all above 0"
            )
        for sparsity in self.sparsities:
            check_sparsity(sparsity)
        if not self.tolerance >= 0:
            raise InvalidArgument(f"tolerance={self.tolerance} must not be negative")
        registry.build(self.method, ("one-shot",))

    def __call__(
        self,
        model: nn.Module,
        metric: Metric | Callable[[nn.Module], float],
        *,
        data: Iterable[Any] | None = None,
        tune: Callable[[nn.Module], Any] | None = None,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        seed: int = 0,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> Curve:
        """Prune a copy to every sparsity and measure it; the model stays as it is.

        Args:
            model: trained.
            metric: a positive number; a plain function counts as higher-is-better.
            data: calibration batches, where the method needs them.
            tune: trains a model in place with its masks fixed; it is given the dense copy too, so
                that no point of the curve has had more training than another.
            include: name patterns of the only weights to prune.
            exclude: name patterns of weights to leave dense.
            seed: of random methods.
            progress: called with (done, total, what).

        Raises:
            DataError: the metric is not positive where a ratio divides by it.
        """
        from sparseworks.weights.oneshot.prune import prune

        rising = metric.higher_is_better if isinstance(metric, Metric) else True
        name = metric.name if isinstance(metric, Metric) else getattr(metric, "__name__", "metric")
        grid = (0.0, *self.sparsities)
        values = []
        for done, sparsity in enumerate(grid):
            twin = copy.deepcopy(model)
            if sparsity > 0:
                prune(
                    twin, self.method, sparsity=sparsity, budget=self.budget, data=data,
                    include=include, exclude=exclude, seed=seed,
                )  # fmt: skip
            if tune is not None:
                tune(twin)
            values.append(float(metric(twin)))
            if not values[0] > 0 or (not rising and not values[-1] > 0):
                raise DataError(f"{name} is {values[-1]} at {sparsity:g}; it must be positive")
            if progress is not None:
                progress(done + 1, len(grid), f"sparsity {sparsity:g}")
        drops = tuple(1 - (v / values[0] if rising else values[0] / v) for v in values)
        return Curve(name, grid, tuple(values), drops, self.tolerance)


def near_zero(
    model: nn.Module,
    epsilon: float = 0.01,
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> dict[str, float]:
    """z = #{|w| < epsilon std(W)} / n of every prunable tensor: the weights that training has
    brought next to zero by itself. The scale of a tensor does not change it.

    Raises:
        InvalidArgument: `epsilon` is not positive.
    """
    if not epsilon > 0:
        raise InvalidArgument(f"epsilon={epsilon} must be positive")
    found = {}
    for view in find_prunable(model, include, exclude):
        weight = view.parameter.detach().float()
        close = weight.abs() < epsilon * weight.std(correction=0)
        found[view.name] = float(close.double().mean())
    return found


def overlap(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, float]:
    """How alike two mask records are: over all kept weights A and B together,

        iou = |A and B| / |A or B|,   cosine = |A and B| / sqrt(|A| |B|)

    Args:
        a: name -> bool mask; True is kept.
        b: the same names and shapes.

    Raises:
        InvalidArgument: other names or shapes, or a record that keeps nothing.
    """
    if a.keys() != b.keys() or any(a[n].shape != b[n].shape for n in a):
        odd = sorted(a.keys() ^ b.keys()) or [n for n in a if a[n].shape != b[n].shape]
        raise InvalidArgument(f"the records mask different weights: {odd[:3]}")
    both = sum(int((a[n] & b[n]).sum()) for n in a)
    first, second = (sum(int(r[n].sum()) for n in a) for r in (a, b))
    if not first or not second:
        raise InvalidArgument("a record keeps no weight at all")
    return {"iou": both / (first + second - both), "cosine": both / math.sqrt(first * second)}
