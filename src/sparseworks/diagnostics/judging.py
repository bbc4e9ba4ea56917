"""The verdict on a promise: fixed numbers of seeds, or looks at growing numbers of them.

A promise is a number per seed, oriented so that the paper promises it to be positive. With looks at
n_1 < ... < n_K seeds, look i takes the t interval of the first n_i seeds at the level

    1 - 0.05 (n_i - n_(i-1)) / n_K,   n_0 = 0,

and the first look that decides is the verdict. The errors allowed add up to 5 %, so by the union
bound a promise whose true value is 0 is decided either way with probability at most 5 %, however
the looks depend on each other (alpha spending in proportion to the seeds seen: Lan, DeMets 1983,
Discrete Sequential Boundaries for Clinical Trials; without their use of the joint distribution).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from sparseworks.core.errors import InvalidArgument
from sparseworks.diagnostics.statistics import paired_interval

__all__ = ["ERROR", "LOOKS", "Judgement", "Verdict", "judge", "levels"]

Verdict = Literal["holds", "fails", "inconclusive"]
ERROR = 0.05
LOOKS = (3, 5, 8, 12)


@dataclass(frozen=True)
class Judgement:
    """A verdict and the interval that gave it.

    Attributes:
        verdict: of the look that decided, else of the last.
        mean: over the seeds of that look.
        low, high: its interval, widened for the looks.
        seeds: how many seeds that look saw.
    """

    verdict: Verdict
    mean: float
    low: float
    high: float
    seeds: int


def levels(looks: Sequence[int]) -> tuple[float, ...]:
    """The level of the interval at each look.

    Raises:
        InvalidArgument: the numbers of seeds do not rise, or start below 2.
    """
    if not looks or looks[0] < 2 or any(a >= b for a, b in pairwise(looks)):
        raise InvalidArgument(
            f"looks={tuple(looks)}: rising numbers of seeds, the first at least 2"
        )
    return tuple(1 - ERROR * (b - a) / looks[-1] for a, b in pairwise((0, *looks)))


def judge(
    values: Sequence[float],
    *,
    looks: Sequence[int] = (),
    exact: bool = False,
    negligible: float | None = None,
) -> Judgement:
    """*holds* when the interval lies above 0, *fails* when below 0 or below `negligible`.

    Args:
        values: one per seed.
        looks: numbers of seeds after which a verdict may be taken; (): one look at all seeds.
        exact: the number has no randomness: it holds when every value is above 0, else it fails.
        negligible: an effect that is smaller is none; fixed beforehand. An interval around 0 that
            lies below it has shown that the promised effect is absent, which is a failure.
    """
    if exact:
        low, high = min(values), max(values)
        mean = sum(values) / len(values)
        return Judgement("holds" if low > 0 else "fails", mean, low, high, len(values))
    plan = list(zip(looks, levels(looks))) if looks else [(len(values), 1 - ERROR)]
    bound = max(0.0, negligible or 0.0)
    found = Judgement("inconclusive", sum(values) / len(values), -math.inf, math.inf, 0)
    for count, level in plan:
        if count > len(values):
            break
        seen = paired_interval(values[:count], level)
        verdict: Verdict = (
            "holds" if seen.low > 0 else "fails" if seen.high < bound else "inconclusive"
        )
        found = Judgement(verdict, seen.mean, seen.low, seen.high, count)
        if verdict != "inconclusive":
            break
    return found
