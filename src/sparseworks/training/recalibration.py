"""Batch-norm statistics for weights that no training step has seen (averages, pruned models)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from sparseworks.core.errors import DataError
from sparseworks.models.calls import Batch, call, split
from sparseworks.models.modes import evaluating

__all__ = ["reestimate"]


@torch.no_grad()
def reestimate(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Batch-norm statistics anew, as plain averages over the batches; nothing else changes.

    Args:
        model: with or without batch norm (without, nothing is computed).
        batches: of the training data.

    Raises:
        DataError: there are no batches; the statistics are as they were.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = {m: m.momentum for m in norms}
    seen = False
    with evaluating(model):
        try:
            for batch in batches:
                if not seen:
                    seen = True
                    for norm in norms:
                        norm.reset_running_stats()
                        norm.momentum = None
                        norm.train()
                call(model, split(batch)[0])
        finally:
            for norm in norms:
                norm.momentum = momenta[norm]
    if not seen:
        raise DataError("no batches to estimate batch-norm statistics on")
