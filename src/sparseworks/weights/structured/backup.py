"""What a cut changed, and what puts it back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.core.masks import Masks, attach
from sparseworks.models.hooks import refresh
from sparseworks.models.recurrence import relist

__all__ = ["Backup", "Change", "Snapshot"]


@dataclass(frozen=True)
class Change:
    """A number in a module that changed with the shapes: `module.attribute`, before and after."""

    module: str
    attribute: str
    before: Any
    after: Any


@dataclass
class Backup:
    """What a cut replaced, to put it back."""

    tensors: list[tuple[nn.Module, str, bool, Tensor]] = field(default_factory=list)
    attributes: list[tuple[Any, str, Any]] = field(default_factory=list)
    masks: tuple[nn.Module, Masks] | None = None
    values: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def restore(self) -> None:
        for module, name, is_parameter, tensor in reversed(self.tensors):
            (module._parameters if is_parameter else module._buffers)[name] = tensor  # type: ignore[assignment]
        for owner, name, value in reversed(self.attributes):
            setattr(owner, name, value)
        if self.masks is not None:
            attach(*self.masks)
        with torch.no_grad():
            for tensor, value in reversed(self.values):
                tensor.copy_(value)
        self.renew()

    def renew(self) -> None:
        """What modules list, or hooks compute, of their parameters is made of the present ones."""
        changed = {module for module, *_ in self.tensors}
        for module in changed:
            refresh(module)
        relist(changed)

    def set(self, owner: Any, name: str, value: Any) -> None:
        self.attributes.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)


class Snapshot:
    """A model as it is now: what a training that fails, or its cut, puts back.

    Args:
        model: its parameters and buffers are copied once.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(m, type(m), _copied(vars(m))) for m in model.modules()]
        self._names = {m: n for n, m in model.named_modules()}
        tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
        self._values = [(t, t.detach().clone(), t.requires_grad, t.grad) for t in tensors]

    def restore(self) -> None:
        """Every module, hook, parameter and value as it was."""
        for module, kind, before in self._modules:
            module.__class__ = kind
            now = vars(module)
            for name, value in before.items():
                if isinstance(value, dict) and isinstance(now.get(name), dict):
                    now[name].clear()  # the same object: handles of hooks know it
                    now[name].update(value)
                    before[name] = now[name]
            now.clear()
            now.update(before)
        with torch.no_grad():
            for tensor, value, learns, gradient in self._values:
                tensor.copy_(value)
                tensor.requires_grad_(learns)
                tensor.grad = gradient
        relist({m for m, *_ in self._modules})

    def modes(self) -> None:
        """Training or evaluation mode of every module as it was."""
        for module, _, before in self._modules:
            module.training = before["training"]

    def changes(self) -> list[Change]:
        """The numbers in modules that are others now."""
        found = []
        for module, _, before in self._modules:
            now = vars(module)
            found += [
                Change(self._names[module], name, value, now[name])
                for name, value in before.items()
                if _is_size(value) and _is_size(now.get(name)) and now[name] != value
            ]
        return found


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {k: v.copy() if isinstance(v, (dict, list, set)) else v for k, v in state.items()}


def _is_size(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_size(v) for v in value)
    return isinstance(value, int) and not isinstance(value, bool)
