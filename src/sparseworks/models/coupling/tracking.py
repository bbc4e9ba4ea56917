"""Which sizes of a traced forward pass the model's own numbers tell.

While a model is traced its ints, tuples and lists of ints, and the shapes of tensors are `Number`s.
A call that takes one of the model's as a size (a view, a split, a slice, ...) leaves a mark, an
identity in the graph: `sparseworks::sized(x, call)`, where `Tracking.calls[call]` names the axes
and the formulas of their sizes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparseworks.models.coupling.numbers import Attribute, Formula, Number
from sparseworks.models.coupling.readers import READERS, Arguments

__all__ = ["SIZED", "Size", "Tracking"]

SIZED = "sized"
_NARROW = ("dim", "start", "length")
_LIBRARY: Any = torch.library.Library("sparseworks", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(f"{SIZED}(Tensor self, int call) -> Tensor")
_LIBRARY.impl(SIZED, lambda x, call: x.clone(), "CompositeExplicitAutograd")


@dataclass(frozen=True)
class Size:
    """What `formula` counts of axis `dim`: the entries from `start` to `stop`, or all of them."""

    dim: int
    formula: Formula
    start: int = 0
    stop: int | None = None


@dataclass
class Tracking:
    """The numbers of one model, followed through one trace."""

    calls: list[tuple[Size, ...]] = field(default_factory=list)

    @contextlib.contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Put `Number`s in place of the ints of every module, and of the shapes of tensors."""
        held: list[tuple[Any, str, Any]] = []
        before = model.__dict__.get("forward")
        forward = model.forward

        @functools.wraps(forward)
        def followed(*args: Any, **kwargs: Any) -> Any:
            with _Mode(self):
                return forward(*args, **kwargs)

        try:
            for path, module in model.named_modules():
                # what torch's modules and configs hold is set from parameters and with the config
                own = not type(module).__module__.startswith("torch.nn.")
                held += self._hold(module, path if own else None)
                if hasattr(config := getattr(module, "config", None), "to_dict"):
                    held += self._hold(config, None)
            model.__dict__["forward"] = followed
            yield
        finally:
            model.__dict__.pop("forward", None)
            if before is not None:
                model.__dict__["forward"] = before
            for owner, name, value in held:
                owner.__dict__[name] = value
            for module in model.modules():  # what a forward pass wrote down
                for name, value in vars(module).items():
                    module.__dict__[name] = _settled(value)

    def _hold(self, owner: Any, path: str | None) -> Iterator[tuple[Any, str, Any]]:
        """Replace the ints of a module, or (no path) of what follows a cut without this."""

        def number(value: int, name: str, index: int | None) -> Number:
            formula = None if path is None else Attribute(path, name, index, value)
            return Number.of(value, formula, self)

        for name, value in list(vars(owner).items()):
            if type(value) is int:
                held: Any = number(value, name, None)
            elif type(value) in (tuple, list) and value and all(type(v) is int for v in value):
                held = type(value)(number(v, name, i) for i, v in enumerate(value))
            else:
                continue
            yield owner, name, value
            owner.__dict__[name] = held

    def mark(self, tensor: Tensor, sizes: Sequence[Size]) -> Tensor:
        self.calls.append(tuple(sizes))
        marked: Tensor = torch.ops.sparseworks.sized(tensor, len(self.calls) - 1)
        return marked


class _Mode(TorchFunctionMode):
    """Marks the results of calls that take numbers of this trace."""

    def __init__(self, tracking: Tracking) -> None:
        super().__init__()
        self.tracking = tracking

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is torch.Tensor.size or getattr(func, "__self__", None) is torch.Tensor.shape:
            return self._followed(func(*args, **kwargs))
        if not any(self._own(v) for v in _leaves((*args, *kwargs.values()))):
            return func(*args, **kwargs)
        call = Arguments(args, kwargs)
        if name == "__getitem__":
            return func(*self._sliced(*args))
        if name == "narrow":
            dim, start, length = (call.get(i, n) for i, n in enumerate(_NARROW, 1))
            index = (*[slice(None)] * (dim % args[0].ndim), slice(start, start + length))
            return torch.Tensor.__getitem__(*self._sliced(args[0], index))
        out = func(*args, **kwargs)
        if (reader := READERS.get(name)) is None:
            return out
        if isinstance(out, Tensor):
            return self._marked(out, reader(call, out, 0))
        if isinstance(out, (tuple, list)):
            return type(out)(self._marked(t, reader(call, t, i)) for i, t in enumerate(out))
        return out

    def _own(self, value: Any) -> bool:
        return (
            isinstance(value, Number)
            and value.source is self.tracking
            and value.formula is not None
        )

    def _followed(self, size: Any) -> Any:
        """The size of a tensor is what it is after every cut."""
        if isinstance(size, torch.Size):
            return torch.Size([self._followed(n) for n in size])
        return Number.of(size, None, self.tracking) if type(size) is int else size

    def _marked(self, tensor: Tensor, told: Sequence[tuple[int, Any]]) -> Tensor:
        """`told` names axes, each with a number for its size."""
        sizes = [
            Size(dim % tensor.ndim, number.formula)
            for dim, number in told
            if self._own(number) and number == tensor.shape[dim]
        ]
        return self.tracking.mark(tensor, sizes) if sizes else tensor

    def _sliced(self, tensor: Tensor, index: Any) -> tuple[Tensor, Any]:
        """Take slices with bounds of this trace one by one, each of a marked tensor; what is left.

        A mark before a slice says what its bounds count: what lies before or, if negative, after.
        """
        entries = list(index) if isinstance(index, tuple) else [index]
        if any(isinstance(i, (Tensor, list)) for i in entries):
            return tensor, index
        if Ellipsis in entries:
            at = entries.index(Ellipsis)
            taken = sum(i is not None and i is not Ellipsis for i in entries)
            entries[at : at + 1] = [slice(None)] * (tensor.ndim - taken)
        dim = 0
        for place, entry in enumerate(entries):
            if isinstance(entry, slice) and (sizes := self._bounds(entry, dim, tensor.shape[dim])):
                tensor = self.tracking.mark(tensor, sizes)
                tensor = tensor[(*[slice(None)] * dim, _plain(entry))]
                entries[place] = slice(None)
            dim += entry is not None
        return tensor, tuple(entries)

    def _bounds(self, entry: slice, dim: int, size: int) -> list[Size]:
        """What the bounds of a slice count, if each is open or held by the model."""
        found: list[Size] = []
        for bound in (entry.start, entry.stop):
            if self._own(bound) and 0 < abs(bound) <= size:
                ends = (0, int(bound)) if bound > 0 else (size + int(bound), size)
                found.append(Size(dim, bound.formula if bound > 0 else (-bound).formula, *ends))
            elif bound is not None and bound != 0:
                return []
        return found if entry.step in (None, 1) else []


def _plain(entry: slice) -> slice:
    return slice(*(None if n is None else int(n) for n in (entry.start, entry.stop)))


def _settled(value: Any) -> Any:
    """Plain ints in place of `Number`s."""
    if isinstance(value, Number):
        return int(value)
    if type(value) in (tuple, list, torch.Size) and any(isinstance(v, Number) for v in value):
        return type(value)(map(_settled, value))
    return value


def _leaves(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _leaves(value)
        elif isinstance(value, slice):
            yield from (value.start, value.stop)
        else:
            yield value
