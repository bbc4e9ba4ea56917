"""Goals, and the search for the models that meet them within a time.

A *ladder* is a series of models of one kind, each rung cheaper and worse than the one before (more
zeros, say). What a goal asks is then met from some rung on (latency, size, flops) or up to some
rung (quality), and bisection finds the last or first such rung in log2 of the rungs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparseworks.core.errors import InvalidArgument

__all__ = ["GOALS", "Goal", "Rung", "best_of", "parse_goals", "search", "seconds_of", "shares"]

GOALS = ("latency", "size", "flops", "quality")
_FEW = 3  # rungs that are all tried
_LATE = "no time was left"
_UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Goal:
    """What a model must reach, as a share of the dense one.

    Args:
        name: latency, size or flops (at most `share` of the dense model's), or quality (at least).
        share: in (0, 1]; of quality also above 1.
    """

    name: str
    share: float

    def met(self, row: Mapping[str, float]) -> bool:
        """Is it, by a model of these `shares`?"""
        value = row.get(self.name)
        if value is None:
            return False
        return value >= self.share if self.name == "quality" else value <= self.share


@dataclass(frozen=True)
class Rung:
    """A model that may be tried.

    Args:
        ladder: what it is of.
        text: methods one after the other, as `sparseworks compare` takes them; "" for none.
        amounts: of what they sweep.
        dtype: what products or weights are kept in when it runs.
    """

    ladder: str
    text: str
    amounts: tuple[tuple[str, Any], ...]
    dtype: str


def parse_goals(texts: Iterable[str]) -> tuple[Goal, ...]:
    """Goals from "latency=0.5", "quality=0.99".

    Raises:
        InvalidArgument: another name, twice the same, or no share.
    """
    goals = []
    for text in texts:
        name, _, value = text.partition("=")
        try:
            share = float(value)
        except ValueError:
            share = math.nan
        if name not in GOALS or not 0 < share < math.inf or (share > 1 and name != "quality"):
            raise InvalidArgument(
                f"goal {text!r}: one of {', '.join(GOALS)}, =, and a share of the dense model's: "
                "latency=0.5 (at most half of its time), quality=0.99 (at least 99 % of it)"
            )
        goals.append(Goal(name, share))
    if len({g.name for g in goals}) < len(goals):
        raise InvalidArgument(f"goals {[g.name for g in goals]}: each once")
    return tuple(goals)


def seconds_of(text: str) -> float:
    """Seconds of "90s", "30m", "2h".

    Raises:
        InvalidArgument: no such time.
    """
    number, unit = text[:-1], text[-1:]
    try:
        value = float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        value = math.nan
    if not 0 < value < math.inf:
        raise InvalidArgument(f"time {text!r}: a number and s, m or h: 30m")
    return value


def shares(row: Mapping[str, Any], dense: Mapping[str, Any], higher: bool) -> dict[str, float]:
    """Of the dense model's: latency, size and flops (less is better), quality (more is better).

    Args:
        row: `quality`, and where they are measured `speedup` over the dense model in torch, timed
            in turns with it, `bytes` and `flops`.
        dense: of the dense model.
        higher: is more of the metric better? Otherwise its inverse counts.
    """
    found = {"latency": 1 / row["speedup"]} if row.get("speedup") else {}
    for name, column in (("size", "bytes"), ("flops", "flops")):
        if row.get(column) is not None and dense.get(column):
            found[name] = row[column] / dense[column]
    mine, whole = (row["quality"], dense["quality"]) if higher else (
        dense["quality"], row["quality"]
    )  # fmt: skip
    found["quality"] = mine / whole if whole > 0 and math.isfinite(mine / whole) else 0.0
    return found


def search(
    ladders: Sequence[Sequence[Rung]],
    goals: Sequence[Goal],
    measure: Callable[[Rung], Mapping[str, float]],
    seconds: float,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[dict[Rung, Mapping[str, float]], dict[Rung, str]]:
    """Try what decides first, ladder by ladder, while there is time.

    Without goals every rung is tried. With a goal of cost the first rung, the best one, is looked
    at before the bisection. A rung is begun only while the longest one so far would still
    fit, so the time is kept but for the first.

    Args:
        ladders: the most promising first.
        goals: those of latency, size and flops are met from some rung on; quality up to some rung.
        measure: the `shares` of a rung; one that raises `InvalidArgument` is told as not possible.
        seconds: for all.

    Returns:
        The shares of what was tried, and why the rest was not.
    """
    costs = [g for g in goals if g.name != "quality"]
    quality = [g for g in goals if g.name == "quality"]
    end = clock() + seconds
    longest = 0.0
    tried: dict[Rung, Mapping[str, float]] = {}
    left: dict[Rung, str] = {}

    def look(rung: Rung) -> bool:
        """Was it tried, now or before?"""
        nonlocal longest
        if rung in tried:
            return True
        begin = clock()
        if begin + longest > end:
            left[rung] = _LATE
            return False
        try:
            tried[rung] = measure(rung)
        except InvalidArgument as error:
            left[rung] = f"not possible: {error}"
        longest = max(longest, clock() - begin)
        return rung in tried

    for ladder in ladders:
        if not goals or len(ladder) <= _FEW:
            for rung in ladder:
                look(rung)
            continue
        if costs and look(ladder[0]) and all(g.met(tried[ladder[0]]) for g in costs):
            continue  # the best of the ladder is cheap enough
        low, high = 0, len(ladder)  # the first rung that costs little enough, or that is too bad
        while low < high:
            middle = (low + high) // 2
            rung = ladder[middle]
            if not look(rung):
                break
            cheap = all(g.met(tried[rung]) for g in costs)
            over = cheap if costs else not all(g.met(tried[rung]) for g in quality)
            low, high = (low, middle) if over else (middle + 1, high)
    for ladder in ladders:
        late = any(left.get(rung) == _LATE for rung in ladder)
        for rung in ladder:
            if rung not in tried:
                left.setdefault(rung, _LATE if late else "its neighbours tell")
    return tried, left


def best_of(tried: Mapping[Rung, Mapping[str, float]], goals: Sequence[Goal]) -> Rung | None:
    """The model under the goals: of the most quality; with a goal of quality alone or beside
    others, the fastest (the smallest, where no time was measured). None where none meets them.
    """
    good = {r: s for r, s in tried.items() if all(g.met(s) for g in goals)}
    if any(g.name == "quality" for g in goals):

        def cost(rung: Rung) -> float:
            found = good[rung]
            return found.get("latency", found.get("size", 1.0))

        return min(good, key=cost, default=None)
    return max(good, key=lambda r: good[r]["quality"], default=None)
