"""Budgets that are measured on the model: blocks that matter more keep more, under any score.

    sw.prune(model, "wanda", sparsity=0.6, budget="owl", data=batches)
    sw.prune(model, "sparsegpt", sparsity=0.6, budget="ecoflap:batches=8,reach=0.1", data=batches)

| budget | sensitivity of a block | sparsity of a block |
| --- | --- | --- |
| owl | share of outliers among abs(w) norm(x) | falls linearly, within 2 spread |
| alpha | heavy tails of the weights' spectra | rises linearly with the tail's exponent |
| ecoflap | zeroth-order size of the loss gradient | the rest in proportion, at most s + reach |
| cfsp | angle between the block's input and output | a sigmoid of it |

A block is what the first number in a name tells ("model.layers.3"); a tensor outside of any is one
of its own. The model is measured once, as it is given; a call of several rounds keeps its order.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from sparseworks.core.allocation import Sizes, by_groups
from sparseworks.core.budgets import Budget
from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.core.registry import Need
from sparseworks.models.calibration import Calibration
from sparseworks.models.calls import Batch, Loss
from sparseworks.models.views import View
from sparseworks.weights.oneshot.parts import made, text_of

__all__ = ["Blocks", "Measured", "Sensitivity", "block_of", "measured_budget"]

_NAMED = {
    "owl": "owl:OutlierRatios",
    "alpha": "alphapruning:HeavyTails",
    "ecoflap": "ecoflap:ZerothOrder",
    "cfsp": "coarse:CoarseToFine",
}

Blocks = Mapping[str, Sequence[View]]
"""Group -> its tensors, in the model's order."""


@dataclass(frozen=True)
class Measured:
    """What a sensitivity is measured on.

    Args:
        model: as it is given.
        batches: calibration batches; None where the budget needs none.
        loss: `(model, batch) -> scalar`; cross-entropy when None.
        calibration: how evidence is collected.
        seed: for what is drawn at random.
    """

    model: nn.Module
    batches: Sequence[Batch] | None
    loss: Loss | None
    calibration: Calibration | None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Sensitivity(ABC):
    """A budget by sensitivity; subclasses are frozen dataclasses whose fields are options.

    Args:
        per: what has one density: every "block", or every "tensor".
    """

    per: Literal["block", "tensor"] = "block"

    name: ClassVar[str]
    needs: ClassVar[tuple[Need, ...]] = ()

    def __post_init__(self) -> None:
        if self.per not in ("block", "tensor"):
            raise InvalidArgument(f"budget {self.name}: per={self.per!r}; 'block' or 'tensor'")

    @abstractmethod
    def measure(self, on: Measured, blocks: Blocks) -> dict[str, float]:
        """The sensitivity of every group, finite."""

    @abstractmethod
    def keep(
        self, sensitivity: Mapping[str, float], sizes: Sizes, sparsity: float
    ) -> Mapping[str, float]:
        """Weights to keep per group."""

    def budget(self, on: Measured, views: Sequence[View]) -> Budget:
        """The budget of these tensors, measured.

        Raises:
            ModelError: a sensitivity is not finite.
        """
        blocks: dict[str, list[View]] = {}
        for view in views:
            blocks.setdefault(self.group_of(view), []).append(view)
        return self.budget_of(self.measure(on, blocks), views)

    def budget_of(self, sensitivity: Mapping[str, float], views: Sequence[View]) -> Budget:
        """The budget of these tensors, from the sensitivity of every group."""
        for group, value in sensitivity.items():
            if not math.isfinite(value):
                raise ModelError(f"budget {self.name}: the sensitivity of {group} is {value}")
        groups = {v.name: self.group_of(v) for v in views}
        return by_groups(groups, lambda sizes, s: self.keep(sensitivity, sizes, s), self.name)

    def group_of(self, view: View) -> str:
        """What a tensor shares its density with."""
        return view.name if self.per == "tensor" else block_of(view)

    def __str__(self) -> str:
        """The text that makes this budget again."""
        return text_of(self.name, self)


def block_of(view: View) -> str:
    """The block of a tensor: its module's name up to the first number, or all of the name."""
    parts = view.module_name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return view.name


def measured_budget(budget: Any) -> Sensitivity | None:
    """A sensitivity from "name" or "name:option=value,...", itself, or None where it is none.

    Raises:
        InvalidArgument: an option that the budget does not have, or cannot take.
    """
    if isinstance(budget, Sensitivity):
        return budget
    if not isinstance(budget, str):
        return None
    found: Sensitivity | None = made("budget", budget, _NAMED)
    return found
