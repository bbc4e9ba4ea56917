"""TEAL (Liu et al. 2024, Training-Free Activation Sparsity in Large Language Models,
arXiv:2408.14690): inputs of every linear layer with |x_i| <= t are set to 0, with t the
s-quantile of |x| over calibration tokens. The baseline of the methods that also look at W.

Of the paper's greedy choice of a sparsity for each layer see `allocation="greedy"`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparseworks.activations.calibrating import Reader
from sparseworks.activations.method import ByInputs
from sparseworks.core.registry import MethodInfo

__all__ = ["TEAL"]


@dataclass(frozen=True)
class TEAL(ByInputs):
    """Score |x_i|."""

    info: ClassVar[MethodInfo] = MethodInfo(
        name="teal",
        title="Training-Free Activation Sparsity in Large Language Models",
        authors="Liu et al.",
        year=2024,
        room="activations",
        kind="activation",
        needs=("data",),
        pattern="inputs of a token",
        tensors="inputs of linear layers",
        cost="one pass over the calibration data",
        summary="inputs below a quantile of |x| count as 0",
    )

    def weight(self, reader: Reader) -> Tensor | None:
        return None
