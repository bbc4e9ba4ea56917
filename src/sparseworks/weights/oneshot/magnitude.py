"""Magnitude pruning (Han et al. 2015, Learning both Weights and Connections).

score_ij = |W_ij|^p
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.registry import MethodInfo
from sparseworks.weights.oneshot.base import OneShot, Target


@dataclass(frozen=True)
class Magnitude(OneShot):
    """Keep the largest |w|.

    Args:
        power: |w|^power is what units add up; 1 or 2 differ only for blocks and rows.
    """

    power: float = 1.0

    info: ClassVar[MethodInfo] = MethodInfo(
        name="magnitude",
        title="Learning both Weights and Connections for Efficient Neural Networks",
        authors="Han et al.",
        year=2015,
        room="weights",
        kind="one-shot",
        cost="one pass over the weights",
        summary="keep the largest |w|",
    )

    def __post_init__(self) -> None:
        if not self.power > 0:
            raise InvalidArgument(f"magnitude: power={self.power} must be positive")

    def by_rows(self) -> bool:
        return type(self) is Magnitude

    def score(self, target: Target, weight: Tensor, evidence: Any) -> Tensor:
        return weight.abs() if self.power == 1.0 else weight.abs().pow(self.power)
