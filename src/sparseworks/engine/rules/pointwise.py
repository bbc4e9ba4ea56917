"""Activations, sums and products of two values, and what changes no value."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from sparseworks.engine.ir import Activation, Combine, Value
from sparseworks.engine.pieces import Lowering, filled, rule, same_sizes, shape_of

_aten = torch.ops.aten


_ACTIVATIONS: dict[Any, Activation] = {
    _aten.relu.default: Activation.RELU,
    _aten.relu_.default: Activation.RELU,
    _aten.silu.default: Activation.SILU,
    _aten.silu_.default: Activation.SILU,
    _aten.hardswish.default: Activation.HARDSWISH,
    _aten.hardswish_.default: Activation.HARDSWISH,
    _aten.hardsigmoid.default: Activation.HARDSIGMOID,
    _aten.hardsigmoid_.default: Activation.HARDSIGMOID,
    _aten.sigmoid.default: Activation.SIGMOID,
    _aten.tanh.default: Activation.TANH,
    _aten.relu6.default: Activation.RELU6,
    _aten.relu6_.default: Activation.RELU6,
    _aten.gelu.default: Activation.GELU,
}
_NOT_ZERO_AT_ZERO = (Activation.HARDSIGMOID, Activation.SIGMOID)


@rule(*_ACTIVATIONS)
def _activation(state: Lowering, node: Node) -> bool:
    return _activate(state, node, _ACTIVATIONS[node.target])


@rule(_aten.hardtanh.default, _aten.hardtanh_.default)
def _hardtanh(state: Lowering, node: Node) -> bool:
    limits = filled(node, (None, -1.0, 1.0))[1:]
    return tuple(limits) == (0.0, 6.0) and _activate(state, node, Activation.RELU6)


@rule(_aten.leaky_relu.default, _aten.leaky_relu_.default)
def _leaky_relu(state: Lowering, node: Node) -> bool:
    slope = filled(node, (None, 0.01))[1]
    return 0 <= slope <= 1 and _activate(state, node, Activation.LEAKY_RELU, slope=slope)


def _activate(
    state: Lowering, node: Node, activation: Activation, x: Any = None, slope: float = 0.0
) -> bool:
    x = node.args[0] if x is None else x
    if node.kwargs.get("approximate") == "tanh":
        activation = Activation.GELU_TANH
    known = state.native.get(x) if isinstance(x, Node) else None
    if known is None or not known.whole:
        return False
    op = state.product_alone(x)
    if op is not None and activation not in _NOT_ZERO_AT_ZERO:
        op.activation, op.slope = activation, slope
        return state.same(node, x)
    out = Value(known.value.kind, known.value.channels)
    return state.add(
        known.piece, node, Combine(out, known.value, activation=activation, slope=slope)
    )


@rule(_aten.add.Tensor, _aten.add_.Tensor, _aten.mul.Tensor, _aten.mul_.Tensor)
def _combine(state: Lowering, node: Node) -> bool:
    x, y = node.args[:2]
    if node in state.gelus:
        return _activate(state, node, Activation.GELU_TANH, state.gelus[node])
    if not (isinstance(x, Node) and isinstance(y, Node)) or node.kwargs.get("alpha", 1) != 1:
        return False
    one = state.native.get(x) or state.native.get(y)
    shapes = (shape_of(x), shape_of(y))
    if one is None or None in shapes:
        return False
    multiply = node.target in (_aten.mul.Tensor, _aten.mul_.Tensor)
    small = one.piece.kind == "image" and _is_scale(shapes[0], shapes[1])
    if not small and not same_sizes(shapes[0] or (), shapes[1] or ()):
        return False
    found = state.inputs(one.piece.kind, x, y)
    if found is None:
        return False
    piece, (a, b) = found
    if not multiply and not small:
        alone = (state.product_alone(n) for n in (x, y) if x is not y)
        late = sorted((op for op in alone if op in piece.ops), key=piece.ops.index)
        for op in reversed(late):
            other = b if op.out is a else a
            before = piece.ops.index(state.made[other]) < piece.ops.index(op)
            if op.residual is None and before:
                op.residual = other
                return state.same(node, x if op.out is a else y)
    return state.add(piece, node, Combine(Value(a.kind, a.channels), a, b, multiply=multiply))


def _is_scale(x: Any, y: Any) -> bool:
    return len(x) == len(y) == 4 and str(x[1]) == str(y[1]) and tuple(y[2:]) == (1, 1) != x[2:]


@rule(_aten.dropout.default, _aten.dropout_.default, _aten.feature_dropout.default)
def _dropout(state: Lowering, node: Node) -> bool:
    return not filled(node, ())[2] and state.same(node, node.args[0])


@rule(_aten.contiguous.default, _aten.clone.default, _aten.detach.default, _aten.alias.default)
def _same(state: Lowering, node: Node) -> bool:
    return state.same(node, node.args[0])
