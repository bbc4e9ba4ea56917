"""Tensors of torch that meet values of a program, as the native code reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node

from sparseworks.engine.making import Lowering
from sparseworks.engine.views import View, expression

__all__ = ["LOWEST", "Term", "fits", "ordered", "repeats", "summed"]

_aten = torch.ops.aten
LOWEST = torch.finfo(torch.float32).min

Term = tuple[Node, View, float]  # seen as scores are at that time, "i" through queries; a factor


def fits(node: Any, view: View) -> bool:
    """Whether a tensor can be added to scores as they are seen."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    if not isinstance(value, torch.Tensor) or value.ndim > len(view.dims):
        return False
    if value.dtype not in (torch.float32, torch.bool):
        return False
    sizes = view.sizes()[len(view.dims) - value.ndim :]
    return all(n == 1 or expression(n) == m for n, m in zip(value.shape, sizes, strict=True))


def summed(state: Lowering, terms: Sequence[Term], heads: int) -> tuple[Node | None, Node | None]:
    """What is the same for all heads `[entries or 1, 1, queries or 1, keys]`, and what is not
    `[entries or 1, heads, queries, keys]`.
    """
    shared: list[Node] = []
    apart: list[Node] = []
    for node, view, factor in _parted(terms):
        x = _by_heads(state, node, view)
        sizes = x.meta["val"].shape
        if sizes[3] == 1:  # the same for all keys: a softmax does not see it
            continue
        if factor != 1:
            x = state.insert(_aten.mul.Tensor, _floating(state, x), factor)
        (shared if sizes[1] == 1 or heads == 1 else apart).append(x)
    bias = _sum(state, apart)
    if bias is not None:
        if bias.meta["val"].shape[2] == 1:
            queries = state.insert(_aten.sym_size.int, bias, 3)  # of themselves: as many as keys
            bias = state.insert(_aten.expand.default, bias, [-1, -1, queries, -1])
        bias = state.insert(_aten.contiguous.default, _floating(state, bias))
    return _sum(state, shared), bias


def _by_heads(state: Lowering, node: Node, view: View) -> Node:
    """A term `[entries or those that repeat or 1, heads or 1, queries or 1, keys or 1]`."""
    return state.insert(_aten.flatten.using_ints, ordered(state, node, view, "bwhij"), 0, 1)


def repeats(node: Node, view: View) -> bool:
    """Whether a term differs from window to window: the native code takes those of no heads."""
    sizes = [1] * len(view.dims)
    given = node.meta["val"].shape
    sizes[len(sizes) - len(given) :] = given
    by_axis = {
        axis: any(n != 1 for n, dim in zip(sizes, view.dims, strict=True) for r in dim
                  if r.axis == axis)
        for axis in "bwh"
    }  # fmt: skip
    return by_axis["w"] and (by_axis["b"] or by_axis["h"])


def _parted(terms: Sequence[Term]) -> Iterator[Term]:
    """Sums of tensors of different shapes, one by one: a mask and a bias, say."""
    for node, view, factor in terms:
        parts = node.args if node.target is _aten.add.Tensor and not node.kwargs else ()
        apart = len(parts) == 2 and all(fits(p, view) for p in parts)
        if apart and len({str(p.meta["val"].shape) for p in parts}) == 2:  # type: ignore[union-attr]
            yield from _parted([(p, view, factor) for p in parts])  # type: ignore[misc]
        else:
            yield node, view, factor


def _sum(state: Lowering, terms: Sequence[Node]) -> Node | None:
    if len(terms) < 2:
        return terms[0] if terms else None
    total = _floating(state, terms[0])
    for term in terms[1:]:
        total = state.insert(_aten.add.Tensor, total, _floating(state, term))
    return total


def _floating(state: Lowering, node: Node) -> Node:
    """A mask of what is kept as numbers to be added."""
    if node.meta["val"].dtype != torch.bool:
        return node
    return state.insert(_aten.where.Scalar, node, 0.0, LOWEST)


def ordered(state: Lowering, x: Node, view: View, axes: str) -> Node:
    """A tensor that is added to or multiplied with what is seen as `view`, with these axes.

    Each has the size of all its runs, or 1.
    """
    for _ in range(len(view.dims) - x.meta["val"].ndim):
        x = state.insert(_aten.unsqueeze.default, x, 0)
    for axis in reversed(range(len(view.dims))):
        dim = view.dims[axis]
        if len(dim) > 1 and x.meta["val"].shape[axis] == 1:
            for _ in dim[1:]:
                x = state.insert(_aten.unsqueeze.default, x, axis)
        elif len(dim) > 1:
            x = state.insert(_aten.unflatten.int, x, axis, [-1, *(int(r.size) for r in dim[1:])])
    runs = [run for dim in view.dims for run in (dim or (None,))]
    keys = [(-1, 0) if r is None else (axes.index(r.axis), -r.step) for r in runs]
    order = sorted(range(len(runs)), key=lambda a: keys[a])
    if order != list(range(len(runs))):
        x = state.insert(_aten.permute.default, x, order)
    for _ in range(sum(r is None for r in runs)):
        x = state.insert(_aten.squeeze.dim, x, 0)
    left = [runs[a] for a in order if runs[a] is not None]
    for at, name in enumerate(axes):
        own = [r for r in left if r is not None and r.axis == name]
        if not own:
            x = state.insert(_aten.unsqueeze.default, x, at)
            continue
        sizes = x.meta["val"].shape[at : at + len(own)]
        if len(own) > 1 and len({n != 1 for n in sizes}) > 1:
            rank = x.meta["val"].ndim
            wanted = [*[-1] * at, *(int(r.size) for r in own), *[-1] * (rank - at - len(own))]
            x = state.insert(_aten.expand.default, x, wanted)
        if len(own) > 1:
            x = state.insert(_aten.flatten.using_ints, x, at, at + len(own) - 1)
    return x
