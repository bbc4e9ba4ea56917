"""Schedules: when, and how much. Pure functions of the step; no state.

`begin` and `end` are steps; before `begin` the value is `initial`, from `end` on it is `final`.
"""

from __future__ import annotations

import math

from sparseworks.core.errors import InvalidArgument

__all__ = [
    "cosine",
    "cubic",
    "exponential_rounds",
    "interval",
    "linear",
    "one_shot",
    "periodic",
]


def _progress(step: int, begin: int, end: int) -> float:
    if end < begin or begin < 0:
        raise InvalidArgument(f"schedule: begin={begin}, end={end}; 0 <= begin <= end is needed")
    if step >= end:
        return 1.0
    return max(0.0, (step - begin) / (end - begin))


def one_shot(step: int, *, at: int, final: float, initial: float = 0.0) -> float:
    """`final` from step `at` on.

    Examples:
        >>> one_shot(9, at=10, final=0.8), one_shot(10, at=10, final=0.8)
        (0.0, 0.8)
    """
    return final if step >= at else initial


def linear(step: int, *, begin: int, end: int, final: float, initial: float = 0.0) -> float:
    """s = s_i + (s_f - s_i) * t, with t the progress from `begin` to `end`.

    Examples:
        >>> linear(5, begin=0, end=10, final=0.8)
        0.4
    """
    return initial + (final - initial) * _progress(step, begin, end)


def cubic(step: int, *, begin: int, end: int, final: float, initial: float = 0.0) -> float:
    """s = s_f + (s_i - s_f) * (1 - t)^3 (Zhu & Gupta 2017, To Prune, or Not to Prune).

    Examples:
        >>> round(cubic(5, begin=0, end=10, final=0.8), 6)
        0.7
    """
    return final + (initial - final) * (1.0 - _progress(step, begin, end)) ** 3


def cosine(step: int, *, begin: int, end: int, initial: float, final: float = 0.0) -> float:
    """v = v_f + (v_i - v_f) * (1 + cos(pi t)) / 2, the drop fraction of RigL and SET.

    Examples:
        >>> round(cosine(5, begin=0, end=10, initial=0.3), 6)
        0.15
    """
    return final + (initial - final) * 0.5 * (1 + math.cos(math.pi * _progress(step, begin, end)))


def periodic(step: int, *, every: int, begin: int = 0, end: int | None = None) -> bool:
    """True at the steps begin, begin + every, ... up to and including `end`.

    Examples:
        >>> [s for s in range(10) if periodic(s, every=3, begin=2, end=8)]
        [2, 5, 8]
    """
    if every < 1:
        raise InvalidArgument(f"schedule: every={every} must be at least 1")
    return step >= begin and (end is None or step <= end) and (step - begin) % every == 0


def interval(steps: int | None, *, updates: int = 20, most: int = 100) -> int:
    """Steps between updates, where nobody chose: steps / updates rounded down, 1 to `most`.

    Examples:
        >>> interval(12), interval(500), interval(10_000)
        (1, 25, 100)
    """
    return most if steps is None else max(1, min(most, steps // updates))


def exponential_rounds(rounds: int, final: float) -> list[float]:
    """Sparsities 1 - (1 - s)^(r / R) for r = 1..R: every round drops the same share of the rest.

    Examples:
        >>> [round(s, 3) for s in exponential_rounds(2, 0.75)]
        [0.5, 0.75]
    """
    if rounds < 1:
        raise InvalidArgument(f"rounds={rounds} must be at least 1")
    steps = [1.0 - (1.0 - final) ** (r / rounds) for r in range(1, rounds)]
    return [*steps, final]
