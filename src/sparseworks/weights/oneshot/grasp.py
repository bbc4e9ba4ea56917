"""GraSP (Wang et al. 2020, Picking Winning Tickets Before Training by Preserving Gradient Flow).

With g the gradient of the loss and H its Hessian, removing weight ij changes the squared gradient
norm by -2 W_ij (H g)_ij to first order. Weights whose removal lowers it most are kept:

score_ij = W_ij (H g)_ij
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from sparseworks.core.budgets import Budget
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.registry import MethodInfo
from sparseworks.models.calls import Batch, Loss, call, default_loss, logits_of, split
from sparseworks.models.views import View
from sparseworks.weights.oneshot.base import OneShot, Target
from sparseworks.weights.oneshot.gradients import checked_loss, gradients_enabled, mean_gradients


@dataclass(frozen=True)
class Grasp(OneShot):
    """Keep what gradient flow needs; meant for untrained networks.

    Args:
        temperature: logits are divided by it in the default cross-entropy loss (paper: 200).
    """

    temperature: float = 200.0

    budget: str | Mapping[str, float] | Budget = field(default="global", kw_only=True)
    info: ClassVar[MethodInfo] = MethodInfo(
        name="grasp",
        title="Picking Winning Tickets Before Training by Preserving Gradient Flow",
        authors="Wang et al.",
        year=2020,
        room="weights",
        kind="one-shot",
        needs=("data", "loss"),
        budget="global",
        cost="a Hessian-vector product a batch, whole model",
        summary="preserve gradient flow: w (H g)",
    )

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise InvalidArgument(f"grasp: temperature={self.temperature} must be positive")

    def gather(
        self, model: nn.Module, views: Sequence[View], batches: Sequence[Batch], loss: Loss | None
    ) -> Mapping[str, Tensor]:
        loss = loss or self._tempered
        mean = mean_gradients(model, views, batches, loss)
        with gradients_enabled(model, views) as weights:
            sums = [torch.zeros(w.shape, dtype=torch.float32, device=w.device) for w in weights]
            for batch in batches:
                value = checked_loss(model, batch, loss)
                first = torch.autograd.grad(value, weights, create_graph=True, allow_unused=True)
                flow = sum(
                    (g.float() * mean[v.name]).sum()
                    for v, g in zip(views, first)
                    if g is not None and g.requires_grad
                )
                if not isinstance(flow, Tensor):
                    raise InvalidArgument("grasp: the loss is linear in every weight; no Hessian")
                second = torch.autograd.grad(flow, weights, allow_unused=True)
                for total, product in zip(sums, second):
                    if product is not None:
                        total.add_(product.float(), alpha=1.0 / len(batches))
        return {v.name: s for v, s in zip(views, sums)}

    def _tempered(self, model: nn.Module, batch: Batch) -> Tensor:
        _, target = split(batch)
        if target is None or target.ndim != 1:
            return default_loss(model, batch)
        logits = logits_of(call(model, batch)).float() / self.temperature
        return nn.functional.cross_entropy(logits, target)

    def score(self, target: Target, weight: Tensor, evidence: Tensor) -> Tensor:
        return weight * target.view.matrix(evidence).reshape(weight.shape)
