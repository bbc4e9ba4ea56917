"""Masks of a training on a model: its record beside what still holds of older ones."""

from __future__ import annotations

from torch import nn

from sparseworks.core.masks import Masks, attach, masks
from sparseworks.training.sharding import whole

__all__ = ["attach_beside"]


def attach_beside(model: nn.Module, record: Masks) -> None:
    """Attach a record; masks that the model had of other tensors stay where it obeys them still."""
    before = masks(model)
    if before is not None:
        others = Masks({n: before.entry(n) for n in before if n not in record}, before.method)
        record = others.obeyed_by(model, whole).merged(record)
    attach(model, record)
