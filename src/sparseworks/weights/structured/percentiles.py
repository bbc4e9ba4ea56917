"""Which channels stay when every group of layers has its own percentile of batch-norm scales.

Percentiles from sensitivity: with L_g(p) the loss of quality when g alone is cut at p,

    p_g(d) = the largest p with L_g(q) <= d for all q <= p,

and the least d that meets the budget: every group bears as much as the others.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import nn

from sparseworks.core.errors import InvalidArgument
from sparseworks.models.calls import Batch
from sparseworks.models.coupling import Coupling
from sparseworks.weights.structured.scales import Keep, Scales, cut_folded
from sparseworks.weights.structured.selection import under

__all__ = ["Votes", "group_keep", "loss_curves", "percentiles_by_loss", "percentiles_for"]

Votes = Literal["half", "any", "all"]
Choose = Callable[[Sequence[float]], Keep]
Curve = Sequence[tuple[float, float]]
"""Points (p, loss), p rising."""


def group_keep(
    coupling: Coupling,
    scales: Sequence[Scales],
    groups: Sequence[str],
    percentiles: Sequence[float],
    votes: Votes = "half",
    floor: float = 0.01,
) -> Keep:
    """True for the group numbers that stay.

    Args:
        coupling: of the model.
        scales: its families with batch-norm scales.
        groups: a name pattern per group of layers; a batch norm belongs to the first that matches,
            and keeps everything when none does.
        percentiles: p_g in [0, 1); the threshold is entry int(p_g n) of the n sorted scales of the
            group, counted from 0, and a norm wants what lies strictly above; 0 keeps all.
        votes: norms of a stream that must want a channel: "half" of those that hold it, "any", or
            "all".
        floor: share of every family that stays at least, and never less than one.
    """
    place = {
        name: next((i for i, g in enumerate(groups) if under(name, g)), None)
        for s in scales
        for name in s.entries
    }
    lines = []
    for i, p in enumerate(percentiles):
        values = [
            gamma.detach().abs()[index >= 0].double()
            for s in scales
            for name, (gamma, index) in s.entries.items()
            if place[name] == i
        ]
        every = torch.cat(values).sort().values if values else torch.zeros(0).double()
        lines.append(float(every[int(p * len(every))]) if p > 0 and len(every) else -1.0)
    keep = coupling.keep_all()
    for s in scales:
        table = s.table()
        line = torch.tensor([-1.0 if (g := place[n]) is None else lines[g] for n in s.entries])
        wanted = (table > line[:, None]).sum(0)
        here = (~table.isnan()).sum(0)
        needed = {"half": (here + 1) // 2, "any": here.clamp(max=1), "all": here}[votes]
        stays = wanted >= needed
        least = max(1, math.ceil(floor * len(s.family)))
        if int(stays.sum()) < least:
            stays[s.mean().argsort(descending=True, stable=True)[:least]] = True
        keep[s.family.roots[~stays.numpy()]] = False
    return keep


def percentiles_for(
    weights: Sequence[float],
    choose: Choose,
    measure: Callable[[Keep], float],
    goal: float,
    most: float = 0.95,
) -> tuple[float, ...]:
    """p_g = min(most, t w_g) with the least t at which `measure(choose(p)) <= goal`.

    Raises:
        InvalidArgument: not reached with every group at `most`.
    """

    def at(t: float) -> tuple[float, ...]:
        return tuple(min(most, t * w) for w in weights)

    high = most / min((w for w in weights if w > 0), default=1.0)
    if measure(choose(at(high))) > goal:
        raise InvalidArgument(f"{goal:.4g} is not reached with {most:.0%} of every group cut")
    return _least(at, high, choose, measure, goal)


def loss_curves(
    model: nn.Module,
    example: Batch,
    coupling: Coupling,
    scales: Sequence[Scales],
    groups: Sequence[str],
    quality: Callable[[nn.Module], float],
    grid: Sequence[float],
    data: Sequence[Batch] = (),
) -> list[Curve]:
    """What the quality of the model loses when one group alone is cut, for every group.

    Args:
        model: stays as it is; copies are cut.
        example: one batch, for the tracing.
        coupling: of the model.
        scales: its families with batch-norm scales.
        groups: see `group_keep`.
        quality: higher is better, on data that is neither trained nor tested on.
        grid: percentiles to try, rising, in (0, 1).
        data: batches whose means the next layers take over from cut channels.
    """
    whole, curves = quality(model), list[Curve]()
    for i in range(len(groups)):
        curve = [(0.0, 0.0)]
        for p in grid:
            alone = [p if j == i else 0.0 for j in range(len(groups))]
            twin = copy.deepcopy(model)
            cut_folded(twin, example, coupling, group_keep(coupling, scales, groups, alone), data)
            curve.append((p, whole - quality(twin)))
        curves.append(curve)
    return curves


def percentiles_by_loss(
    curves: Sequence[Curve],
    choose: Choose,
    measure: Callable[[Keep], float],
    goal: float,
) -> tuple[float, ...]:
    """The percentiles p_g(d) with the least d at which `measure(choose(p)) <= goal`.

    Losses are interpolated between the points of a curve; a group goes no further than its last.

    Raises:
        InvalidArgument: not reached with every group at the last point of its curve.
    """

    def at(d: float) -> tuple[float, ...]:
        return tuple(_bearable(c, d) for c in curves)

    high = max((loss for c in curves for _, loss in c), default=0.0)
    if measure(choose(at(high))) > goal:
        raise InvalidArgument(f"{goal:.4g} is not reached at the last point of every curve")
    return _least(at, high, choose, measure, goal)


def _bearable(curve: Curve, d: float) -> float:
    """The largest p up to which the loss, linear between points, stays at most d."""
    best = curve[0][0]
    for (p, a), (q, b) in pairwise(curve):
        if b > d:
            return max(best, p + (q - p) * (d - a) / (b - a)) if a <= d else best
        best = q
    return best


def _least(
    at: Callable[[float], tuple[float, ...]],
    high: float,
    choose: Choose,
    measure: Callable[[Keep], float],
    goal: float,
) -> tuple[float, ...]:
    """at(t) of the least t in [0, high] that meets the goal, which `high` does."""
    low = 0.0
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (low, middle) if measure(choose(at(middle))) <= goal else (middle, high)
    return at(high)
