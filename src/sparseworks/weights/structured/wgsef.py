"""WGSEF: train towards at most k non-zero groups, with the convex envelope of that wish.

For groups w_j of a layer with weights d_j > 0, the envelope of "ridge with at most k groups" is

    GS_k(w) = 1/2 min { sum_j d_j ||w_j||^2 / u_j : 0 <= u <= 1, sum_j u_j <= k },

half a squared weighted group k-support norm. With a_j = sqrt(d_j) ||w_j||, the minimum is at
u_j = min(1, a_j / tau) with sum u = k. Its proximal map keeps directions,

    w_j = u_j / (u_j + l d_j) v_j,   u_j = clip(sqrt(l d_j) ||v_j|| / tau - l d_j, 0, 1),

with tau such that sum u = k; groups with sqrt(l d_j) ||v_j|| <= tau l d_j become exactly 0. Each
SGD step of rate eta is followed by the map with l = eta times the strength. A group is all that
makes a channel (filter, bias, batch-norm scale and shift), so a zero group can be cut exactly.

The level binds only where l is large enough: with a small one more than k groups stay, and a large
one shrinks those that stay by 1 / (1 + l d_j) or more. So the strength rises geometrically over the
first part of the training. A layer with at most k groups left keeps that support for good; in the
rest of the training it is fitted without the regulariser.

Source: Refael, Arbel, Huleihel 2024, Learning k-Level Structured Sparse Neural Networks Using Group
Envelope Regularization. The closed form of the proximal map is derived here from the definition;
rising, freezing and refitting are ours. Its half-space projection is not here.

In our quick setting (claim 130) a digits network reaches its level exactly, at less loss than group
lasso (0.23 nats, 0.11 to 0.35) and as much as group lasso with the same refit; on a group-sparse
regression with correlated inputs group lasso finds the support better (F1 0.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.registry import MethodInfo
from sparseworks.core.selection import keep_top
from sparseworks.models.calls import Batch
from sparseworks.models.coupling import Coupling, Family, trace
from sparseworks.weights.structured.applying import cut_families, free_families
from sparseworks.weights.structured.base import EpochBatches, Fitted, TrainAndCut
from sparseworks.weights.structured.recovery import finetune, one_cycle

__all__ = ["WGSEF", "envelope", "proximal_scale"]


def envelope(norms: Tensor, k: int, d: Tensor | float = 1.0) -> Tensor:
    """GS_k from group norms ||w_j||, `[m]` -> scalar."""
    a = norms.double() * torch.as_tensor(d, dtype=torch.float64).sqrt()
    if int((a > 0).sum()) <= k:
        return 0.5 * a.square().sum()
    low, high = torch.zeros(()).double(), a.sum() / k
    for _ in range(64):
        tau = (low + high) / 2
        if (a / tau.clamp_min(1e-300)).clamp(max=1).sum() > k:
            low = tau
        else:
            high = tau
    u = (a / high).clamp(max=1)
    return 0.5 * torch.where(a > 0, a.square() / u.clamp_min(1e-300), 0.0).sum()


def proximal_scale(norms: Tensor, k: int, strength: float, d: Tensor | float = 1.0) -> Tensor:
    """Factors `[m]` in [0, 1) that the proximal map of `strength * GS_k` puts on the groups.

    Args:
        norms: ||v_j||, `[m]`.
        k: groups that may stay, 1 <= k.
        strength: l > 0.
        d: group weights, `[m]` or one number.
    """
    v = norms.double()
    ld = strength * torch.as_tensor(d, dtype=torch.float64).expand_as(v)
    if int((v > 0).sum()) <= k:
        u = (v > 0).double()
        return (u / (u + ld)).to(norms.dtype)
    root = ld.sqrt() * v
    there = root > 0
    # in t = 1 / tau the sum is piecewise linear: group j joins at one point, leaves at another
    bounds = torch.cat([ld[there], 1 + ld[there]]) / root[there].repeat(2)
    points, order = bounds.sort()
    slopes = torch.cat([root[there], -root[there]])[order].cumsum(0)
    sums = torch.cat([torch.zeros(1).double(), (slopes[:-1] * points.diff()).cumsum(0)])
    past = int((sums < k).sum()) - 1  # the last point before the sum reaches k
    t = points[past] + (k - sums[past]) / slopes[past]
    u = (root * t - ld).clamp(0, 1)
    return (u / (u + ld)).to(norms.dtype)


@dataclass(frozen=True)
class WGSEF(TrainAndCut):
    """Proximal SGD with the k-level group envelope, then the zero groups are cut.

    Args:
        keep: share of the groups of every layer that may stay.
        strength: of the envelope at the first step, per unit of learning rate.
        rise: factor by which it has grown after the search.
        search: share of the steps in which it grows; a layer that still has more groups than its
            level then keeps the largest.
        lr: peak learning rate of `finetune`.
        streams: also groups that a statistic runs over.
    """

    keep: float = 0.5
    strength: float = 0.05
    rise: float = 1000.0
    search: float = 0.5
    lr: float = 0.05
    streams: bool = False

    info: ClassVar[MethodInfo] = MethodInfo(
        name="wgsef",
        title="Learning k-Level Structured Sparse Neural Networks Using Group Envelope "
        "Regularization",
        authors="Refael et al.",
        year=2024,
        room="weights/structured",
        kind="train-and-cut",
        card="130",
        needs=("data", "loss", "training"),
        pattern="coupled groups",
        budget="the same share of every layer",
        cost="one training; a proximal map (one sort) after every step of its first half",
        summary="train towards at most k non-zero channels a layer, then cut the zero ones",
    )

    def fit(
        self,
        model: nn.Module,
        example: Batch,
        batches: EpochBatches,
        *,
        epochs: int,
        steps_per_epoch: int,
        **training: Any,
    ) -> Fitted:
        """Train in place and cut.

        Raises:
            InvalidArgument: an option is out of range.
        """
        if not 0 < self.keep < 1 or not 0 < self.search < 1:
            raise InvalidArgument("keep= and search= lie in (0, 1)")
        if self.strength <= 0 or self.rise < 1:
            raise InvalidArgument("strength= is above 0 and rise= at least 1")
        coupling = trace(model, example)
        families = free_families(coupling, self.streams)
        total = epochs * steps_per_epoch
        searched = max(1, round(self.search * total))
        levels = [Level(model, coupling, f, max(1, round(self.keep * len(f)))) for f in families]

        def step(done: int) -> None:
            eta = max(self.lr * one_cycle(done - 1, total), 1e-8)
            strength = self.strength * self.rise ** (done / searched)
            for level in levels:
                level.step(eta * strength, last=done >= searched)

        finetune(
            model, batches, epochs=epochs, steps_per_epoch=steps_per_epoch, lr=self.lr,
            after_step=step, **training,
        )  # fmt: skip
        alive = [(f, (group_norms(model, coupling, f) > 0).numpy()) for f in families]
        return Fitted(cut_families(model, example, coupling, alive)[1])


def _slices(model: nn.Module, coupling: Coupling, family: Family) -> list[tuple[Tensor, int, Any]]:
    """(parameter, axis, row -> group) of what makes a channel: outputs, biases, scales."""
    named = dict(model.named_parameters())
    found: list[tuple[Tensor, int, Any]] = []
    order = {int(r): i for i, r in enumerate(family.roots)}
    for name, axis in family.axes:
        if name not in named:
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        output = 1 if type(owner).__name__ == "Conv1D" and named[name].ndim == 2 else 0
        if axis == output:
            index = [order.get(int(r), -1) for r in coupling.axes[name, axis]]
            found.append((named[name], axis, torch.tensor(np.asarray(index))))
    return found


@torch.no_grad()
def group_norms(model: nn.Module, coupling: Coupling, family: Family) -> Tensor:
    """||w_j|| of every group of a family, fp64 `[groups]`."""
    squares = torch.zeros(len(family), dtype=torch.float64)
    for parameter, axis, index in _slices(model, coupling, family):
        rows = parameter.detach().double().movedim(axis, 0).flatten(1 if parameter.ndim > 1 else 0)
        sums = rows.square().sum(1) if parameter.ndim > 1 else rows.square()
        inside = index >= 0
        squares.index_add_(0, index[inside], sums.cpu()[inside])
    return squares.sqrt()


class Level:
    """A family on its way to at most k groups, then held there.

    Attributes:
        support: groups that stay, bool `[groups]`; None while the strength still rises.
    """

    def __init__(self, model: nn.Module, coupling: Coupling, family: Family, k: int) -> None:
        self.model, self.coupling, self.family, self.k = model, coupling, family, k
        self.support: Tensor | None = None

    def step(self, strength: float, *, last: bool) -> None:
        """After an optimizer step: the map, or zeros on what has gone; `last` fixes the support."""
        if self.support is None:
            norms = group_norms(self.model, self.coupling, self.family)
            scale = proximal_scale(norms, self.k, strength)
            if int((scale > 0).sum()) <= self.k:
                self.support = scale > 0
            elif last:
                self.support = keep_top(norms * scale, self.k)
            factors = scale if self.support is None else scale * self.support
        else:
            factors = self.support.double()
        scale_groups(self.model, self.coupling, self.family, factors)


@torch.no_grad()
def scale_groups(model: nn.Module, coupling: Coupling, family: Family, scale: Tensor) -> None:
    """Multiply every group of a family by its factor, `[groups]`, in place."""
    for parameter, axis, index in _slices(model, coupling, family):
        factor = torch.where(index >= 0, scale[index.clamp_min(0)], 1.0).to(parameter)
        parameter.mul_(factor.view([-1 if d == axis else 1 for d in range(parameter.ndim)]))
