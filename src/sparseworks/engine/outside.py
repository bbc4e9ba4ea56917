"""How much of a plan's time torch takes, and with what."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from sparseworks.engine.experts import Experts
from sparseworks.engine.measuring import one_thread
from sparseworks.engine.plan import Plan
from sparseworks.engine.steps import Call

__all__ = ["Outside", "outside"]

_REPEATS = 5
_NAMED = 6  # operators that are named one by one


@dataclass(frozen=True)
class Outside:
    """What runs outside programs.

    Args:
        share: of the time of a call, from 0 to 1.
        operators: share of each of torch's operators, the largest first; what follows from sizes
            alone is computed once and not counted.
    """

    share: float
    operators: Mapping[str, float]

    def line(self) -> str:
        if not self.operators:
            return "outside programs, in torch: nothing"
        named = [f"{name} {share:.1%}" for name, share in list(self.operators.items())[:_NAMED]]
        more = len(self.operators) - len(named)
        rest = f" and {more} more" if more > 0 else ""
        return f"outside programs, in torch: {self.share:.1%} of the time: {', '.join(named)}{rest}"


@torch.no_grad()
def outside(plan: Plan, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Outside:
    """Time every step of a call by itself; of several calls the least."""
    flat = plan.signature.flat(args, kwargs)
    given = dict(zip(plan.signature.inputs, flat, strict=True))
    least: dict[int, float] = {}
    with one_thread() if plan.light else nullcontext():
        for _ in range(_REPEATS):
            values: dict[str, Any] = {**plan.constants, **given}
            for number, step in enumerate(plan.steps):
                start = time.perf_counter()
                if isinstance(step, Call):
                    values[step.name] = step(values)
                else:
                    read = {name: values[name] for name in step.inputs}
                    values.update(step.run(read, {name: values[name] for name in step.masks}))
                taken = time.perf_counter() - start
                least[number] = min(least.get(number, taken), taken)
    counted = {id(step) for step in plan.rest}
    spent: dict[str, float] = {}
    total = 0.0
    for number, step in enumerate(plan.steps):
        if id(step) in counted:
            total += least[number]
            if isinstance(step, Call) and not isinstance(step, Experts):
                spent[step.target] = spent.get(step.target, 0.0) + least[number]
    ranked = sorted(spent.items(), key=lambda item: -item[1])
    operators = {name: seconds / max(total, 1e-12) for name, seconds in ranked}
    return Outside(sum(operators.values()), operators)
