"""Linear layers and layer norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from sparseworks.engine.ir import Gather, Norm, Product, Value
from sparseworks.engine.making import Lowering, kind_of, rule
from sparseworks.engine.nodes import filled, shape_of
from sparseworks.engine.rules.spelt_attention import contracted
from sparseworks.engine.views import Run

_aten = torch.ops.aten


@rule(_aten.linear.default, last=True)
def _linear(state: Lowering, node: Node) -> bool:
    x, weight, bias = filled(node, (None, None, None))
    return _linear_map(state, node, x, weight, bias)


@rule(_aten.addmm.default)
def _addmm(state: Lowering, node: Node) -> bool:
    bias, x, weight = node.args[:3]
    scaled = any(n != 1 for n in node.kwargs.values())
    return not scaled and _linear_map(state, node, x, weight, bias, turned=True)


@rule(_aten.mm.default, _aten.matmul.default)
def _matmul(state: Lowering, node: Node) -> bool:
    x, weight = node.args[:2]
    if contracted(state, node, x, weight):
        return True
    return _linear_map(state, node, x, weight, None, turned=True)


def _linear_map(
    state: Lowering, node: Node, x: Any, weight: Any, bias: Any, turned: bool = False
) -> bool:
    """x W^T + b, or x W + b where the weight is `turned`."""
    w = state.constant(weight)
    kind = kind_of(x, state)
    if w is None or w.ndim != 2 or kind is None:
        return False
    if bias is not None and (state.constant(bias) is None or state.constant(bias).ndim != 1):  # type: ignore[union-attr]
        return False
    w = w.t().contiguous() if turned else w
    if kind == "image" and len(shape_of(x) or ()) != 2 and state.native[x].view is None:
        return False
    found = state.inputs(kind, x)
    if found is None:
        return False
    piece, (value,) = found
    op = Product(Value(kind, w.shape[0]), value, w, state.constant(bias), weight.name)
    return state.add(piece, node, op)


@rule(_aten.layer_norm.default, last=True)
def _layer_norm(state: Lowering, node: Node) -> bool:
    x, shape, weight, bias, epsilon = filled(node, (None, None, None, None, 1e-5))[:5]
    if len(shape) != 1 or any(n is not None and state.constant(n) is None for n in (weight, bias)):
        return False
    if _by_heads(state, node, x, state.constant(weight), state.constant(bias), epsilon, True):
        return True
    known = state.native.get(x)
    image = known is not None and known.piece.kind == "image"
    wanted = 3 if not image else 2 if known.view is None else 4  # type: ignore[union-attr]
    found = state.inputs("image" if image else "tokens", x)
    if found is None or len(shape_of(x) or ()) != wanted:
        return False
    piece, (value,) = found
    gamma, beta = state.constant(weight), state.constant(bias)
    return state.add(
        piece, node, Norm(Value(value.kind, value.channels), value, gamma, beta, epsilon)
    )


@rule(_aten.rms_norm.default)
def _rms_norm(state: Lowering, node: Node) -> bool:
    x, shape, weight, epsilon = filled(node, (None, None, None, None))
    if len(shape) != 1 or (weight is not None and state.constant(weight) is None):
        return False
    smallest = torch.finfo(torch.float32).eps if epsilon is None else epsilon
    return by_mean_square(state, node, x, state.constant(weight), smallest)


def by_mean_square(
    state: Lowering, node: Node, x: Node, gamma: Tensor | None, epsilon: float
) -> bool:
    """x / sqrt(mean of x^2 + epsilon) gamma."""
    if _by_heads(state, node, x, gamma, None, epsilon, False):
        return True
    found = state.inputs("tokens", x)
    if found is None or len(shape_of(x) or ()) != 3:
        return False
    piece, (value,) = found
    out = Value("tokens", value.channels)
    return state.add(piece, node, Norm(out, value, gamma, None, epsilon, centred=False))


def _by_heads(
    state: Lowering, node: Node, x: Any, gamma: Tensor | None, beta: Tensor | None,
    epsilon: float, centred: bool,
) -> bool:  # fmt: skip
    """A norm over the channels of each head, as of queries and keys: head by head."""
    known = state.native.get(x)
    if known is None or known.piece.kind != "tokens" or known.view is None or known.factor != 1:
        return False
    view, value = known.view, known.value
    heads = [run for dim in view.dims[:-1] for run in dim if run.axis == "c"]
    last = view.dims[-1]
    if len(heads) != 1 or len(last) != 1 or node.name in state.plain:
        return False
    size = int(last[0].size)
    if (
        last != (Run("c", last[0].size),)
        or heads[0].step != size
        or not view.covers(value.channels)
    ):
        return False
    made = []
    for first in range(0, value.channels, size):
        one, normed = Value("tokens", size), Value("tokens", size)
        state.hidden(known.piece, Gather(one, [(value, first, size)]))
        state.hidden(known.piece, Norm(normed, one, gamma, beta, epsilon, centred))
        made.append((normed, 0, size))
    return state.add(known.piece, node, Gather(Value("tokens", value.channels), made), view)
