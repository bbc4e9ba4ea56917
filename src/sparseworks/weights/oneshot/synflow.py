"""SynFlow (Tanaka et al. 2020, Pruning neural networks without any data by iteratively conserving
synaptic flow).

With every parameter replaced by its absolute value and an input of ones, R = sum of the outputs;

score_ij = |dR/dW_ij * W_ij|

in many small rounds (100 in the paper), because one round can cut a whole layer off.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparseworks.core.budgets import Budget
from sparseworks.core.errors import DataError
from sparseworks.core.registry import MethodInfo
from sparseworks.models.calls import Batch, Loss, split
from sparseworks.models.hooks import duplicate
from sparseworks.models.views import View
from sparseworks.weights.oneshot.base import OneShot, Target


@dataclass(frozen=True)
class SynFlow(OneShot):
    """Keep the weights that carry synaptic flow. The data only gives the input's shape."""

    budget: str | Mapping[str, float] | Budget = field(default="global", kw_only=True)
    rounds: ClassVar[int] = 100
    info: ClassVar[MethodInfo] = MethodInfo(
        name="synflow",
        title="Pruning neural networks without any data by iteratively conserving synaptic flow",
        authors="Tanaka et al.",
        year=2020,
        room="weights",
        kind="one-shot",
        needs=("data",),
        budget="global",
        cost="100 rounds of one backward pass on one input of ones, in fp64",
        summary="synaptic flow through |w|, no data but its shape",
    )

    def gather(
        self, model: nn.Module, views: Sequence[View], batches: Sequence[Batch], loss: Loss | None
    ) -> Mapping[str, Tensor]:
        positive = duplicate(model).double().eval().requires_grad_(False)
        with torch.no_grad():
            for parameter in positive.parameters():
                parameter.abs_()
        names = [v.name for v in views]
        weights = [v.within(positive).parameter.requires_grad_(True) for v in views]
        total = _sum_of(_with_ones(positive, batches[0]))
        found = torch.autograd.grad(total, weights, allow_unused=True)
        zero = torch.zeros((), dtype=torch.float64)
        flows = {
            n: (g * w.detach()).abs() if g is not None else zero.expand_as(w)
            for n, g, w in zip(names, found, weights)
        }
        top = max((float(f.max()) for f in flows.values()), default=0.0) or 1.0
        return {n: (f / top).float() for n, f in flows.items()}

    def score(self, target: Target, weight: Tensor, evidence: Tensor) -> Tensor:
        return target.view.matrix(evidence).reshape(weight.shape)


def _with_ones(model: nn.Module, batch: Batch) -> Any:
    """The model's output for one input of ones, of the shape the data shows."""
    inputs, _ = split(batch)
    device = next(model.parameters()).device
    if isinstance(inputs, Tensor) and inputs.dtype.is_floating_point:
        return model(torch.ones(1, *inputs.shape[1:], dtype=torch.float64, device=device))
    if isinstance(inputs, Mapping):
        ids = inputs.get("input_ids")
        accepts = "inputs_embeds" in inspect.signature(model.forward).parameters
        if isinstance(ids, Tensor) and accepts and hasattr(model, "get_input_embeddings"):
            width = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
            ones = torch.ones(1, ids.shape[1], width, dtype=torch.float64, device=device)
            return model(inputs_embeds=ones)
        floats = {
            k: torch.ones(1, *v.shape[1:], dtype=torch.float64, device=device)
            for k, v in inputs.items()
            if isinstance(v, Tensor) and v.dtype.is_floating_point
        }
        if floats:
            return model(**floats)
    raise DataError("synflow: the model takes no floating-point input that could be set to ones")


def _sum_of(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output.sum()
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(output, name, None), Tensor):
            total: Tensor = getattr(output, name).sum()
            return total
    return _sum_of(output[0])
