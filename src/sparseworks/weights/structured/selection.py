"""Which groups go: ladders of bundles in ascending importance, and a search for the budget.

A ladder is what shares one width: the groups of one family, or of several families that keep equal
shares (the same layer in every block, where one number in a config describes them all). Its bundles
go from the bottom up; all ladders compete by value.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.models.coupling import Coupling, Family

__all__ = ["Ladder", "Multiples", "OutOfReach", "kind", "ladders", "search", "under"]

Keep = NDArray[np.bool_]
Multiples = int | Mapping[str, int] | None  # of all widths, or of those under a name pattern


class OutOfReach(InvalidArgument):
    """The target lies below what is left when every width is at its floor."""


@dataclass(frozen=True)
class Ladder:
    """Bundles of group numbers, least important first, with ascending values.

    Args:
        families: whose groups these are.
        bundles: what goes together.
        values: importance of each bundle, never falling; what can only go together has one value,
            the mean.
        steps: numbers of removed bundles that are allowed.
    """

    families: tuple[Family, ...]
    bundles: tuple[NDArray[np.int64], ...]
    values: NDArray[np.float64]
    steps: tuple[int, ...]

    def removed(self, wanted: int) -> int:
        """The largest allowed number of bundles up to `wanted`."""
        return max(s for s in self.steps if s <= wanted)


def kind(family: Family) -> tuple[str, ...]:
    """What a family is apart from its place in the depth: its names without numbers."""
    return tuple(sorted({f"{re.sub(r'[0-9]+', '*', n)}:{a}" for n, a in family.axes}))


def ladders(
    coupling: Coupling,
    families: Sequence[Family],
    scores: NDArray[np.float64],
    *,
    normalise: bool | None,
    shared: Mapping[int, object],
    round_to: Multiples,
    floor: float,
) -> list[Ladder]:
    """Ladders of families from scores per group (index = group number; higher stays).

    Args:
        normalise: what scores are measured in: True, the mean of their family; False, the
            operations a group costs; None, as they are.
        shared: family index -> key; families with one key keep equal shares.
    """
    cost = {f.index: _saving(coupling, f) for f in families}
    members: dict[object, list[Family]] = {}
    for family in families:
        members.setdefault(shared.get(family.index, family.index), []).append(family)
    made = []
    for group in members.values():
        levels = reduce(math.gcd, (len(f) for f in group))
        totals = np.zeros(levels)
        parts: list[list[NDArray[np.int64]]] = [[] for _ in range(levels)]
        for family in group:
            s = scores[family.roots]
            if not np.isfinite(s).all():
                raise ModelError(
                    f"{family.axes[0][0]}: scores are not finite; are weights and data?"
                )
            if normalise:
                s = s / max(float(s.mean()), 1e-30)
            elif normalise is not None:
                s = s / max(cost[family.index], 1e-30)
            order = np.argsort(s, kind="stable")
            each = len(family) // levels
            for level in range(levels):
                chunk = order[level * each : (level + 1) * each]
                parts[level].append(family.roots[chunk])
                totals[level] += float(s[chunk].mean()) / len(group)
        steps = _steps(coupling, group, levels, [_multiple(f, round_to) for f in group], floor)
        for low, high in pairwise(steps):
            totals[low:high] = totals[low:high].mean()
        made.append(
            Ladder(
                tuple(group),
                tuple(np.concatenate(p) for p in parts),
                np.maximum.accumulate(totals),
                steps,
            )
        )
    return made


def _saving(coupling: Coupling, family: Family) -> float:
    """Operations that go with one group of a family."""
    keep = coupling.keep_all()
    keep[family.roots[0]] = False
    return coupling.flops() - coupling.flops(keep)


def under(name: str, pattern: str) -> bool:
    """The pattern matches the name or a module it lies in."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:i]), pattern) for i in range(1, len(parts) + 1))


def _multiple(family: Family, round_to: Multiples) -> int:
    """What the width of a family is a multiple of; of several patterns the first counts."""
    if not isinstance(round_to, Mapping):
        return math.lcm(round_to or 1, family.multiple)
    asked = (m for p, m in round_to.items() if under(family.axes[0][0], p))
    return math.lcm(next(asked, 1), family.multiple)


def _steps(
    coupling: Coupling, group: Sequence[Family], levels: int, multiples: list[int], floor: float
) -> tuple[int, ...]:
    """Removable numbers of bundles: some must stay, and widths are of these multiples."""
    fewest = max(-(-f.least * levels // len(f)) for f in group)
    least = max(1, math.ceil(floor * levels), fewest)
    steps = [0]
    for removed in range(1, levels - least + 1):
        widths = []
        for family in group:
            per, labels = _narrowest(coupling, family)
            widths.append(len(labels) - removed * (len(family) // levels) * per)
        if all(w % m == 0 for w, m in zip(widths, multiples)):
            steps.append(removed)
    return tuple(steps)


def _narrowest(coupling: Coupling, family: Family) -> tuple[int, NDArray[np.int64]]:
    """Entries of a group on the axis where it has the fewest (others hold gates, taps), and that
    axis' labels."""
    counted = [
        (int((coupling.axes[axis] == family.roots[0]).sum()), coupling.axes[axis])
        for axis in family.axes
    ]
    return min(counted, key=lambda pair: pair[0])


def search(
    coupling: Coupling,
    made: Sequence[Ladder],
    measure: Callable[[Keep], float],
    target: float,
    what: str,
) -> Keep:
    """The least removal, in order of value, at which `measure(keep) <= target`.

    Raises:
        OutOfReach: the target cannot be reached; the least that can is named.
    """
    pairs = sorted(
        (float(v), i, level)
        for i, ladder in enumerate(made)
        for level, v in enumerate(ladder.values)
    )

    def keep_at(count: int) -> Keep:
        wanted = np.zeros(len(made), int)
        for _, i, _ in pairs[:count]:
            wanted[i] += 1
        keep = coupling.keep_all()
        for ladder, n in zip(made, wanted):
            for bundle in ladder.bundles[: ladder.removed(int(n))]:
                keep[bundle] = False
        return keep

    least = measure(keep_at(len(pairs)))
    if least > target:
        raise OutOfReach(
            f"{what} cannot fall to {target:.4g}: {least:.4g} is left when every width is at its "
            "floor; lower `floor=`, allow more groups (include=, streams=True, uniform=False), or "
            "let whole blocks go (blocks=True)"
        )
    low, high = 0, len(pairs)
    while low < high:
        middle = (low + high) // 2
        if measure(keep_at(middle)) <= target:
            high = middle
        else:
            low = middle + 1
    return keep_at(high)
