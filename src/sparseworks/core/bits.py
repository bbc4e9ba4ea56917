"""Bits by sensitivity: which layer gets how many, for a mean that must not be exceeded."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence

from sparseworks.core.errors import InvalidArgument

__all__ = ["bits_by_sensitivity"]


def bits_by_sensitivity(
    sensitivity: Mapping[str, float], sizes: Mapping[str, int], levels: Sequence[int], mean: float
) -> dict[str, int]:
    """Every layer at the most bits; then, until the mean is reached, the one of least s_l for each
    bit that it saves goes down by a level.

    Args:
        sensitivity: s_l of every layer, finite; negative ones count as 0.
        sizes: weights of every layer.
        levels: bits that there are.
        mean: sum of size * bits over sum of size, at most.

    Returns:
        Layer -> bits.

    Raises:
        InvalidArgument: no level is as low as the mean, or a sensitivity is not finite.
    """
    down = sorted(set(levels), reverse=True)
    if not down or mean < down[-1]:
        raise InvalidArgument(f"a mean of {mean} bits is not reached with levels {list(levels)}")
    for name in sizes:
        if not math.isfinite(sensitivity[name]):
            raise InvalidArgument(f"the sensitivity of {name} is {sensitivity[name]}")
    place = dict.fromkeys(sizes, 0)
    order = {name: i for i, name in enumerate(sizes)}
    allowed = mean * sum(sizes.values())
    spent = down[0] * sum(sizes.values())

    def step(name: str) -> tuple[float, int, str]:
        saved = sizes[name] * (down[place[name]] - down[place[name] + 1])
        return max(0.0, sensitivity[name]) / saved, order[name], name

    waiting = [step(n) for n in sizes if len(down) > 1]
    heapq.heapify(waiting)
    while spent > allowed * (1 + 1e-12):
        _, _, name = heapq.heappop(waiting)
        spent -= sizes[name] * (down[place[name]] - down[place[name] + 1])
        place[name] += 1
        if place[name] + 1 < len(down):
            heapq.heappush(waiting, step(name))
    return {name: down[i] for name, i in place.items()}
