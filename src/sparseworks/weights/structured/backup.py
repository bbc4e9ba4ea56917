"""What a cut changed, and what puts it back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.core.masks import Masks, attach
from sparseworks.models.hooks import refresh
from sparseworks.models.recurrence import relist

__all__ = ["Backup", "Change"]


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
