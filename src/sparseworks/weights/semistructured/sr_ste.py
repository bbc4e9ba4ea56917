"""SR-STE (Zhou et al. 2021, Learning N:M Fine-grained Structured Sparse Neural Networks From
Scratch, arXiv:2102.04010).

Straight-through training with M = the n largest |theta| of every m inputs, chosen after every step,
and a pull on the pruned weights so that they stay pruned:

    g <- dL/dW + lambda (1 - M) * theta,    W = theta * M,

before momentum, beside ordinary weight decay. lambda = 0 is plain straight-through training; below
0 masks flip more. Under SGD with momentum mu the pull shrinks a pruned weight by a factor of about
exp(-X), X = lambda sum(lr) / (1 - mu), over a training (60 in the paper); a short training needs a
lambda that makes X more than 1. Adam rescales the pull per weight (see "ast" and "cast").

The released code adds the term inside the backward pass, so that loss scaling, clipping and
accumulated batches change it, and groups convolutions along the flattened kernel; here it is added
once a step and groups run along input channels. Its linear layer drops the bias.

In our quick setting (claim 096: four convolutions from scratch, 120 steps, X = 3) late masks flip
at less than 0.6 of the rate without the pull, and faster with a pull of the other sign; the loss is
not below that of plain straight-through training (1:8: 0.017 nats above, -0.014 to 0.048; 2:4:
0.010, -0.009 to 0.030).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.registry import MethodInfo
from sparseworks.training.straight_through import StraightThrough, masked_part
from sparseworks.training.swapping import StraightThroughRun

__all__ = ["SRSTE"]


@dataclass(frozen=True, kw_only=True)
class SRSTE(StraightThrough):
    """Train N:M weights from scratch, or a trained model on.

    Args:
        decay: lambda.
    """

    decay: float = 2e-4

    info: ClassVar[MethodInfo] = MethodInfo(
        name="sr-ste",
        title="Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch",
        authors="Zhou et al.",
        year=2021,
        card="096",
        room="weights",
        kind="hooked",
        needs=("training",),
        pattern="2:4 (any N:M; others by budget)",
        budget="that of N:M",
        cost="one selection per tensor every step; theta beside the weights",
        summary="straight-through N:M with a pull on pruned weights",
    )

    def __post_init__(self) -> None:
        if not math.isfinite(self.decay):
            raise InvalidArgument(f"sr-ste: decay={self.decay} must be finite")

    def add(
        self,
        run: StraightThroughRun,
        name: str,
        weight: Tensor,
        mask: Tensor,
        gradient: Tensor,
        scale: float,
    ) -> None:
        if self.decay:
            gradient.add_(masked_part(weight, mask), alpha=self.decay * scale)
