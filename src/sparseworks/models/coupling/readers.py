"""Which arguments of torch's functions are sizes, and of which axes of their results.

A reader takes the call, one result and its place among the results, and gives (axis, size) pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparseworks.models.coupling.numbers import Number, Operation

__all__ = ["READERS", "Arguments"]


@dataclass(frozen=True)
class Arguments:
    """Of one call, found by place or by name."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def get(self, place: int, *names: str) -> Any:
        if place < len(self.args):
            return self.args[place]
        return next((self.kwargs[n] for n in names if n in self.kwargs), None)

    def listed(self, place: int, *names: str) -> list[Any]:
        """Sizes given as one sequence or one by one, from `place` on."""
        first = self.get(place, *names)
        if isinstance(first, (tuple, list)):
            return list(first)
        return list(self.args[place:]) or ([] if first is None else [first])


Told = list[tuple[int, Any]]
Reader = Callable[[Arguments, Tensor, int], Told]


def _shaped(place: int) -> Reader:
    def read(call: Arguments, out: Tensor, piece: int) -> Told:
        sizes = [s for s in call.listed(place, "size", "shape") if isinstance(s, int)]
        return list(enumerate(sizes))[: out.ndim] if len(sizes) == out.ndim else []

    return read


def _unflatten(call: Arguments, out: Tensor, piece: int) -> Told:
    dim, sizes = call.get(1, "dim"), call.listed(2, "sizes", "unflattened_size")
    start = dim if dim >= 0 else out.ndim - len(sizes) + dim + 1
    return [(start + i, n) for i, n in enumerate(sizes)]


def _split(call: Arguments, out: Tensor, piece: int) -> Told:
    sizes = call.get(1, "split_size_or_sections", "split_size", "split_sizes")
    dim = call.get(2, "dim") or 0
    return [(dim, sizes[piece] if isinstance(sizes, (tuple, list)) else sizes)]


def _normalised(call: Arguments, out: Tensor, piece: int) -> Told:
    sizes = call.listed(1, "normalized_shape")
    return [(i - len(sizes), n) for i, n in enumerate(sizes)]


def _grouped(call: Arguments, out: Tensor, piece: int) -> Told:
    """Groups of channels go whole, so that each keeps its width."""
    groups = call.get(1, "num_groups")
    return [(1, _times(groups, out.shape[1] // groups))] if groups > 1 else []


def _convolved(call: Arguments, out: Tensor, piece: int) -> Told:
    """Groups of one input go with their channel; others stay as many as they are."""
    groups, weight = call.get(6, "groups"), call.get(1, "weight")
    if not isinstance(groups, Number) or groups == 1 or weight.shape[1] > 1:
        return []
    dim = out.ndim - weight.ndim + 1
    return [(dim, _times(groups, out.shape[dim] // groups))]


def _times(number: Any, width: int) -> Any:
    if not isinstance(number, Number) or number.formula is None:
        return number * width
    formula = Operation("*", number.formula, width)
    return Number.of(int(number) * width, formula, number.source)


_GROUPS: dict[Reader, str] = {
    _shaped(1): "view reshape expand broadcast_to new_zeros new_ones new_empty new_full",
    _shaped(0): "zeros ones empty full",
    _unflatten: "unflatten",
    _split: "split split_with_sizes",
    _normalised: "layer_norm rms_norm",
    _grouped: "group_norm",
    _convolved: "conv1d conv2d conv3d",
}
READERS: dict[str, Reader] = {
    name: reader for reader, names in _GROUPS.items() for name in names.split()
}
