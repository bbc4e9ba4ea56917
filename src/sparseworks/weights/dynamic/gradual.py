"""Gradual magnitude pruning (Zhu & Gupta 2017, To Prune, or Not to Prune).

Every `every` steps the smallest |w| are masked so that the sparsity follows
s(t) = s_f (1 - (1 - t)^3), t the progress from `start` to `end`; masks never grow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from sparseworks.core.budgets import Budget
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.registry import MethodInfo
from sparseworks.core.schedules import cubic, periodic
from sparseworks.training.hooked import Periodic, Run
from sparseworks.weights.dynamic.masks import check_fraction, magnitudes, select_masks, span


@dataclass(frozen=True)
class Gradual(Periodic):
    """Mask ever more of the smallest weights while the model trains.

    Args:
        start: fraction of the training at which pruning starts.
        end: fraction at which the final sparsity is reached.
    """

    start: float = 0.0
    end: float = 0.75

    budget: str | Mapping[str, float] | Budget = field(default="global", kw_only=True)
    info: ClassVar[MethodInfo] = MethodInfo(
        name="gradual",
        title="To Prune, or Not to Prune: Exploring the Efficacy of Pruning for Model Compression",
        authors="Zhu & Gupta",
        year=2017,
        room="weights",
        kind="hooked",
        needs=("training",),
        budget="global",
        cost="one selection every `every` steps",
        summary="gradual magnitude pruning on a cubic schedule",
    )

    def __post_init__(self) -> None:
        check_fraction("gradual", start=self.start, end=self.end)
        super().__post_init__()
        if self.start > self.end:
            raise InvalidArgument(f"gradual: start={self.start} must be at most end={self.end}")

    def begin(self, run: Run) -> None:
        span(run, self.start, self.end)

    def sparsity_at(self, run: Run, step: int) -> float:
        """What the schedule says after this step: it moves every `every` steps and at its end."""
        first, last = span(run, self.start, self.end)
        if step < first:
            return 0.0
        moved = last if step >= last else first + (step - first) // run.every * run.every
        return cubic(moved, begin=first, end=last, final=run.sparsity or 0.0)

    def update(self, run: Run) -> None:
        first, last = span(run, self.start, self.end)
        if run.step == last or periodic(run.step, every=run.every, begin=first, end=last):
            select_masks(run, magnitudes(run), self.sparsity_at(run, run.step))
