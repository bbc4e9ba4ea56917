"""How unevenly a model's weights are spread, as metrics: the PQ and the Gini index."""

from __future__ import annotations

import torch
from torch import nn

from sparseworks.core.masks import masks
from sparseworks.core.measures import gini_index, pq_index
from sparseworks.diagnostics.metric import Metric
from sparseworks.models.views import find_prunable

__all__ = ["gini_metric", "pq_metric"]


def surviving_weights(model: nn.Module) -> torch.Tensor:
    """All prunable weights that the mask record keeps (all, without one), flat, fp32."""
    record = masks(model)
    found = []
    for view in find_prunable(model):
        weight = view.parameter.detach().float()
        if record is not None and view.name in record:
            weight = weight[record[view.name].to(weight.device)]
        found.append(weight.flatten())
    return torch.cat(found)


def pq_metric(p: float = 0.5, q: float = 1.0) -> Metric:
    """PQ index over all survivors: when it rises from round to round, pruning reaches its limit
    (Diao et al. 2023, Pruning Deep Neural Networks from a Sparsity Perspective)."""
    return Metric("pq-index", "", True, lambda m: float(pq_index(surviving_weights(m), p=p, q=q)))


def gini_metric() -> Metric:
    """Gini index of |w| over all survivors."""
    return Metric("gini", "", True, lambda m: float(gini_index(surviving_weights(m))))
