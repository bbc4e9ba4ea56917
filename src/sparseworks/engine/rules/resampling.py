"""What moves pixels: other sizes, channels that become pixels, transposed convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from sparseworks.engine.ir import GroupNorm, Move, Moved, Product, Value
from sparseworks.engine.making import Lowering, rule
from sparseworks.engine.nodes import filled, shape_of
from sparseworks.engine.rules.images import mean_of

_aten = torch.ops.aten
_MODES = {
    _aten.upsample_bilinear2d.vec: "linear",
    _aten.upsample_bicubic2d.vec: "bicubic",
}


def _image(state: Lowering, x: Any) -> tuple[int, int] | None:
    """Height and width of a value that is an image as it is."""
    known = state.native.get(x)
    shape = shape_of(x) or ()
    fixed = len(shape) == 4 and all(isinstance(n, int) for n in shape[1:])
    plain = known is not None and known.piece.kind == "image" and known.view is None
    return (shape[2], shape[3]) if plain and fixed and known.factor == 1 else None  # type: ignore[union-attr]


def _shuffled(x: Value, size: tuple[int, int], factor: int) -> Move:
    """Channels (c, i, j) become pixels (y factor + i, x factor + j) of channel c."""
    height, width = size
    out = Value("image", x.channels // factor**2)
    y, column = torch.arange(height)[:, None], torch.arange(width)[None, :]
    parts = []
    for i in range(factor):
        for j in range(factor):
            places = (y * factor + i) * width * factor + column * factor + j
            sources = torch.arange(height * width)
            first = i * factor + j
            moved = Moved(x, sources, places.flatten(), None, first, factor**2, out.channels)
            parts.append(moved)
    return Move(out, parts, (height * factor, width * factor))


@rule(_aten.pixel_shuffle.default)
def _pixel_shuffle(state: Lowering, node: Node) -> bool:
    x, factor = filled(node, ())
    size = _image(state, x)
    if size is None:
        return False
    known = state.native[x]
    return state.add(known.piece, node, _shuffled(known.value, size, factor))


@rule(_aten.conv_transpose2d.input)
def _transposed(state: Lowering, node: Node) -> bool:
    """A convolution that makes all pixels of a cell of the output at once, as channels."""
    x, weight, bias, strides, paddings, _, groups, dilation = filled(
        node, (None, None, None, [1, 1], [0, 0], [0, 0], 1, [1, 1])
    )
    w, made = state.constant(weight), shape_of(node) or ()
    shape = shape_of(x) or ()
    if w is None or groups != 1 or {*dilation} != {1} or len({*strides}) + len({*paddings}) != 2:
        return False
    s, p = strides[0], paddings[0]
    fixed = len(shape) == 4 and all(isinstance(n, int) for n in (*shape[1:], *made[1:]))
    if not fixed or tuple(made[2:]) != (s * shape[2], s * shape[3]) or w.shape[2] != w.shape[3]:
        return False
    reach = [(a + p - u) // s for a in range(s) for u in range(w.shape[2]) if (a + p - u) % s == 0]
    before, kernel = -min(reach), max(reach) - min(reach) + 1
    more = kernel - 1 - 2 * before
    if before < 0 or more < 0:
        return False
    found = state.inputs("image", x)
    if found is None or (x in state.native and state.native[x].view is not None):
        return False
    piece, (value,) = found
    cells = torch.zeros(w.shape[1], s, s, w.shape[0], kernel, kernel)
    for a in range(s):
        for b in range(s):
            for u in range(w.shape[2]):
                for v in range(w.shape[3]):
                    if (a + p - u) % s == 0 and (b + p - v) % s == 0:
                        y, z = (a + p - u) // s + before, (b + p - v) // s + before
                        cells[:, a, b, :, y, z] = w[:, :, u, v].t()
    rows = w.shape[1] * s * s
    shift = None if bias is None else state.constant(bias).repeat_interleave(s * s)  # type: ignore[union-attr]
    parts = Value("image", rows)
    state.hidden(piece, Product(
        parts, value, cells.reshape(rows, w.shape[0], kernel, kernel), shift, weight.name,
        padding=before, more=more,
    ))  # fmt: skip
    return state.add(piece, node, _shuffled(parts, (shape[2], shape[3]), s))


@rule(*_MODES)
def _resized(state: Lowering, node: Node) -> bool:
    x, size, corners, factors = filled(node, (None, None, None, None))[:4]
    mode = _MODES[node.target]  # type: ignore[index]

    def resized(count: int, axis: int) -> Tensor:
        given: dict[str, Any] = {"align_corners": corners}
        given |= {"scale_factor": factors[axis]} if factors else {"size": size[axis]}
        if mode == "linear":
            return F.interpolate(torch.eye(count)[None], mode="linear", **given)[0]
        tall = torch.eye(count)[None, :, :, None].expand(1, count, count, 1)
        given["size"] = (shape_of(node) or ())[2 + axis], 1
        given.pop("scale_factor", None)
        return F.interpolate(tall, mode="bicubic", **given)[0, :, :, 0]

    if mode == "bicubic" and factors and any(f != int(f) for f in factors):
        return False
    return _sampled(state, node, x, resized)


@rule(_aten.adaptive_avg_pool2d.default)
def _averaged(state: Lowering, node: Node) -> bool:
    x, size = filled(node, ())
    if set(size) == {1}:
        return mean_of(state, node, x)

    def pooled(count: int, axis: int) -> Tensor:
        return F.adaptive_avg_pool1d(torch.eye(count)[None], size[axis])[0]

    return _sampled(state, node, x, pooled)


def _sampled(state: Lowering, node: Node, x: Any, matrix: Any) -> bool:
    """Pixels that are sums of pixels of some rows and columns, by a matrix for each."""
    size = _image(state, x)
    if size is None:
        return False
    (rows, of_rows), (columns, of_columns) = (_taps(matrix(n, i)) for i, n in enumerate(size))
    sources = rows[:, None, :, None] * size[1] + columns[None, :, None, :]
    weights = of_rows[:, None, :, None] * of_columns[None, :, None, :]
    made = len(rows), len(columns)
    count = made[0] * made[1]
    known = state.native[x]
    out = Value("image", known.value.channels)
    moved = Moved(
        known.value, sources.reshape(count, -1), torch.arange(count),
        weights.reshape(count, -1), 0, 1, out.channels,
    )  # fmt: skip
    return state.add(known.piece, node, Move(out, [moved], made))


def _taps(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Which inputs `[outputs, taps]` each output has, and their weights, of `[inputs, outputs]`."""
    most = int((matrix != 0).sum(0).max())
    order = (matrix != 0).int().argsort(dim=0, descending=True, stable=True)[:most].t()
    return order, matrix.t().gather(1, order)


@rule(_aten.group_norm.default)
def _group_norm(state: Lowering, node: Node) -> bool:
    x, groups, weight, bias, epsilon = filled(node, (None, None, None, None, 1e-5))[:5]
    return _by_groups(state, node, x, groups, weight, bias, epsilon)


@rule(_aten.instance_norm.default)
def _instance_norm(state: Lowering, node: Node) -> bool:
    x, weight, bias, _, _, own, _, epsilon, *_ = node.args
    channels = (shape_of(x) or (0, 0))[1]
    return bool(own) and _by_groups(state, node, x, channels, weight, bias, epsilon)


def _by_groups(
    state: Lowering, node: Node, x: Any, groups: int, weight: Any, bias: Any, epsilon: Any
) -> bool:
    gamma, beta = state.constant(weight), state.constant(bias)
    if (weight is None) != (gamma is None) or (bias is None) != (beta is None):
        return False
    if _image(state, x) is None:
        return False
    known = state.native[x]
    out = Value("image", known.value.channels)
    return state.add(known.piece, node, GroupNorm(out, known.value, groups, gamma, beta, epsilon))
