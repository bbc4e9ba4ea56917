"""Activations, sums and products of two values, and what changes no value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from sparseworks.engine.ir import Activation, Combine, Norm, Product, Value
from sparseworks.engine.making import Lowering, rule
from sparseworks.engine.nodes import filled, same_sizes, shape_of
from sparseworks.engine.pieces import Native
from sparseworks.engine.rules.terms import fits, ordered
from sparseworks.engine.rules.tokens import by_mean_square

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
    _aten.mish.default: Activation.MISH,
}
_NOT_ZERO_AT_ZERO = (Activation.HARDSIGMOID, Activation.SIGMOID)


@rule(*_ACTIVATIONS, last=True)
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


@rule(_aten.elu.default)
def _elu(state: Lowering, node: Node) -> bool:
    _, alpha, scale, inner = filled(node, (None, 1.0, 1.0, 1.0))
    plain = scale == inner == 1
    return plain and _activate(state, node, Activation.ELU, slope=float(alpha))


@rule(_aten.prelu.default)
def _prelu(state: Lowering, node: Node) -> bool:
    """a x + (1 - a) relu(x), for each channel."""
    x, weight = node.args
    known, a = state.native.get(x), state.constant(weight)  # type: ignore[arg-type]
    if known is None or not known.whole or a is None:
        return False
    if a.numel() == 1 and 0 <= float(a) <= 1:
        return _activate(state, node, Activation.LEAKY_RELU, slope=float(a))
    if (shape_of(x) or (0, 0))[1] != known.value.channels:
        return False  # torch means the second axis
    kind, channels = known.value.kind, known.value.channels
    a = a.float().expand(channels)[:, None, None, None]
    positive, rest = Value(kind, channels), Value(kind, channels)
    state.hidden(known.piece, Combine(positive, known.value, activation=Activation.RELU))
    state.hidden(known.piece, Product(rest, positive, 1 - a, None, "", groups=channels))
    out = Value(kind, channels)
    op = Product(out, known.value, a.contiguous(), None, "", groups=channels, residual=rest)
    return state.add(known.piece, node, op)


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


@rule(_aten.div.Tensor, _aten.div_.Tensor, _aten.div.Scalar, _aten.mul.Scalar)
def _by_number(state: Lowering, node: Node) -> bool:
    x, y = node.args[:2]
    number = None if node.kwargs else state.number(y)
    if number is None or (number == 0 and node.target is not _aten.mul.Scalar):
        return False
    return _times(state, node, x, number if node.target is _aten.mul.Scalar else 1 / number)


def _times(state: Lowering, node: Node, x: Any, number: float) -> bool:
    """A value times a number: in the weights that make it, or where attention reads it."""
    known = state.native.get(x) if isinstance(x, Node) else None
    if known is None:
        return False
    if known.whole:
        return affine(state, node, x, torch.full((known.value.channels,), number), None)
    return state.scaled(node, known, number)


def affine(state: Lowering, node: Node, x: Any, scale: Tensor | None, shift: Tensor | None) -> bool:
    """Channels times numbers, or plus numbers of their own: in what makes them, or one tap each."""
    known = state.native.get(x)
    if known is None or not known.whole:
        return False
    op = state.alone(x)
    if isinstance(op, Norm):
        if scale is not None:
            op.gamma = scale if op.gamma is None else op.gamma * scale
            op.beta = None if op.beta is None else op.beta * scale
        if shift is not None:
            op.beta = shift if op.beta is None else op.beta + shift
        return state.same(node, x)
    op = state.product_alone(x)
    if op is not None and (scale is None or op.residual is None):
        if scale is not None:
            op.weight = op.weight * scale.view(-1, *(1,) * (op.weight.ndim - 1))
            op.bias = None if op.bias is None else op.bias * scale
        if shift is not None:
            op.bias = shift if op.bias is None else op.bias + shift
        return state.same(node, x)
    channels = known.value.channels
    weight = torch.ones(channels) if scale is None else scale.float()
    out = Value(known.value.kind, channels)
    product = Product(out, known.value, weight[:, None, None, None], shift, "", groups=channels)
    return state.add(known.piece, node, product)


@rule(_aten.neg.default)
def _negative(state: Lowering, node: Node) -> bool:
    return _times(state, node, node.args[0], -1.0)


@rule(_aten.add.Tensor, _aten.mul.Tensor, _aten.sub.Tensor, last=True)
def _combine(state: Lowering, node: Node) -> bool:
    x, y = node.args[:2]
    multiply = node.target is _aten.mul.Tensor
    if node in state.gelus:
        return _activate(state, node, Activation.GELU_TANH, state.gelus[node])
    if node in state.norms:
        root = state.norms[node]
        return by_mean_square(state, node, root[0], None, root[1])
    if node.kwargs.get("alpha", 1) != 1:
        return False
    if node.target is _aten.sub.Tensor:
        number = state.number(y)
        return number is not None and _by_channel(state, node, x, torch.tensor(-number), False)
    for one, other in ((x, y), (y, x)):
        number = state.number(other)
        if number is not None and multiply:
            return _times(state, node, one, number)
        held = torch.tensor(number) if number is not None else state.constant(other)
        if held is not None and one in state.native and held.ndim <= 4:
            return _by_channel(state, node, one, held, multiply)
    return _of_two(state, node, x, y, multiply)


def _by_channel(state: Lowering, node: Node, x: Any, held: Tensor, multiply: bool) -> bool:
    """A value with a constant that differs from channel to channel alone."""
    known = state.native.get(x)
    shape = shape_of(x)
    if known is None or not known.whole or shape is None:
        return _of_two(state, node, node.args[0], node.args[1], multiply)
    image = known.piece.kind == "image" and known.view is None and len(shape) == 4
    sizes = list(held.shape)
    rest = sizes[-3:-2] if image else sizes[-1:]
    if math.prod(sizes) != math.prod(rest):
        return _of_two(state, node, node.args[0], node.args[1], multiply)
    own = held.float().reshape(-1).expand(known.value.channels).contiguous()
    return affine(state, node, x, *((own, None) if multiply else (None, own)))


def _of_two(state: Lowering, node: Node, x: Any, y: Any, multiply: bool) -> bool:
    if not (isinstance(x, Node) and isinstance(y, Node)):
        return False
    one = state.native.get(x) or state.native.get(y)
    shapes = (shape_of(x), shape_of(y))
    if one is None or None in shapes:
        return False
    small = one.piece.kind == "image" and one.view is None and _is_scale(shapes[0], shapes[1])
    alike = same_sizes(shapes[0] or (), shapes[1] or ())
    both = [state.native.get(n) for n in (x, y)]
    if alike and _same_view(both) and node.name not in state.plain:
        a, b = (n.value for n in both if n is not None)
        out = Combine(Value(a.kind, a.channels), a, b, multiply=multiply)
        return state.add(one.piece, node, out, one.view)
    found = state.inputs(one.piece.kind, x, y) if small or alike else None
    if found is None:
        first, second = (x, y) if x in state.native else (y, x)
        return _spread(state, node, first, second, multiply)
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


def _same_view(known: Sequence[Native | None]) -> bool:
    """Whether values of a program are seen alike, and whole, though not channels last."""
    found = [k for k in known if k is not None and k.factor == 1 and k.view is not None]
    if len(found) != 2 or found[0].piece is not found[1].piece or found[0].whole:
        return False
    one, other = found
    covered = one.view is not None and one.view.covers(one.value.channels)
    return covered and (one.view, one.value.channels) == (other.view, other.value.channels)


def _spread(state: Lowering, node: Node, x: Node, y: Node, multiply: bool) -> bool:
    """A value, however it is seen, with a tensor of torch that is the same along some axes.

    As positions that are added, or the cosines of rotary embeddings.
    """
    known = state.native[x]
    base = state.bases.get(known.value)
    view = known.view or base
    if base is None or view is None or known.factor != 1 or len(base.dims) != 3:
        return False
    if y in state.native or state.levels.get(y, 0) > known.piece.level or not fits(y, view):
        return False
    if node.name in state.plain or not view.covers(known.value.channels):
        return False
    term = ordered(state, y, view, "bsc")
    if term.meta["val"].dtype != torch.float32:
        return False
    sizes = [-1, state.size(node.graph, base.sizes()[1]), known.value.channels]
    if sizes[1] is None:
        return False
    if any(n == 1 for n in term.meta["val"].shape[1:]):
        term = state.insert(_aten.expand.default, term, sizes)
    term = state.insert(_aten.contiguous.default, term)
    value = state.loaded_into(known.piece, term)
    op = Combine(Value("tokens", value.channels), known.value, value, multiply=multiply)
    return state.add(known.piece, node, op, view)


def _is_scale(x: Any, y: Any) -> bool:
    return len(x) == len(y) == 4 and str(x[1]) == str(y[1]) and tuple(y[2:]) == (1, 1) != x[2:]


@rule(_aten.dropout.default, _aten.dropout_.default, _aten.feature_dropout.default)
def _dropout(state: Lowering, node: Node) -> bool:
    return not filled(node, ())[2] and state.same(node, node.args[0])


@rule(
    _aten.contiguous.default, _aten.clone.default, _aten.detach.default, _aten.alias.default,
    last=True,
)  # fmt: skip
def _same(state: Lowering, node: Node) -> bool:
    return state.same(node, node.args[0])
