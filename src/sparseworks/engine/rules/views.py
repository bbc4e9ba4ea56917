"""What changes the axes of a value and nothing else, and parts of its channels."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from sparseworks.engine.ir import Gather, Value
from sparseworks.engine.pieces import Lowering, Native, filled, rule, shape_of
from sparseworks.engine.views import View, base_view

_aten = torch.ops.aten
_SPLITS = (_aten.split.Tensor, _aten.split_with_sizes.default, _aten.chunk.default)


def _seen(state: Lowering, node: Any) -> tuple[Native, View] | None:
    """A node of tokens as a view."""
    known = state.native.get(node)
    if known is None or known.piece.kind != "tokens":
        return None
    return known, known.view or state.bases[known.value]


@rule(_aten.view.default, _aten.reshape.default, _aten.unflatten.int, _aten.flatten.using_ints,
      _aten._unsafe_view.default, _aten.squeeze.dims)  # fmt: skip
def _reshape(state: Lowering, node: Node) -> bool:
    x = node.args[0]
    before, after = shape_of(x) or (), shape_of(node) or ()
    found = _seen(state, x)
    if found is not None:
        return state.see(node, found[0], found[1].regrouped(after))
    if x in state.native:  # a single pixel becomes a vector
        vector = len(before) == 4 and len(after) == 2 and tuple(before[2:]) == (1, 1)
        same = tuple(map(str, before)) == tuple(map(str, after))
        return (vector or same) and state.same(node, x)
    return False


@rule(_aten.transpose.int)
def _transpose(state: Lowering, node: Node) -> bool:
    x, one, two = filled(node, ())
    axes = list(range(len(shape_of(x) or ())))
    if axes:
        axes[one], axes[two] = axes[two], axes[one]
    return _permuted(state, node, axes)


@rule(_aten.permute.default)
def _permute(state: Lowering, node: Node) -> bool:
    return _permuted(state, node, filled(node, ())[1])


def _permuted(state: Lowering, node: Node, axes: list[int]) -> bool:
    x: Any = node.args[0]
    found = _seen(state, x)
    if found is not None:
        return state.see(node, found[0], found[1].permuted(axes))
    linear = any(user.target is _aten.linear.default for user in node.users)
    if x in state.native or axes != [1, 0, 2] or not linear or x.name in state.plain:
        return False
    loaded = state.inputs("tokens", x)  # what is [tokens, entries, channels] from here on
    if loaded is None:
        return False
    piece, (value,) = loaded
    return state.see(node, Native(piece, value), base_view(shape_of(x) or ()).permuted(axes))


@rule(_aten.unsqueeze.default)
def _unsqueeze(state: Lowering, node: Node) -> bool:
    x, axis = filled(node, ())
    found = _seen(state, x)
    return found is not None and state.see(node, found[0], found[1].unsqueezed(axis))


@rule(_aten.squeeze.dim)
def _squeeze(state: Lowering, node: Node) -> bool:
    x, axis = filled(node, ())
    found = _seen(state, x)
    return found is not None and state.see(node, found[0], found[1].squeezed(axis))


@rule(_aten.select.int)
def _select(state: Lowering, node: Node) -> bool:
    x, axis, index = filled(node, ())
    found = _seen(state, x)
    return found is not None and state.see(node, found[0], found[1].selected(axis, index))


@rule(operator.getitem)
def _part(state: Lowering, node: Node) -> bool:
    """Of axes that are split or unbound."""
    whole: Any = node.args[0]
    index: Any = node.args[1]
    x = whole.args[0] if isinstance(whole, Node) and whole.args else None
    if whole.target is _aten._native_batch_norm_legit_no_training.default:
        return index == 0 and state.same(node, whole)
    if x not in state.native:
        return False
    given: list[Any] = [*whole.args[1:], *whole.kwargs.values(), 0, 0]
    found, taken = _seen(state, x), False
    if whole.target is _aten.unbind.int and found is not None:
        taken = state.see(node, found[0], found[1].selected(given[0], index))
    elif whole.target in _SPLITS:
        sizes = [t.shape[given[1]] for t in whole.meta["val"]]
        known = all(isinstance(n, int) for n in sizes)
        taken = known and take(state, node, x, given[1], sum(sizes[:index]), sizes[index])
    if taken:
        state.passed.add(whole)
    return taken


def take(state: Lowering, node: Node, x: Any, axis: int, first: int, count: int) -> bool:
    """Some channels of a value."""
    found = _seen(state, x)
    if found is not None:
        return state.see(node, found[0], found[1].narrowed(axis, first, count))
    known = state.native.get(x)
    if known is None or len(shape_of(x) or ()) != 4 or axis % 4 != 1:
        return False
    op = Gather(Value("image", count), [(known.value, first, count)])
    return state.add(known.piece, node, op)
