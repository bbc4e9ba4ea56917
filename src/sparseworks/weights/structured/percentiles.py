"""Which channels stay when every group of layers has its own percentile of batch-norm scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from sparseworks.core.errors import InvalidArgument
from sparseworks.models.coupling import Coupling
from sparseworks.weights.structured.scales import Keep, Scales, under

__all__ = ["group_keep", "percentiles_for"]


def group_keep(
    coupling: Coupling,
    scales: Sequence[Scales],
    groups: Sequence[str],
    percentiles: Sequence[float],
    votes: int = 1,
    floor: float = 0.01,
) -> Keep:
    """True for the group numbers that stay.

    Args:
        coupling: of the model.
        scales: its families with batch-norm scales.
        groups: a name pattern per group of layers; a batch norm belongs to the first that matches,
            and keeps everything when none does.
        percentiles: p_g in [0, 1), the share of the scales of the group under its threshold.
        votes: norms of a stream that must want a channel (all of them where there are fewer).
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
        count = int(p * len(every))
        lines.append(float(every[count - 1]) if count else -1.0)
    keep = coupling.keep_all()
    for s in scales:
        table = s.table()
        line = torch.tensor([-1.0 if (g := place[n]) is None else lines[g] for n in s.entries])
        wanted = (table > line[:, None]).sum(0)
        here = (~table.isnan()).sum(0)
        stays = wanted >= here.clamp(max=votes)
        least = max(1, math.ceil(floor * len(s.family)))
        if int(stays.sum()) < least:
            stays[s.mean().argsort(descending=True, stable=True)[:least]] = True
        keep[s.family.roots[~stays.numpy()]] = False
    return keep


def percentiles_for(
    weights: Sequence[float],
    choose: Callable[[Sequence[float]], Keep],
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
    low = 0.0
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (low, middle) if measure(choose(at(middle))) <= goal else (middle, high)
    return at(high)
