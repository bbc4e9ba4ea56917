"""Cut groups out of a model: smaller parameters, and every number in a module that told a size.

A cut that fails puts everything back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sparseworks.core.errors import ModelError
from sparseworks.core.masks import attach, masks
from sparseworks.models.coupling import Coupling
from sparseworks.weights.structured.attributes import update
from sparseworks.weights.structured.backup import Backup, Change

__all__ = ["cut", "owners", "zero"]

Kept = dict[str, dict[int, NDArray[np.int64]]]
Keep = NDArray[np.bool_] | NDArray[np.int64]


def owners(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, bool, Tensor]]:
    """(module, attribute, full name, is a parameter, tensor), tied ones under every name."""
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield module, name, dot + name, True, parameter
        for name, buffer in module._buffers.items():
            if buffer is not None:
                yield module, name, dot + name, False, buffer


def kept_indices(coupling: Coupling, keep: Keep) -> Kept:
    """What stays of every axis that changes: name -> axis -> indices, as often as they stay."""
    found: Kept = {}
    for (name, axis), labels in coupling.axes.items():
        copies = keep[labels].astype(np.int64)
        if (copies != 1).any():
            if not copies.any():
                raise ModelError(f"{name}: nothing would stay of axis {axis}")
            found.setdefault(name, {})[axis] = np.repeat(np.arange(len(copies)), copies)
    return found


@torch.no_grad()
def zero(model: nn.Module, coupling: Coupling, keep: NDArray[np.bool_]) -> list[Any]:
    """Set everything that a cut would remove to zero (parameters only), in place.

    Returns:
        `(parameter, values before)` pairs, to copy back.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    saved = []
    for name, axes in kept_indices(coupling, keep).items():
        if (parameter := named.get(name)) is None:
            continue
        saved.append((parameter, parameter.detach().clone()))
        for axis, stays in axes.items():
            gone = np.setdiff1d(np.arange(parameter.shape[axis]), stays)
            parameter.index_fill_(axis, torch.as_tensor(gone, device=parameter.device), 0)
    return saved


@torch.no_grad()
def cut(
    model: nn.Module,
    coupling: Coupling,
    keep: Keep,
    backup: Backup | None = None,
) -> tuple[list[Change], Backup]:
    """Slice every parameter and buffer, and set the sizes that modules remember.

    Args:
        model: the model of `coupling`, changed in place.
        keep: True for every group that stays, or how often each stays (2 widens: side by side).
        backup: of what was changed before the cut; what the cut replaces is added.

    Returns:
        the changed numbers, and what is needed to undo all of it.
    """
    kept = kept_indices(coupling, keep)
    backup = Backup() if backup is None else backup
    by_id: dict[int, dict[int, NDArray[np.int64]]] = {}
    for _, _, name, _, tensor in owners(model):
        if name in kept:
            by_id[id(tensor)] = kept[name]
    made: dict[int, Tensor] = {}
    before = {name: tuple(t.shape) for _, _, name, _, t in owners(model)}
    try:
        for module, attribute, _, is_parameter, tensor in list(owners(model)):
            axes = by_id.get(id(tensor))
            if axes is None:
                continue
            if id(tensor) not in made:
                made[id(tensor)] = _sliced(tensor, axes, is_parameter)
            backup.tensors.append((module, attribute, is_parameter, tensor))
            table: dict[str, Any] = module._parameters if is_parameter else module._buffers
            table[attribute] = made[id(tensor)]
        backup.renew()
        changes = update(model, before, coupling.numbers(keep), backup)
        _slice_masks(model, kept, backup)
    except BaseException:
        backup.restore()
        raise
    return changes, backup


def _sliced(tensor: Tensor, axes: Mapping[int, NDArray[np.int64]], parameter: bool) -> Tensor:
    new = tensor.detach()
    for axis, stays in axes.items():
        new = new.index_select(axis, torch.as_tensor(stays, device=tensor.device))
    new = new.contiguous(
        memory_format=torch.channels_last
        if new.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        else torch.contiguous_format
    )
    return nn.Parameter(new, tensor.requires_grad) if parameter else new


def _slice_masks(model: nn.Module, kept: Kept, backup: Backup) -> None:
    record = masks(model)
    if record is None:
        return
    backup.masks = (model, record)
    new = record
    for name in record:
        if name in kept:
            mask = record[name]
            for axis, stays in kept[name].items():
                mask = mask.index_select(axis, torch.as_tensor(stays))
            new = new.with_mask(name, mask, "unstructured")
    attach(model, new)
