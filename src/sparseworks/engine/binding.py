"""A call of a compiled model by the model's own signature: by place or by name, as callers like.

The example decides *which* arguments a compiled model is given; how a call writes them is decided
by the signature of the model's forward, as in any call. An argument that the example left out may
be given too where its value says nothing new: the default of its parameter.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sparseworks.core.errors import InvalidArgument
from sparseworks.models.calls import Arguments, signature_of

__all__ = ["UNKNOWN", "Binding"]

Parameter = inspect.Parameter
_OPTIONS = ("return_dict", "output_attentions", "output_hidden_states", "use_cache")
_PLAIN = (bool, int, float, str, torch.dtype, torch.device)
_KEPT = 64  # ways to write a call that need not be bound again


class _Unknown:
    """A default that no value equals: it could not be written into a file."""

    def __repr__(self) -> str:
        return "its default"


UNKNOWN = _Unknown()


@dataclass
class Binding:
    """Which arguments a compiled model is given, and how calls may write them.

    Args:
        signature: of the model's forward.
        slots: what the example gives: names of parameters and keywords in the signature's order,
            `"*0"` for the first of `*args`.
        options: what a config of transformers says where an option is left out or None.
        orders: for every way to write a call, where its arguments go.
    """

    signature: inspect.Signature
    slots: list[str]
    options: dict[str, Any]
    orders: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, model: nn.Module, example: Arguments) -> tuple[Binding, Arguments]:
        """The binding of an example, and the example without what says nothing new.

        Raises:
            InvalidArgument: the model does not take these arguments.
        """
        config = getattr(model, "config", None)
        options = {n: getattr(config, n) for n in _OPTIONS if hasattr(config, n)}
        made = cls(signature_of(model), [], options)
        named = example.named(model)
        kwargs = {k: v for k, v in named.kwargs.items() if not made._idle(k, v)}
        made.slots = [*made._places(len(named.args)), *kwargs]
        return made, Arguments(named.args, kwargs)

    def values(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The arguments of a call in the order of the slots.

        Raises:
            InvalidArgument: an argument is missing, or given where the example left it out.
        """
        key = (len(args), *kwargs)
        found = self.orders.get(key)
        if found is None:
            found = self._order(len(args), tuple(kwargs))
            if len(self.orders) < _KEPT:
                self.orders[key] = found
        order, others = found
        values = [*args, *kwargs.values()]
        for place, name in others:
            if not self._idle(name, values[place]):
                self._refuse(name, values[place])
        return values if order is None else [values[i] for i in order]

    def _order(
        self, count: int, keywords: tuple[str, ...]
    ) -> tuple[tuple[int, ...] | None, tuple[tuple[int, str], ...]]:
        """Where each slot's value is in a call, and the places of what no slot takes."""
        try:
            self.signature.bind_partial(*range(count), **dict.fromkeys(keywords))
        except TypeError as error:
            raise InvalidArgument(f"{error}: the model takes {self.signature}") from None
        names = [*self._places(count), *keywords]
        missing = next((s for s in self.slots if s not in names), None)
        if missing is not None:
            raise InvalidArgument(f"{_called(missing)} is missing: {self._example()}")
        order = tuple(names.index(s) for s in self.slots)
        others = tuple((i, n) for i, n in enumerate(names) if n not in self.slots)
        return (None if order == tuple(range(len(names))) else order), others

    def _places(self, count: int) -> list[str]:
        """Slots of so many positional arguments."""
        by_place = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
        names = [p.name for p in self.signature.parameters.values() if p.kind in by_place][:count]
        return names + [f"*{i}" for i in range(count - len(names))]

    def _idle(self, name: str, value: Any) -> bool:
        """Whether a value says what leaving the argument out says."""
        parameter = self.signature.parameters.get(name)
        default = Parameter.empty if parameter is None else parameter.default
        if value is default or (type(value) is type(default) and _equal(value, default)):
            return True
        if name not in self.options or (default is not None and parameter is not None):
            return False
        own = self.options[name]
        return value is None or (type(value) is type(own) and _equal(value, own))

    def _refuse(self, name: str, value: Any) -> None:
        what = repr(value) if isinstance(value, _PLAIN) else type(value).__name__
        raise InvalidArgument(
            f"{_called(name)} is given ({what}): {self._example()}; for more, compile with an "
            "example that gives them"
        )

    def _example(self) -> str:
        return f"the model was compiled for the arguments {', '.join(map(_called, self.slots))}"


def _equal(value: Any, other: Any) -> bool:
    return isinstance(value, _PLAIN) and bool(value == other)


def _called(slot: str) -> str:
    return f"*args[{slot[1:]}]" if slot.startswith("*") else slot
