"""Sparse-Wide on any traced model: hidden widths grow, what the graph pins keeps its size."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from sparseworks.core.errors import ModelError
from sparseworks.models.calls import Batch, call, split
from sparseworks.models.coupling import trace
from sparseworks.weights.dynamic.isoflop import draw
from sparseworks.weights.structured.backup import Backup
from sparseworks.weights.structured.cutting import cut

__all__ = ["widen"]


@torch.no_grad()
def widen(model: nn.Module, example: Batch, factor: float, seed: int) -> Backup:
    """Multiply every hidden width by `factor`, in place, before training.

    Groups of channels that belong together grow together. Weights that changed shape are drawn
    anew, with their spread times sqrt(fan_in before / fan_in after); vectors (norms, biases)
    repeat their entries. Inputs, outputs and zero-padded channels stay.

    Args:
        model: changed in place.
        example: one batch, to trace the model on.
        factor: above 1; widths are rounded to what the model's operations allow.
        seed: of the new weights.

    Returns:
        What undoes it (`restore()`).

    Raises:
        ModelError: nothing can be widened, or the model does not run with its new widths (it is
            given back as it was).
    """
    coupling = trace(model, example)
    copies = np.ones(coupling.count, np.int64)
    for family in coupling.families:
        size = len(family)
        wide = max(1, round(factor * size / family.multiple)) * family.multiple
        edges = np.floor(np.linspace(0, wide, size + 1)).astype(np.int64)
        copies[family.roots] = np.diff(edges)
    if (copies == 1).all():
        raise ModelError(
            f"{type(model).__name__} has no hidden width that can grow by {factor:g}; give the "
            "wide model and its `dense` counterpart instead"
        )
    before = {n: (p.shape, p.detach()) for n, p in model.named_parameters()}
    _, backup = cut(model, coupling, copies)
    try:
        for name, parameter in model.named_parameters():
            shape, old = before[name]
            if parameter.shape != shape and parameter.ndim > 1:
                fan_in = old.numel() / shape[0], parameter.numel() / parameter.shape[0]
                draw(parameter, float(old.std()) * (fan_in[0] / fan_in[1]) ** 0.5, seed, name)
        call(model, split(example)[0])
    except Exception as error:
        backup.restore()
        raise ModelError(
            f"{type(model).__name__} does not run with its new widths ({error}); give the wide "
            "model and its `dense` counterpart instead"
        ) from error
    return backup
