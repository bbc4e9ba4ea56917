"""Masks of a training on a model: its record beside what still holds of older ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparseworks.core.errors import ModelError
from sparseworks.core.masks import Masks, attach, masks
from sparseworks.kernels.zeroing import keep_only
from sparseworks.training.names import plain_name, unwrapped
from sparseworks.training.sharding import local_mask, local_part, whole

__all__ = ["attach_beside", "put_masks"]


def attach_beside(model: nn.Module, record: Masks) -> None:
    """Attach a record; masks that the model had of other tensors stay where it obeys them still."""
    before = masks(model)
    if before is not None:
        others = Masks({n: before.entry(n) for n in before if n not in record}, before.method)
        record = others.obeyed_by(model, whole).merged(record)
    attach(model, record)


@torch.no_grad()
def put_masks(kept: Mapping[str, Tensor], source: nn.Module, target: nn.Module) -> None:
    """Set what these masks of one model do not keep to exactly 0 in another of the same parameters.

    Raises:
        ModelError: names or shapes of their parameters differ; nothing was changed.
    """
    mine, theirs = _parameters(source), _parameters(target)
    for name in sorted(mine.keys() | theirs.keys()):
        shapes = [list(p[name].shape) if name in p else "none" for p in (mine, theirs)]
        if shapes[0] != shapes[1]:
            raise ModelError(
                f"{name}: its shape is {shapes[0]} in the model of the run and {shapes[1]} in the "
                "one given; masks go onto a copy of the model that trains"
            )
    for name, mask in kept.items():
        keep_only(local_mask(mask, theirs[name]), local_part(theirs[name].detach()))


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    named = unwrapped(model).named_parameters(remove_duplicate=False)
    return {plain_name(name): parameter for name, parameter in named}
