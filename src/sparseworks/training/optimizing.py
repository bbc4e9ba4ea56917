"""`sparseworks.optimizer`: optimizers that the house registers, by name and options.

    optimizer = sw.optimizer(model.parameters(), "dct-adamw", lr=1e-3, rank=128)

They are ordinary `torch.optim.Optimizer`s; `sparseworks train --optimizer NAME` takes them too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.optim import Optimizer

from sparseworks.core import registry
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.registry import MethodInfo

__all__ = ["OptimizerMethod", "optimizer", "registered"]


@dataclass(frozen=True, kw_only=True)
class OptimizerMethod(ABC):
    """Base of the options of an optimizer; frozen dataclasses."""

    info: ClassVar[MethodInfo]

    @abstractmethod
    def build(self, parameters: Iterable[Any], lr: float, weight_decay: float = 0.0) -> Optimizer:
        """The optimizer of these parameters (or groups)."""


def optimizer(
    parameters: Iterable[Any],
    method: str | OptimizerMethod,
    *,
    lr: float,
    weight_decay: float = 0.0,
    **options: Any,
) -> Optimizer:
    """An optimizer of the house.

    Args:
        parameters: of a model, or groups.
        method: a registered method of kind "optimizer", or an object.
        lr: learning rate.
        weight_decay: decoupled.
        options: fields of the method.

    Raises:
        InvalidArgument: no such method or option.
    """
    chosen: OptimizerMethod = registry.build(method, ("optimizer",), **options)
    return chosen.build(parameters, lr, weight_decay)


def registered(name: str, options: Mapping[str, Any]) -> OptimizerMethod:
    """A registered optimizer.

    Raises:
        InvalidArgument: there is none of this name, or it has not these options.
    """
    if name not in registry.names():
        there = [n for n in registry.names() if registry.resolve(n).info.kind == "optimizer"]
        raise InvalidArgument(f"optimizer={name!r}: give sgd or adamw, or {', '.join(there)}")
    made: OptimizerMethod = registry.build(name, ("optimizer",), **options)
    return made
