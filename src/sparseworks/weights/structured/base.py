"""What a structured method is: a score of groups, or a training that ends in a cut.

`slim` does the rest: it finds the groups, chooses by the scores, cuts, checks and undoes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from sparseworks.core.registry import MethodInfo
from sparseworks.core.types import Progress
from sparseworks.models.calls import Arguments, Batch, Loss, TaskLoss
from sparseworks.models.coupling import Coupling, Family

__all__ = ["EpochBatches", "Fitted", "GroupScore", "Scores", "TrainAndCut", "WholeModel"]

Scores = NDArray[np.float64]
EpochBatches = Callable[[int], Iterable[Batch]]
"""Epoch number -> the batches of that epoch."""


class _Calibrated(ABC):
    """What looks at calibration data."""

    info: ClassVar[MethodInfo]

    def example(self, model: nn.Module, data: Iterable[Batch]) -> Arguments:
        """What the model is called with, from the data of the method."""
        return Arguments.of_batch(next(iter(data)))


class GroupScore(_Calibrated):
    """Base of methods that score groups, higher = keep; frozen dataclasses of options.

    Attributes:
        normalise: what scores are measured in when families compete: True, the mean of their
            family; False, the cost that a group takes; None, themselves.
        calibrates: `data` are batches of the model's own inputs.
        uniform: every block keeps one width; None: where a config tells the width.
    """

    info: ClassVar[MethodInfo]
    normalise: ClassVar[bool | None] = True
    calibrates: ClassVar[bool] = True
    uniform: ClassVar[bool | None] = None

    def takes(self, coupling: Coupling, family: Family) -> bool:
        """Is this a kind of width that the method cuts?"""
        return True

    @abstractmethod
    def score(
        self, model: nn.Module, coupling: Coupling, data: Iterable[Batch] | None, loss: Loss | None
    ) -> Scores:
        """Scores by group number, `[groups]`; the model stays as it is."""


@dataclass(frozen=True)
class Fitted:
    """What a training that ends in a cut did.

    Args:
        widths: a parameter that makes the width -> groups before and after.
    """

    widths: Mapping[str, tuple[int, int]]

    def figures(self) -> dict[str, Any]:
        """What else there is to say, in JSON values."""
        others = {k: v for k, v in vars(self).items() if k != "widths"}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in others.items()}


class TrainAndCut(ABC):
    """Base of methods that train towards a cut and make it; frozen dataclasses of options."""

    info: ClassVar[MethodInfo]

    @abstractmethod
    def fit(
        self,
        model: nn.Module,
        example: Batch,
        batches: EpochBatches,
        *,
        epochs: int,
        steps_per_epoch: int,
        loss: TaskLoss | None = None,
        progress: Progress | None = None,
    ) -> Fitted:
        """Train in place and cut.

        Args:
            model: changed in place; where it fails midway, `slim` puts it back.
            example: one batch, to trace the model.
            batches: epoch number -> batches.
            epochs: passes.
            steps_per_epoch: batches of a pass.
            loss: `(model, batch, logits) -> scalar`; cross-entropy when None.
            progress: called with (done, total, what).
        """


class WholeModel(_Calibrated):
    """Base of methods that change the whole model by themselves; frozen dataclasses of options."""

    @abstractmethod
    def slim(
        self,
        model: nn.Module,
        example: Arguments,
        targets: Mapping[str, float | None],
        batches: Sequence[Batch] | None,
    ) -> Any:
        """Change the model in place, or not at all where it fails; returns a `SlimResult`.

        Args:
            targets: "flops", "params" and "latency" as `slim` was given them.
            batches: calibration data.
        """
