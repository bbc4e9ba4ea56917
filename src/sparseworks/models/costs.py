"""Multiply-adds of a call, counted where they happen, for every parameter by itself.

The counter listens to the dispatched operations as torch's own flop counter does (its formulas are
used) and tells by the storage which parameter an operation multiplies. So packed projections, tied
weights and functional calls count, and a masked weight can be taken off afterwards:

    dense  f_d = sum over parameters p of f(p) + other
    sparse f_s = sum over parameters p of density(p) f(p) + other

`other` is what multiplies activations with each other (attention), which no mask on weights saves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sparseworks.models.calls import Batch, call
from sparseworks.models.modes import evaluating
from sparseworks.models.recurrence import products_shown

__all__ = ["Cost", "multiply_adds"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of one call.

    Args:
        parameters: name -> multiply-adds with this parameter.
        other: of activations with each other.
    """

    parameters: Mapping[str, int]
    other: int

    @property
    def dense(self) -> int:
        """f_d."""
        return sum(self.parameters.values()) + self.other

    def sparse(self, densities: Mapping[str, float]) -> float:
        """f_s, where what is masked is skipped; parameters that are not named are dense."""
        return self.other + math.fsum(
            macs * densities.get(name, 1.0) for name, macs in self.parameters.items()
        )


@torch.no_grad()
def multiply_adds(model: nn.Module, example: Batch) -> Cost:
    """Count one call in evaluation mode; the model's mode is restored.

    Args:
        model: of any kind; what `torch.compile` wrapped is not seen into.
        example: a batch; divide by its size for the cost of a sample.
    """
    counter = _Counter(model)
    with evaluating(model), products_shown(), counter:
        call(model, example)
    return Cost(counter.parameters, counter.other)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parameters = {n: 0 for n, _ in model.named_parameters()}
        self.other = 0
        self._held: dict[int, list[tuple[range, str]]] = {}  # several may share a storage
        for name, p in model.named_parameters():
            place = range(p.storage_offset(), p.storage_offset() + p.numel())
            self._held.setdefault(p.untyped_storage().data_ptr(), []).append((place, name))

    def _owner(self, operand: Tensor) -> str | None:
        held = self._held.get(operand.untyped_storage().data_ptr(), ())
        return next((name for place, name in held if operand.storage_offset() in place), None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet is _aten._scaled_dot_product_flash_attention_for_cpu:
            query, key, value = args[:3]  # torch's counter has no formula for it
            places = math.prod(query.shape[:-1]) * key.shape[-2]
            self.other += places * (query.shape[-1] + value.shape[-1])
        elif packet in flop_registry:
            macs = flop_registry[packet](*args, **(kwargs or {}), out_val=out) // 2
            owners = [self._owner(a) for a in _products(args)]
            owner = next((n for n in owners if n is not None), None)
            if owner is None:
                self.other += macs
            else:
                self.parameters[owner] += macs
        return out


def _products(args: tuple[Any, ...]) -> list[Tensor]:
    """The two tensors that are multiplied: a bias or an addend may come before them."""
    tensors = [a for a in args if isinstance(a, Tensor) and a.ndim >= 2]
    return tensors[-2:]
