"""Convolutions, batch norms folded into them, pooling, and shortcuts without weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from sparseworks.engine.ir import Gather, Mean, Pool, Product, Upsample, Value
from sparseworks.engine.making import Lowering, rule
from sparseworks.engine.nodes import filled, shape_of, size_now
from sparseworks.engine.rules.views import joined, seen, take

_aten = torch.ops.aten


@rule(_aten.conv2d.default)
def _conv(state: Lowering, node: Node) -> bool:
    x, weight, bias, stride, padding, dilation, groups = filled(
        node, (None, None, None, [1, 1], [0, 0], [1, 1], 1)
    )
    w = state.constant(weight)
    if w is None or (bias is not None and state.constant(bias) is None):
        return False
    (s, across), zeros, (d, spread) = (list(v) * (2 // len(v)) for v in (stride, padding, dilation))
    p, more = max(zeros), 0
    border, odd = zip(*(divmod(p - z, d) for z in zeros), strict=True)
    if s != across or d != spread or any(odd):
        return False
    if any(border):  # a kernel with more zeros, where the image has more zeros beside it
        w = torch.nn.functional.pad(w, (border[1], border[1], border[0], border[0]))
    if x in state.padded and p == 0:
        x, p, more = state.padded[x]
    if s > 2 and s == w.shape[2]:
        return (w.shape[3], p, d, groups) == (s, 0, 1, 1) and _patches(state, node, x, weight, bias)
    found = state.inputs("image", x)
    if found is None:
        return False
    piece, (value,) = found
    op = Product(
        Value("image", w.shape[0]), value, w, state.constant(bias), _name_of(weight),
        stride=s, padding=p, more=more, dilation=d, groups=groups, border=border,
    )  # fmt: skip
    return state.add(piece, node, op)


def _name_of(weight: Any) -> Any:
    """Also of one that is seen as a kernel of one row."""
    return weight.args[0].name if weight.target is _aten.unsqueeze.default else weight.name


def _patches(state: Lowering, node: Node, x: Any, weight: Any, bias: Any) -> bool:
    """Patches that do not overlap: torch makes channels of their pixels, one tap each."""
    shape, w = shape_of(x) or (), state.constant(weight)
    assert w is not None
    size = w.shape[2]
    fixed = len(shape) == 4 and all(isinstance(n, int) and n % size == 0 for n in shape[2:])
    if not fixed or x in state.native:
        return False
    found = state.inputs("image", state.insert(_aten.pixel_unshuffle.default, x, size))
    if found is None:
        return False
    piece, (value,) = found
    flat = w.reshape(w.shape[0], -1, 1, 1)
    out = Value("image", w.shape[0])
    return state.add(piece, node, Product(out, value, flat, state.constant(bias), weight.name))


@rule(_aten.batch_norm.default)
def _batch_norm(state: Lowering, node: Node) -> bool:
    training, epsilon = node.args[5], node.args[7]
    return not training and _normalised(state, node, epsilon)


@rule(_aten._native_batch_norm_legit_no_training.default)
def _batch_norm_out_of_place(state: Lowering, node: Node) -> bool:
    return _normalised(state, node, node.args[6])


def _normalised(state: Lowering, node: Node, epsilon: Any) -> bool:
    x, weight, bias, mean, variance = filled(node, ())[:5]
    found = [state.constant(t) for t in (mean, variance)]
    if any(t is None for t in found):
        return False
    mu, var = (t.double() for t in found if t is not None)
    scale = (var + epsilon).rsqrt()
    gamma, beta = state.constant(weight), state.constant(bias)
    if gamma is not None:
        scale = scale * gamma.double()
    shift = -mu * scale if beta is None else beta.double() - mu * scale
    op = state.product_alone(x)
    if op is None or op.residual is not None:
        return _scaled(state, node, x, scale, shift)
    if op.bias is not None:
        shift = shift + op.bias.double() * scale
    shape = (-1,) + (1,) * (op.weight.ndim - 1)
    op.weight = (op.weight.double() * scale.view(shape)).float()
    op.bias = shift.float()
    return state.same(node, x)


def _scaled(state: Lowering, node: Node, x: Node, scale: Tensor, shift: Tensor) -> bool:
    """A batch norm by itself: one tap a channel."""
    found = state.inputs("image", x) if x in state.native and len(shape_of(x) or ()) == 4 else None
    if found is None:
        return False
    piece, (value,) = found
    weight, channels = scale.float()[:, None, None, None], value.channels
    op = Product(Value("image", channels), value, weight, shift.float(), node.name, groups=channels)
    return state.add(piece, node, op)


@rule(_aten.max_pool2d.default)
def _max_pool(state: Lowering, node: Node) -> bool:
    x, window, stride, padding, dilation, ceil = filled(
        node, (None, None, None, [0, 0], [1, 1], False)
    )
    return tuple(set(dilation)) == (1,) and _pool(
        state, node, x, window, stride, padding, largest=True, ceil=ceil
    )


@rule(_aten.avg_pool2d.default)
def _average_pool(state: Lowering, node: Node) -> bool:
    x, window, stride, padding, ceil, count, divisor = filled(
        node, (None, None, None, [0, 0], False, True, None)
    )
    return divisor is None and _pool(
        state, node, x, window, stride, padding, largest=False, ceil=ceil, count=count
    )


def _pool(
    state: Lowering, node: Node, x: Any, window: Any, stride: Any, padding: Any, *,
    largest: bool, ceil: bool, count: bool = True,
) -> bool:  # fmt: skip
    values = [list(v) * (2 // len(v)) for v in (window, stride or window, padding)]
    row = [v[0] for v in values] == [1, 1, 0] and (shape_of(x) or ())[2:3] == (1,)
    if x not in state.native or not (row or all(v[0] == v[1] for v in values)):
        return False
    k, s, p = (v[1] for v in values)
    if row and not largest:
        if p and count:  # the rows above and below would be counted as well
            return False
        count = False
    known = state.native[x]
    out = Value("image", known.value.channels)
    op = Pool(out, known.value, k, s, p, largest, count_padding=count, ceil=ceil, row=row)
    return known.piece.kind == "image" and state.add(known.piece, node, op)


@rule(_aten.mean.dim)
def _mean(state: Lowering, node: Node) -> bool:
    x, axes, _ = filled(node, (None, None, False))
    shape = shape_of(x) or ()
    return {a % max(1, len(shape)) for a in axes} == {2, 3} and mean_of(state, node, x)


def mean_of(state: Lowering, node: Node, x: Any) -> bool:
    known = state.native.get(x)
    if known is None or known.piece.kind != "image" or len(shape_of(x) or ()) != 4:
        return False
    return state.add(known.piece, node, Mean(Value("image", known.value.channels), known.value))


@rule(_aten.upsample_nearest2d.vec)
def _upsample(state: Lowering, node: Node) -> bool:
    x = node.args[0]
    before, after = shape_of(x), shape_of(node)
    known = state.native.get(x) if isinstance(x, Node) else None
    if known is None or known.piece.kind != "image" or before is None or after is None:
        return False
    sizes = list(zip(after[2:], before[2:], strict=True))
    factor = size_now(after[2]) // size_now(before[2])
    if any(size_now(n) != factor * size_now(m) for n, m in sizes):
        return False
    if any(n != factor * m for n, m in sizes):  # of sizes that may change: it is noted in the graph
        return False
    out = Value("image", known.value.channels)
    return state.add(known.piece, node, Upsample(out, known.value, factor))


@rule(_aten.cat.default)
def _cat(state: Lowering, node: Node) -> bool:
    nodes, axis = filled(node, (None, 0))
    if all(n in state.native and seen(state, n) is not None for n in nodes):
        return joined(state, node, nodes, axis)
    if axis % 4 != 1 or not all(len(shape_of(n) or ()) == 4 for n in nodes):
        return False
    found = state.inputs("image", *nodes) if any(n in state.native for n in nodes) else None
    if found is None:
        return False
    piece, values = found
    out = Value("image", sum(v.channels for v in values))
    return state.add(piece, node, Gather(out, [(v, 0, v.channels) for v in values]))


@rule(_aten.slice.Tensor)
def _slice(state: Lowering, node: Node) -> bool:
    """Every n-th row and column: taken together with the padding of channels that follows."""
    x, axis, begin, end, step = filled(node, (None, 0, None, None, 1))
    shape = shape_of(node)
    if x not in state.native or shape is None:
        return False
    every = begin in (None, 0) and (end is None or (isinstance(end, int) and end > 1 << 40))
    if every and step == 1:
        return state.same(node, x)
    if state.native[x].piece.kind == "tokens" or axis % 4 == 1:
        size = (shape_of(x) or ())[axis]
        known = isinstance(size, int) and isinstance(begin or 0, int) and step == 1
        return known and take(state, node, x, axis, (begin or 0) % size, shape[axis])
    if len(shape) != 4:
        return False
    whole = (begin or 0) == 0 and isinstance(end, int | None) and (end is None or end > 1 << 40)
    if not whole or axis % 4 not in (0, 2, 3) or (axis % 4 == 0 and step != 1):
        return False
    if step == 1:
        return state.same(node, x)
    if axis % 4 == 2:  # the columns follow in the next node
        users = list(node.users)
        follows = len(users) == 1 and users[0].target is _aten.slice.Tensor
        again = filled(users[0], (None, 0, None, None, 1)) if follows else None
        return again is not None and again[1:] == (3, begin, end, step) and state.same(node, x)
    rows = filled(x, (None, 0, None, None, 1)) if x.op == "call_function" else None
    if x.target is not _aten.slice.Tensor or rows is None or rows[1:] != (2, begin, end, step):
        return False
    known = state.native[x]
    channels = known.value.channels
    return state.add(known.piece, node, _identity(known.value, channels, 0, step))


@rule(_aten.pad.default, _aten.constant_pad_nd.default)
def _pad(state: Lowering, node: Node) -> bool:
    """Zero channels before and after, or zero pixels that a convolution takes as its padding."""
    x, amounts, *rest = filled(node, ())
    shape = shape_of(x) or ()
    if len(shape) == len(amounts) == 4:
        return _pad_pixels(state, node, x, amounts, rest)
    if x not in state.native or len(shape) != 4 or len(amounts) != 6 or any(amounts[:4]):
        return False
    if (any(rest[:1]) and rest[0] not in ("constant", 0)) or any(rest[1:]) or min(amounts) < 0:
        return False
    known = state.native[x]
    before = state.made.get(known.value)
    source, stride = known.value, 1
    if isinstance(before, Product) and before.name == "" and len(x.users) == 1:
        source, stride = before.x, before.stride
        known.piece.ops.remove(before)
    op = _identity(source, source.channels, amounts[4], stride, amounts[5])
    return known.piece.kind == "image" and state.add(known.piece, node, op)


def _pad_pixels(state: Lowering, node: Node, x: Node, amounts: Any, rest: list[Any]) -> bool:
    left, right, top, bottom = amounts
    zeros = not any(rest[1:]) and (not rest or rest[0] in ("constant", 0))
    even = left == top and right == bottom and 0 <= left <= right
    if not zeros or not even or any(u.target is not _aten.conv2d.default for u in node.users):
        return False
    state.padded[node] = (x, left, right - left)
    state.levels[node] = state.level_of(node)  # torch pads where the convolution stays with torch
    return True


def _identity(x: Value, channels: int, before: int, stride: int, after: int = 0) -> Product:
    """A product that copies pixels: one tap a channel."""
    weight = torch.zeros(before + channels + after, channels, 1, 1)
    weight[torch.arange(channels) + before, torch.arange(channels)] = 1.0
    return Product(Value("image", weight.shape[0]), x, weight, None, "", stride=stride)
