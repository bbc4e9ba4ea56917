"""What torch runs between native programs: operators by name, with their arguments as data."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from sparseworks.core.errors import CheckpointError

__all__ = ["Call", "Ref", "decode", "encode", "of_node"]

_PLAIN = {"_operator": operator, "operator": operator, "math": math}
_TORCH = (torch.dtype, torch.layout, torch.memory_format)


@dataclass(frozen=True)
class Ref:
    """A value by the name of the step that makes it."""

    name: str


@dataclass
class Call:
    """One operator.

    Args:
        name: of its result.
        target: "aten.expand.default", or "operator.mul" on sizes.
        args, kwargs: constants, and `Ref` to other results.
    """

    name: str
    target: str
    args: Any
    kwargs: Any
    function: Callable[..., Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.function = _resolve(self.target)

    def __call__(self, values: Mapping[str, Any]) -> Any:
        return self.function(*_filled(self.args, values), **_filled(self.kwargs, values))

    def reads(self) -> list[Ref]:
        return list(_refs([self.args, self.kwargs]))


def of_node(node: Node) -> Call:
    """The step of a node of a graph."""
    target = node.target
    name = str(target)
    if not isinstance(target, torch._ops.OpOverload):
        name = f"{target.__module__}.{target.__name__}"  # type: ignore[union-attr]
    swap = {n: Ref(n.name) for n in node.all_input_nodes}
    return Call(node.name, name, _swapped(node.args, swap), _swapped(node.kwargs, swap))


def _resolve(target: str) -> Callable[..., Any]:
    """Only operators of torch's own library and of the operator and math modules."""
    space, _, rest = target.partition(".")
    try:
        if space in _PLAIN:
            return getattr(_PLAIN[space], rest)  # type: ignore[no-any-return]
        if space in ("aten", "prims"):
            packet, _, overload = rest.partition(".")
            return getattr(getattr(getattr(torch.ops, space), packet), overload)  # type: ignore[no-any-return]
        if target.startswith("torch.sym_"):
            return getattr(torch, target.removeprefix("torch."))  # type: ignore[no-any-return]
    except AttributeError:
        pass
    raise CheckpointError(f"the operator {target!r} is not one that a plan may run")


def _swapped(value: Any, swap: Mapping[Node, Ref]) -> Any:
    if isinstance(value, Node):
        return swap[value]
    if isinstance(value, (list, tuple)):
        return [_swapped(v, swap) for v in value]
    if isinstance(value, Mapping):
        return {k: _swapped(v, swap) for k, v in value.items()}
    return value


def _filled(value: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(value, Ref):
        return values[value.name]
    if isinstance(value, list):
        return [_filled(v, values) for v in value]
    if isinstance(value, dict):
        return {k: _filled(v, values) for k, v in value.items()}
    return value


def _refs(value: Any) -> Iterator[Ref]:
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, list):
        for v in value:
            yield from _refs(v)
    elif isinstance(value, dict):
        yield from _refs(list(value.values()))


def encode(value: Any) -> Any:
    """An argument as JSON.

    Raises:
        CheckpointError: a kind of argument that cannot be written.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Ref):
        return {"ref": value.name}
    if isinstance(value, (list, tuple)):
        return [encode(v) for v in value]
    if isinstance(value, dict):
        return {"map": {k: encode(v) for k, v in value.items()}}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, _TORCH):
        return {"torch": str(value).removeprefix("torch.")}
    raise CheckpointError(f"a {type(value).__name__} cannot be written into a plan")


def decode(value: Any) -> Any:
    """The inverse of `encode`."""
    if isinstance(value, list):
        return [decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "ref":
        return Ref(held)
    if kind == "map":
        return {k: decode(v) for k, v in held.items()}
    if kind == "float":
        return float(held)
    if kind == "device":
        return torch.device(held)
    found = getattr(torch, str(held), None)
    if kind != "torch" or not isinstance(found, _TORCH):
        raise CheckpointError(f"{value!r} is not an argument of a plan")
    return found
