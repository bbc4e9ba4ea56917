"""From an exported graph to native operations: one rule per operator.

A rule looks at a node and either appends operations and says what the node's value is now, or
declines; what no rule takes runs through torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from sparseworks.engine.ir import (
    Activation,
    Attention,
    Combine,
    Heads,
    Load,
    Mean,
    Norm,
    Op,
    Pool,
    Product,
    Store,
    Value,
)

__all__ = ["Piece", "lower"]

_aten = torch.ops.aten


@dataclass(eq=False)
class Piece:
    """A native program in the making: values of one kind and batch that need no torch in between.

    Args:
        kind: "image" or "tokens".
        level: how many times torch has to run before it.
        ops: in order.
        inputs: nodes of the graph that it reads.
        outputs: nodes of the graph that others read.
        masks: of attention, nodes of the graph.
    """

    kind: str
    level: int
    ops: list[Op] = field(default_factory=list)
    inputs: dict[str, Node] = field(default_factory=dict)
    outputs: dict[str, Node] = field(default_factory=dict)
    masks: dict[str, Node] = field(default_factory=dict)

    @property
    def attends(self) -> bool:
        return any(isinstance(op, Attention) for op in self.ops)


@dataclass(eq=False)
class _Native:
    """What is known of a node whose value a program makes; `heads` where it is a view of heads."""

    piece: Piece
    value: Value
    heads: Heads | None = None


Rule = Callable[["_Lowering", Node], bool]
_RULES: dict[Any, Rule] = {}


def _rule(*targets: Any) -> Callable[[Rule], Rule]:
    def add(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(targets, rule))
        return rule

    return add


def lower(graph: torch.fx.Graph, constants: Mapping[str, Tensor]) -> list[Piece]:
    """Take what can be taken of an exported graph.

    Args:
        graph: of operators, with example values in `node.meta["val"]`.
        constants: parameters and buffers by the name of their node.

    Returns:
        Programs with at least one sparse product each; a node of the graph is made by at most one.
    """
    state = _Lowering(constants)
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        rule = _RULES.get(node.target)
        if rule is None or not rule(state, node):
            state.levels[node] = state.level_of(node)
    return state.finished(graph)


class _Lowering:
    def __init__(self, constants: Mapping[str, Tensor]) -> None:
        self.constants = constants
        self.native: dict[Node, _Native] = {}
        self.levels: dict[Node, int] = {}
        self.pieces: dict[tuple[str, int, str], Piece] = {}
        self.loaded: dict[tuple[Piece, Node], Value] = {}
        self.made: dict[Value, Op] = {}

    # what a rule needs

    def constant(self, node: Any) -> Tensor | None:
        return self.constants.get(node.name) if isinstance(node, Node) else None

    def level_of(self, node: Node) -> int:
        """How many programs have to be complete before torch can make this node."""
        return max(
            (
                self.native[n].piece.level + 1 if n in self.native else self.levels.get(n, 0)
                for n in node.all_input_nodes
            ),
            default=0,
        )

    def inputs(self, kind: str, *nodes: Any) -> tuple[Piece, list[Value]] | None:
        """These nodes as values of one program; None where they cannot be."""
        if not all(isinstance(n, Node) and _shape(n) is not None for n in nodes):
            return None
        batches = {_batch(n, kind) for n in nodes}
        if None in batches or len(batches) != 1:
            return None
        for n in nodes:
            if n in self.native and (self.native[n].heads or self.native[n].piece.kind != kind):
                return None
        level = max(
            self.native[n].piece.level if n in self.native else self.levels.get(n, 0)
            for n in nodes
        )
        key = (kind, level, str(batches.pop()))
        piece = self.pieces.setdefault(key, Piece(kind, level))
        return piece, [self._value(piece, n) for n in nodes]

    def _value(self, piece: Piece, node: Node) -> Value:
        known = self.native.get(node)
        if known is not None and known.piece is piece:
            return known.value
        if (piece, node) not in self.loaded:
            shape = _shape(node)
            assert shape is not None
            channels = shape[1] if piece.kind == "image" else shape[-1]
            value = Value(piece.kind, int(channels))
            piece.ops.append(Load(value, node.name, vector=len(shape) == 2))
            piece.inputs[node.name] = node
            self.loaded[piece, node] = value
            self.made[value] = piece.ops[-1]
        return self.loaded[piece, node]

    def add(self, piece: Piece, node: Node, op: Op) -> bool:
        piece.ops.append(op)
        self.made[op.out] = op
        self.native[node] = _Native(piece, op.out)
        return True

    def same(self, node: Node, source: Any) -> bool:
        """The node's value is its input's."""
        if source not in self.native:
            return False
        self.native[node] = replace(self.native[source])
        return True

    def product_alone(self, node: Any) -> Product | None:
        """The product that makes this node, where nothing else reads it and it may be extended."""
        known = self.native.get(node)
        op = self.made.get(known.value) if known is not None and known.heads is None else None
        if not isinstance(op, Product) or op.activation != Activation.NONE:
            return None
        while True:  # through nodes that are the same value
            if len(node.users) != 1:
                return None
            before = node.args[0] if node.args else None
            if not isinstance(before, Node) or before not in self.native:
                return op
            if self.native[before].value is not op.out:
                return op
            node = before

    # the end

    def finished(self, graph: torch.fx.Graph) -> list[Piece]:
        """Store what others read, and leave out programs that have nothing to skip."""
        pieces = [p for p in self.pieces.values() if any(isinstance(o, Product) for o in p.ops)]
        for node in graph.nodes:
            known = self.native.get(node)
            if known is None or known.piece not in pieces:
                continue
            piece = known.piece
            outside = [u for u in node.users if self._piece(u) is not piece]
            if outside and known.heads is None:
                self._store(piece, node, known.value)
        return sorted(pieces, key=lambda p: p.level)

    def _piece(self, node: Node) -> Piece | None:
        known = self.native.get(node)
        return None if known is None else known.piece

    def _store(self, piece: Piece, node: Node, value: Value) -> None:
        if node.name not in piece.outputs:
            shape = _shape(node) or ()
            piece.ops.append(Store(value, node.name, vector=len(shape) == 2))
            piece.outputs[node.name] = node


def _shape(node: Node) -> tuple[Any, ...] | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return None
    return tuple(value.shape)


def _batch(node: Node, kind: str) -> tuple[str, ...] | None:
    """What all values of a program have in common."""
    shape = _shape(node) or ()
    if kind == "image":
        fixed = all(isinstance(n, int) for n in shape[1:])
        return (str(shape[0]),) if len(shape) in (2, 4) and fixed else None
    if len(shape) not in (2, 3) or not isinstance(shape[-1], int):
        return None
    return tuple(str(n) for n in shape[:-1])


def _kind(node: Any, state: _Lowering) -> str | None:
    """How a value that a linear layer reads is best seen."""
    if not isinstance(node, Node):
        return None
    if node in state.native:
        return state.native[node].piece.kind
    return "tokens" if len(_shape(node) or ()) in (2, 3) else None


# one rule per operator


@_rule(_aten.conv2d.default)
def _conv(state: _Lowering, node: Node) -> bool:
    x, weight, bias, stride, padding, dilation, groups = _filled(
        node.args, (None, None, None, [1, 1], [0, 0], [1, 1], 1)
    )
    w = state.constant(weight)
    if w is None or (bias is not None and state.constant(bias) is None):
        return False
    pairs = [list(v) * (2 // len(v)) for v in (stride, padding, dilation)]
    if any(len(set(v)) != 1 for v in pairs):
        return False
    (s, _), (p, _), (d, _) = pairs
    if s > 2 and s == w.shape[2]:  # patches: a dense product of torch
        return False
    found = state.inputs("image", x)
    if found is None:
        return False
    piece, (value,) = found
    op = Product(
        Value("image", w.shape[0]), value, w, state.constant(bias), weight.name,
        stride=s, padding=p, dilation=d, groups=groups,
    )  # fmt: skip
    return state.add(piece, node, op)


@_rule(_aten.linear.default)
def _linear(state: _Lowering, node: Node) -> bool:
    x, weight, bias = _filled(node.args, (None, None, None))
    w = state.constant(weight)
    kind = _kind(x, state)
    if w is None or kind is None or (bias is not None and state.constant(bias) is None):
        return False
    if kind == "image" and len(_shape(x) or ()) != 2:
        return False
    found = state.inputs(kind, x)
    if found is None:
        return False
    piece, (value,) = found
    op = Product(Value(kind, w.shape[0]), value, w, state.constant(bias), weight.name)
    return state.add(piece, node, op)


@_rule(_aten.batch_norm.default)
def _batch_norm(state: _Lowering, node: Node) -> bool:
    x, weight, bias, mean, variance, training, _, epsilon, _ = node.args
    op = state.product_alone(x)
    if training or op is None or op.residual is not None:
        return False
    found = [state.constant(t) for t in (mean, variance)]
    if any(t is None for t in found):
        return False
    mu, var = (t.double() for t in found if t is not None)
    scale = (var + epsilon).rsqrt()  # type: ignore[operator]
    gamma, beta = state.constant(weight), state.constant(bias)
    if gamma is not None:
        scale = scale * gamma.double()
    shift = -mu * scale if op.bias is None else (op.bias.double() - mu) * scale
    if beta is not None:
        shift = shift + beta.double()
    shape = (-1,) + (1,) * (op.weight.ndim - 1)
    op.weight = (op.weight.double() * scale.view(shape)).float()
    op.bias = shift.float()
    return state.same(node, x)


_ACTIVATIONS = {
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


@_rule(*_ACTIVATIONS)
def _activation(state: _Lowering, node: Node) -> bool:
    return _activate(state, node, _ACTIVATIONS[node.target])


@_rule(_aten.hardtanh.default, _aten.hardtanh_.default)
def _hardtanh(state: _Lowering, node: Node) -> bool:
    limits = _filled(node.args, (None, -1.0, 1.0))[1:]
    return tuple(limits) == (0.0, 6.0) and _activate(state, node, Activation.RELU6)


def _activate(state: _Lowering, node: Node, activation: Activation) -> bool:
    x = node.args[0]
    if node.kwargs.get("approximate") == "tanh":
        activation = Activation.GELU_TANH
    known = state.native.get(x) if isinstance(x, Node) else None
    if known is None or known.heads is not None:
        return False
    op = state.product_alone(x)
    if op is not None and activation not in _NOT_ZERO_AT_ZERO:
        op.activation = activation
        return state.same(node, x)
    out = Value(known.value.kind, known.value.channels)
    return state.add(known.piece, node, Combine(out, known.value, activation=activation))


@_rule(_aten.add.Tensor, _aten.add_.Tensor, _aten.mul.Tensor, _aten.mul_.Tensor)
def _combine(state: _Lowering, node: Node) -> bool:
    x, y = node.args[:2]
    if not (isinstance(x, Node) and isinstance(y, Node)) or node.kwargs.get("alpha", 1) != 1:
        return False
    one = state.native.get(x) or state.native.get(y)
    shapes = (_shape(x), _shape(y))
    if one is None or one.heads is not None or None in shapes:
        return False
    multiply = node.target in (_aten.mul.Tensor, _aten.mul_.Tensor)
    small = one.piece.kind == "image" and _is_scale(shapes[0], shapes[1])
    if not small and tuple(map(str, shapes[0] or ())) != tuple(map(str, shapes[1] or ())):
        return False
    found = state.inputs(one.piece.kind, x, y)
    if found is None:
        return False
    piece, (a, b) = found
    if not multiply and not small:
        late = sorted(
            (op for n in (x, y) if (op := state.product_alone(n)) is not None and x is not y),
            key=piece.ops.index,
        )
        for op in reversed(late):
            other = b if op.out is a else a
            before = piece.ops.index(state.made[other]) < piece.ops.index(op)
            if op.residual is None and before:
                op.residual = other
                return state.same(node, x if op.out is a else y)
    return state.add(piece, node, Combine(Value(a.kind, a.channels), a, b, multiply=multiply))


def _is_scale(x: Any, y: Any) -> bool:
    return len(x) == len(y) == 4 and str(x[1]) == str(y[1]) and tuple(y[2:]) == (1, 1) != x[2:]


@_rule(_aten.dropout.default, _aten.dropout_.default, _aten.feature_dropout.default)
def _dropout(state: _Lowering, node: Node) -> bool:
    return not node.args[2] and state.same(node, node.args[0])


@_rule(_aten.contiguous.default, _aten.clone.default, _aten.detach.default, _aten.alias.default)
def _same(state: _Lowering, node: Node) -> bool:
    return state.same(node, node.args[0])


@_rule(_aten.max_pool2d.default)
def _max_pool(state: _Lowering, node: Node) -> bool:
    x, window, stride, padding, dilation, ceil = _filled(
        node.args, (None, None, None, [0, 0], [1, 1], False)
    )
    return tuple(set(dilation)) == (1,) and _pool(
        state, node, x, window, stride, padding, largest=True, ceil=ceil
    )


@_rule(_aten.avg_pool2d.default)
def _average_pool(state: _Lowering, node: Node) -> bool:
    x, window, stride, padding, ceil, count, divisor = _filled(
        node.args, (None, None, None, [0, 0], False, True, None)
    )
    return divisor is None and _pool(
        state, node, x, window, stride, padding, largest=False, ceil=ceil, count=count
    )


def _pool(
    state: _Lowering, node: Node, x: Any, window: Any, stride: Any, padding: Any, *,
    largest: bool, ceil: bool, count: bool = True,
) -> bool:  # fmt: skip
    values = [set(v) for v in (window, stride or window, padding)]
    if x not in state.native or any(len(v) != 1 for v in values):
        return False
    k, s, p = (v.pop() for v in values)
    known = state.native[x]
    out = Value("image", known.value.channels)
    op = Pool(out, known.value, k, s, p, largest, count_padding=count, ceil=ceil)
    return known.piece.kind == "image" and state.add(known.piece, node, op)


@_rule(_aten.adaptive_avg_pool2d.default)
def _adaptive(state: _Lowering, node: Node) -> bool:
    return set(node.args[1]) == {1} and _mean_of(state, node, node.args[0])


@_rule(_aten.mean.dim)
def _mean(state: _Lowering, node: Node) -> bool:
    x, axes, _ = _filled(node.args, (None, None, False))
    shape = _shape(x) or ()
    return {a % max(1, len(shape)) for a in axes} == {2, 3} and _mean_of(state, node, x)


def _mean_of(state: _Lowering, node: Node, x: Any) -> bool:
    known = state.native.get(x)
    if known is None or known.piece.kind != "image" or len(_shape(x) or ()) != 4:
        return False
    return state.add(known.piece, node, Mean(Value("image", known.value.channels), known.value))


@_rule(_aten.slice.Tensor)
def _slice(state: _Lowering, node: Node) -> bool:
    """Every n-th row and column: taken together with the padding of channels that follows."""
    _, axis, begin, end, step = _filled(node.args, (None, 0, None, None, 1))
    shape = _shape(node)
    if node.args[0] not in state.native or shape is None or len(shape) != 4:
        return False
    whole = (begin or 0) == 0 and isinstance(end, int | None) and (end is None or end > 1 << 40)
    if not whole or axis % 4 not in (0, 2, 3) or (axis % 4 == 0 and step != 1):
        return False
    if step == 1:
        return state.same(node, node.args[0])
    if axis % 4 == 2:  # the columns follow in the next node
        users = list(node.users)
        follows = len(users) == 1 and users[0].target is _aten.slice.Tensor
        again = _filled(users[0].args, (None, 0, None, None, 1)) if follows else None
        return again is not None and again[1:] == (3, begin, end, step) and state.same(
            node, node.args[0]
        )
    before = node.args[0]
    rows = _filled(before.args, (None, 0, None, None, 1)) if before.op == "call_function" else None
    if before.target is not _aten.slice.Tensor or rows is None or rows[1:] != (2, begin, end, step):
        return False
    known = state.native[before]
    channels = known.value.channels
    return state.add(known.piece, node, _identity(known.value, channels, 0, step))


@_rule(_aten.pad.default, _aten.constant_pad_nd.default)
def _pad(state: _Lowering, node: Node) -> bool:
    """Zero channels before and after."""
    x, amounts, *rest = node.args
    shape = _shape(x) or ()
    if x not in state.native or len(shape) != 4 or len(amounts) != 6 or any(amounts[:4]):
        return False
    if any(rest[:1]) and rest[0] not in ("constant", 0) or any(rest[1:]) or min(amounts) < 0:
        return False
    known = state.native[x]
    before = state.made.get(known.value)
    source, stride = known.value, 1
    if isinstance(before, Product) and before.name == "" and len(x.users) == 1:
        source, stride = before.x, before.stride
        known.piece.ops.remove(before)
    op = _identity(source, source.channels, amounts[4], stride, amounts[5])
    return known.piece.kind == "image" and state.add(known.piece, node, op)


def _identity(x: Value, channels: int, before: int, stride: int, after: int = 0) -> Product:
    """A product that copies pixels: one tap a channel."""
    weight = torch.zeros(before + channels + after, channels, 1, 1)
    weight[torch.arange(channels) + before, torch.arange(channels)] = 1.0
    return Product(Value("image", weight.shape[0]), x, weight, None, "", stride=stride)


@_rule(_aten.layer_norm.default)
def _layer_norm(state: _Lowering, node: Node) -> bool:
    x, shape, weight, bias, epsilon = _filled(node.args, (None, None, None, None, 1e-5))[:5]
    if len(shape) != 1 or any(n is not None and state.constant(n) is None for n in (weight, bias)):
        return False
    found = state.inputs("tokens", x)
    if found is None or len(_shape(x) or ()) != 3:
        return False
    piece, (value,) = found
    gamma, beta = state.constant(weight), state.constant(bias)
    return state.add(piece, node, Norm(Value("tokens", value.channels), value, gamma, beta, epsilon))


# views of heads


@_rule(_aten.view.default, _aten.reshape.default, _aten.unflatten.int, _aten.flatten.using_ints,
       _aten._unsafe_view.default, _aten.squeeze.dims)  # fmt: skip
def _view(state: _Lowering, node: Node) -> bool:
    x = node.args[0]
    known = state.native.get(x) if isinstance(x, Node) else None
    before, after = _shape(x) or (), _shape(node) or ()
    if known is None:
        return False
    if tuple(map(str, before)) == tuple(map(str, after)):
        return state.same(node, x)
    if known.piece.kind == "image":  # a single pixel becomes a vector
        vector = len(before) == 4 and len(after) == 2 and tuple(before[2:]) == (1, 1)
        return vector and state.same(node, x)
    if known.heads is None and len(before) == 3 and len(after) == 4:
        heads, size = after[2:]
        fits = isinstance(heads, int) and isinstance(size, int)
        if not fits or heads * size != before[2] or str(before[1]) != str(after[1]):
            return False
        first = known.heads.first if known.heads else 0
        state.native[node] = replace(known, heads=Heads(known.value, heads, size, first))
        return True
    if known.heads is not None and len(after) == 3:
        h = known.heads
        whole = h.heads * h.size == known.value.channels and h.order == ("b", "s", "h", "d")
        if whole and after[2] == known.value.channels and str(after[1]) == str(before[1]):
            state.native[node] = replace(known, heads=None)
            return True
    return False


@_rule(_aten.transpose.int)
def _transpose(state: _Lowering, node: Node) -> bool:
    axes = list(range(4))
    a, b = (axis % 4 for axis in node.args[1:])
    axes[a], axes[b] = b, a
    return _permuted(state, node, axes)


@_rule(_aten.permute.default)
def _permute(state: _Lowering, node: Node) -> bool:
    return len(node.args[1]) == 4 and _permuted(state, node, [a % 4 for a in node.args[1]])


def _permuted(state: _Lowering, node: Node, axes: list[int]) -> bool:
    known = state.native.get(node.args[0])
    if known is None or known.heads is None:
        return False
    order = tuple(known.heads.order[a] for a in axes)
    state.native[node] = replace(known, heads=replace(known.heads, order=order))
    return True


_SDPA = _aten.scaled_dot_product_attention.default


@_rule(_SDPA)
def _attention(state: _Lowering, node: Node) -> bool:
    q, k, v, mask, dropout, causal = _filled(node.args, (None, None, None, None, 0.0, False))
    known = [state.native.get(n) for n in (q, k, v)]
    if any(n is None or n.heads is None for n in known) or dropout:
        return False
    heads = [n.heads for n in known if n is not None and n.heads is not None]
    piece = known[0].piece  # type: ignore[union-attr]
    if any(h.order != ("b", "h", "s", "d") for h in heads):
        return False
    if any(n.piece is not piece for n in known if n is not None):
        return False
    if heads[1].heads != heads[2].heads or len({h.size for h in heads}) != 1:
        return False
    if heads[0].heads != heads[1].heads and not node.kwargs.get("enable_gqa"):
        return False
    name = None
    if mask is not None:
        shape = mask.meta["val"].shape
        if mask in state.native or state.levels.get(mask, 0) > piece.level or len(shape) != 4 or shape[1] != 1:
            return False
        name = mask.name
        piece.masks[name] = mask
    scale = node.kwargs.get("scale") or 1 / math.sqrt(heads[0].size)
    out = Value("tokens", heads[0].heads * heads[0].size)
    op = Attention(out, *heads, scale, bool(causal), name)
    state.add(piece, node, op)
    state.native[node] = _Native(
        piece, out, Heads(out, heads[0].heads, heads[0].size, 0, ("b", "h", "s", "d"))
    )
    return True


def _filled(given: tuple[Any, ...], defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*given, *defaults[len(given) :])
