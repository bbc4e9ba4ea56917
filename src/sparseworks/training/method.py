"""What a method of a training is: `Hooked` (`Periodic`: masks move at times), or `Transform`."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sparseworks.core.budgets import Budget
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.patterns import Pattern
from sparseworks.core.registry import MethodInfo
from sparseworks.core.schedules import interval
from sparseworks.models.views import View

__all__ = ["Hooked", "Periodic", "Transform"]

Run = Any  # of `training.hooked`, which imports this
Transformed = Any  # of `training.transformed`, likewise


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


@dataclass(frozen=True, kw_only=True)
class Transform(ABC):
    """Base of methods that change modules before training; frozen dataclasses of options.

    Args:
        pattern: legal zeros, where the call names none.
        budget: who pays, where the call names none.
    """

    pattern: str | Pattern = "unstructured"
    budget: str | Mapping[str, float] | Budget = "uniform"

    info: ClassVar[MethodInfo]
    needs_sparsity: ClassVar[bool] = True

    def begin(self, job: Transformed) -> None:  # noqa: B027
        """Change the model through `job.parametrize`, `job.replace` and `job.freeze` only, so that
        a failure can be undone."""

    def attached(self, job: Transformed) -> None:  # noqa: B027
        """Called once, when the optimizer is known (`job.optimizer`)."""

    def penalty(self, job: Transformed) -> Tensor | None:
        """A scalar to add to the loss of this step."""
        return None

    def update(self, job: Transformed) -> None:  # noqa: B027
        """Called without gradients after every optimizer step, `job.step` counted from 1."""

    def finish(self, job: Transformed) -> None:  # noqa: B027
        """Choose the final masks with `job.set_mask`; the job then folds what it parametrized."""

    def counted(self, job: Transformed) -> tuple[int, int] | None:
        """(kept, of how many) weights, where what is sparse is no masked parameter yet."""
        return None

    def state_dict(self, job: Transformed) -> dict[str, Any]:
        """State that neither the model nor the job holds."""
        return {}

    def load_state_dict(self, job: Transformed, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take back what `state_dict` gave."""
