"""Masks for checkpoints that others left behind: which zeros were meant."""

from __future__ import annotations

import torch
from torch import nn

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.masks import Masks
from sparseworks.models.views import View, find_prunable

__all__ = ["infer_masks"]

_RUNS = ((2, 4), (1, 4), (4, 8), (1, 2))


@torch.no_grad()
def infer_masks(model: nn.Module, minimum: float = 0.01) -> Masks:
    """A mask record from the zeros of a model's prunable weights.

    A weight is masked where it is 0. A tensor counts when at least `minimum` of it is 0, so that
    a few chance zeros of a dense tensor are not frozen. The pattern is "n:m" where every run keeps
    exactly n (2:4, 1:4, 4:8, 1:2), else "unstructured".

    Args:
        model: any module; it is not changed (attach the record with `sw.attach`).
        minimum: fraction of zeros, in (0, 1].

    Returns:
        The record, empty when no tensor qualifies.
    """
    if not 0.0 < minimum <= 1.0:
        raise InvalidArgument(f"minimum={minimum}: a fraction of zeros in (0, 1]")
    views = find_prunable(model, torch_masked=True, required=False).views
    record = Masks(method="inferred")
    for view in views:
        mask = view.parameter.detach() != 0
        if (held := view.torch_mask) is not None:
            mask &= held
        total = mask.numel()
        if total and total - int(mask.sum()) >= minimum * total:
            record = record.with_mask(view.name, mask, _pattern(view, mask))
    return record


def _pattern(view: View, mask: torch.Tensor) -> str:
    matrix = view.matrix(mask)
    for n, m in _RUNS:
        if view.run % m == 0 and bool((matrix.reshape(-1, m).sum(1) == n).all()):
            return f"{n}:{m}"
    return "unstructured"
