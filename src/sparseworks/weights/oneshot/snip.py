"""SNIP (Lee et al. 2019, Single-shot Network Pruning based on Connection Sensitivity).

score_ij = |W_ij * dL/dW_ij|, the first-order change of the loss when the weight is removed; on an
untrained or a trained network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from sparseworks.core.budgets import Budget
from sparseworks.core.registry import MethodInfo
from sparseworks.models.calls import Batch, Loss
from sparseworks.models.views import View
from sparseworks.weights.oneshot.base import OneShot, Target
from sparseworks.weights.oneshot.gradients import mean_gradients


@dataclass(frozen=True)
class Snip(OneShot):
    """Keep the weights with the largest |w * gradient|; one threshold over the whole model."""

    budget: str | Mapping[str, float] | Budget = field(default="global", kw_only=True)
    info: ClassVar[MethodInfo] = MethodInfo(
        name="snip",
        title="SNIP: Single-shot Network Pruning based on Connection Sensitivity",
        authors="Lee et al.",
        year=2019,
        room="weights",
        kind="one-shot",
        needs=("data", "loss"),
        budget="global",
        cost="one backward pass a batch, whole model",
        summary="gradient saliency |w g|",
    )

    def gather(
        self, model: nn.Module, views: Sequence[View], batches: Sequence[Batch], loss: Loss | None
    ) -> Mapping[str, Tensor]:
        return mean_gradients(model, views, batches, loss)

    def score(self, target: Target, weight: Tensor, evidence: Tensor) -> Tensor:
        gradient = target.view.matrix(evidence).reshape(weight.shape)
        return (weight * gradient).abs()
