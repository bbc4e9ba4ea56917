"""What a method beside a training loop is: `Hooked`, or `Periodic` where masks move at times."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from sparseworks.core.budgets import Budget
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.patterns import Pattern
from sparseworks.core.registry import MethodInfo
from sparseworks.core.schedules import interval
from sparseworks.models.views import View

__all__ = ["Hooked", "Periodic"]

Run = Any  # of `training.hooked`, which imports this


@dataclass(frozen=True, kw_only=True)
class Hooked(ABC):
    """Base of methods that change masks while a model trains; frozen dataclasses of options.

    Args:
        pattern: legal zeros, where the call names none.
        budget: who pays, where the call names none.
    """

    pattern: str | Pattern = "unstructured"
    budget: str | Mapping[str, float] | Budget = "uniform"

    info: ClassVar[MethodInfo]
    starts_from_record: ClassVar[bool] = False
    embeddings: ClassVar[bool] = False  # embedding tables are masked too

    def takes(self, view: View) -> bool:
        """Is this one of the tensors that the method prunes?"""
        return True

    def why_not(self, view: View, pattern: Pattern) -> str:
        """Why the method leaves a tensor as it is; "" where it takes it."""
        return "" if self.takes(view) else f"not of the kind that {self.info.name!r} prunes"

    def begin(self, run: Run) -> None:  # noqa: B027
        """Choose the first masks, `run.masks[name]`; all weights are kept before this."""

    def wants_dense_gradients(self, run: Run) -> bool:
        """Must the next step's gradients also be kept for masked weights?"""
        return False

    def update(self, run: Run) -> None:  # noqa: B027
        """Called after every step of the run, `run.step` counted from 1."""


@dataclass(frozen=True)
class Periodic(Hooked):
    """Base of methods whose masks move every `run.every` steps.

    Args:
        every: steps between mask updates; None: `sw.schedules.interval(steps)`.
    """

    every: int | None = None

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise InvalidArgument(f"{self.info.name}: every={self.every} must be at least 1")

    def interval(self, steps: int | None) -> int:
        """Steps between the mask updates of a training of `steps`."""
        return interval(steps) if self.every is None else self.every
