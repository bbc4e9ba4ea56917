"""A measurement of a model, with a name, a unit and a direction."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from sparseworks.core.errors import DataError
from sparseworks.models.modes import evaluating

__all__ = ["Metric"]


@dataclass(frozen=True)
class Metric:
    """A named measurement of a model.

    Args:
        name: public string.
        unit: "" where the value is a plain number.
        higher_is_better: direction.
        measure: `(model) -> float`.
    """

    name: str
    unit: str
    higher_is_better: bool
    measure: Callable[[nn.Module], float]

    def __call__(self, model: nn.Module) -> float:
        """Evaluate in eval mode without gradients; the model's mode is restored."""
        with evaluating(model), torch.no_grad():
            value = float(self.measure(model))
        if math.isnan(value):
            raise DataError(f"metric {self.name}: the value is NaN")
        return value
