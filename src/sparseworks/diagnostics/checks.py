"""What the rules of a fair comparison are made of: a check, its limits, facts of the arms."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sparseworks.core.errors import InvalidArgument
from sparseworks.diagnostics.arms import Arm

__all__ = [
    "Arms",
    "Check",
    "Limits",
    "dense_at_equal_cost",
    "equal_facts",
    "lacking_fact",
    "listed",
    "same_start",
    "sparse_arms",
    "spread",
    "total_cost",
]

Verdict = Literal["fair", "unfair", "unknown"]
Arms = Sequence[Arm]


@dataclass(frozen=True)
class Check:
    """What one rule found.

    Args:
        name: of the rule.
        verdict: unknown where facts are missing.
        reason: what was seen.
        advice: what to do; "" where it is fair.
        values: the fact per arm, None where it is missing.
    """

    name: str
    verdict: Verdict
    reason: str
    advice: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """Relative difference of costs that counts as equal, and the fewest seeds."""

    cost: float = 0.05
    seeds: int = 3

    def __post_init__(self) -> None:
        if not self.cost >= 0 or self.seeds < 1:
            raise InvalidArgument(f"cost={self.cost} must be at least 0, seeds={self.seeds} 1")


def lacking_fact(name: str, values: Mapping[str, Any], what: str, advice: str) -> Check | None:
    """An unknown where an arm lacks the fact."""
    missing = [n for n, v in values.items() if v is None]
    if not missing:
        return None
    return Check(name, "unknown", f"{what} is not known of {listed(missing)}", advice, values)


def listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def spread(values: Mapping[str, float]) -> tuple[str, str, float]:
    """Arms with the smallest and the largest number, and their ratio."""
    low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    ratio = values[high] / values[low] if values[low] > 0 else float("inf")
    return low, high, 1.0 if values[high] == values[low] else ratio


def sparse_arms(arms: Arms) -> list[Arm]:
    return [a for a in arms if not a.dense]


def total_cost(arm: Arm) -> float | None:
    """Cost of training with that of the starting weights."""
    own, before = arm.number("training_macs"), arm.number("start_macs")
    return None if own is None or before is None else own + before


def dense_at_equal_cost(arms: Arms, limits: Limits) -> list[Arm]:
    """Dense arms whose training cost lies where those of the sparse arms do."""
    costs = [c for a in sparse_arms(arms) if (c := a.number("training_macs"))]
    if not costs:
        return []
    low, high = min(costs) / (1 + limits.cost), max(costs) * (1 + limits.cost)
    return [a for a in arms if a.dense and low <= (a.number("training_macs") or -1) <= high]


def same_start(arms: Arms) -> bool | None:
    """Do the arms start from the same weights, seed by seed?"""
    starts = [{r.get("seed", i): r.get("start") for i, r in enumerate(a.runs)} for a in arms]
    if any(v is None for s in starts for v in s.values()):
        return None
    common = set.intersection(*(set(s) for s in starts))
    if not common:
        return None
    return all(len({s[seed] for s in starts}) == 1 for seed in common)


def equal_facts(name: str, arms: Arms, keys: Sequence[str], what: str, advice: str) -> Check:
    values = {a.name: {k: a.one(k) for k in keys} for a in arms}
    shown = {n: next(iter(v.values())) if len(keys) == 1 else v for n, v in values.items()}
    for key in keys:
        lacking = lacking_fact(name, {n: v[key] for n, v in values.items()}, key, f"say {key}")
        if lacking is not None:
            return lacking
    for key in keys:
        kinds = {json.dumps(v[key], sort_keys=True, default=str) for v in values.values()}
        if len(kinds) > 1:
            return Check(name, "unfair", f"{key} differs between the arms", advice, shown)
    return Check(name, "fair", what, values=shown)
