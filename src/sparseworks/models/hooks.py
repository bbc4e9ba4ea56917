"""Weights that a forward pre-hook computes, as the older tools of `torch.nn.utils` leave them.

| tool | parameters | weight | zeros of the parameter |
| --- | --- | --- | --- |
| `prune` | weight_orig | weight_orig * weight_mask, a buffer | are zeros of the weight |
| `weight_norm` | weight_g, weight_v | g v / ||v|| | move all that is kept in their row |
| `spectral_norm` | weight_orig | weight_orig / sigma | move all that is kept |

So only the first can be pruned from beneath: its mask joins the model's record.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from sparseworks.core.masks import MaskEntry, Masks, attach, masks
from sparseworks.models.recurrence import relist

__all__ = [
    "as_given", "duplicate", "fold_torch_masks", "folded", "hook_of", "refresh", "torch_mask",
    "with_torch_masks",
]  # fmt: skip

_Hook = BasePruningMethod | WeightNorm | SpectralNorm


def _hooks(module: nn.Module) -> list[tuple[int, _Hook, str]]:
    """(key, hook, name of the tensor that it computes), in the order they run."""
    return [
        (key, hook, hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name)
        for key, hook in module._forward_pre_hooks.items()
        if isinstance(hook, _Hook)
    ]


def hook_of(module: nn.Module, attribute: str) -> str:
    """The tool of `torch.nn.utils` that computes a weight from this parameter, or ""."""
    for _, hook, name in _hooks(module):
        if isinstance(hook, WeightNorm) and attribute in (f"{name}_g", f"{name}_v"):
            return "weight_norm"
        if isinstance(hook, SpectralNorm) and attribute == f"{name}_orig":
            return "spectral_norm"
        if isinstance(hook, BasePruningMethod) and attribute == f"{name}_orig":
            return "prune"
    return ""


def torch_mask(module: nn.Module, attribute: str) -> Tensor | None:
    """The bool mask that `torch.nn.utils.prune` keeps beside this parameter, or None."""
    if not attribute.endswith("_orig") or hook_of(module, attribute) != "prune":
        return None
    found = module._buffers[attribute.removesuffix("_orig") + "_mask"]
    assert found is not None
    return found != 0


def with_torch_masks(model: nn.Module, record: Masks | None) -> Masks | None:
    """The record with what `torch.nn.utils.prune` masked; None where there are no masks at all."""
    for prefix, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            mask = None if parameter is None else torch_mask(module, attribute)
            if mask is None:
                continue
            name = f"{prefix}.{attribute}" if prefix else attribute
            record = Masks(method="torch.nn.utils.prune") if record is None else record
            known = record.entry(name) if name in record else None
            if known is None:
                record = record.with_mask(name, mask)
            elif bool((known.mask & ~mask.cpu()).any()):
                record = record.with_mask(name, known.mask & mask.cpu(), known.pattern)
    return record


@torch.no_grad()
def refresh(module: nn.Module) -> None:
    """Compute a module's hooked weights anew, as its next forward pass will."""
    for _, hook, name in _hooks(module):
        if isinstance(hook, BasePruningMethod):
            setattr(module, name, hook.apply_mask(module))  # type: ignore[no-untyped-call]
        elif isinstance(hook, WeightNorm):
            setattr(module, name, hook.compute_weight(module))
        else:
            setattr(module, name, hook.compute_weight(module, do_power_iteration=False))


def duplicate(model: nn.Module) -> nn.Module:
    """`copy.deepcopy`, also where hooks left computed weights, which it refuses to copy."""
    computed = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in computed})


@contextmanager
def as_given(views: Iterable[Any]) -> Iterator[set[str]]:
    """Layers that torch masked compute with the parameter itself, its masked entries set to 0.

    The model computes the same, and evidence is seen at the parameter. On leaving the hooks are
    back, and so are the values beneath the mask, except of the views whose names the caller put
    into the set that this gives.
    """
    pruned: set[str] = set()
    held: list[tuple[Any, Tensor, Tensor, list[tuple[int, Any]]]] = []
    for view in views:
        mask = view.torch_mask
        if mask is None:
            continue
        module, name = view.module, view.attribute.removesuffix("_orig")
        parameter = view.parameter
        values = parameter.detach()[~mask]
        with torch.no_grad():
            parameter.masked_fill_(~mask, 0.0)
        before = list(module._forward_pre_hooks.items())
        for key, hook, computed in _hooks(module):
            if isinstance(hook, BasePruningMethod) and computed == name:
                del module._forward_pre_hooks[key]
        module.__dict__[name] = parameter  # not setattr, which would register it a second time
        relist([module])
        held.append((view, mask, values, before))
    try:
        yield pruned
    finally:
        for view, mask, values, before in reversed(held):
            if view.name not in pruned:
                with torch.no_grad():
                    view.parameter[~mask] = values
            view.module._forward_pre_hooks.clear()
            view.module._forward_pre_hooks.update(before)
            refresh(view.module)


@torch.no_grad()
def fold_torch_masks(model: nn.Module) -> Masks | None:
    """Take over what `torch.nn.utils.prune` did: its masks become the model's mask record.

    `weight_orig`, `weight_mask` and the hook become an ordinary parameter `weight` (the same
    object, so optimizers hold it still) with exact zeros. What the model computes does not change.

    Args:
        model: changed in place; one that torch did not prune stays as it is.

    Returns:
        The record now attached, or None where the model has no masks.
    """
    record = with_torch_masks(model, masks(model))
    if record is None:
        return None
    entries = {n: record.entry(n) for n in record}
    for prefix, module in model.named_modules():
        for _, hook, name in reversed(_hooks(module)):
            if isinstance(hook, BasePruningMethod):
                prune.remove(module, name)  # type: ignore[no-untyped-call]
                new = f"{prefix}.{name}" if prefix else name
                entry: MaskEntry = entries.pop(f"{new}_orig")
                weight = module._parameters[name]
                assert weight is not None
                weight.masked_fill_(~entry.mask.to(weight.device), 0.0)  # -0.0 too
                entries[new] = entry
    attach(model, Masks(entries, record.method))
    return masks(model)


def folded(model: nn.Module) -> nn.Module:
    """A copy whose hooked weights are ordinary parameters, or the model where it has none."""
    if not any(_hooks(module) for module in model.modules()):
        return model
    plain = duplicate(model)
    fold_torch_masks(plain)
    for module in plain.modules():
        for _, hook, name in reversed(_hooks(module)):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, name)
            else:
                remove_spectral_norm(module, name)
    return plain
