"""Convolutions along one axis, and what lies between them, as those of images of one row.

`[batch, channels, length]` becomes `[batch, channels, 1, length]`: what the kernels know of images
serves signals then. The nodes of the graph stay, each a view of the image that takes its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from sparseworks.engine.nodes import filled, same_sizes, shape_of
from sparseworks.engine.views import expression

__all__ = ["widened"]

_aten = torch.ops.aten
_ROW = 2  # the axis that is put in
_LARGEST = 16  # padding: an image has as many empty rows
_ALIKE = {
    _aten.relu.default, _aten.gelu.default, _aten.silu.default, _aten.mish.default,
    _aten.elu.default, _aten.leaky_relu.default, _aten.hardswish.default, _aten.hardtanh.default,
    _aten.hardsigmoid.default, _aten.relu6.default, _aten.sigmoid.default, _aten.tanh.default,
    _aten.dropout.default, _aten.batch_norm.default, _aten.group_norm.default,
    _aten.instance_norm.default,
}  # fmt: skip
_OF_TWO = (_aten.add.Tensor, _aten.mul.Tensor)
_FLAT = (_aten.flatten.using_ints, _aten.view.default, _aten.reshape.default)
_TURNS = (_aten.transpose.int, _aten.permute.default)

Make = Callable[["_Rows", Node], Node | None]
_MAKES: dict[Any, Make] = {}


def widened(graph: torch.fx.Graph) -> None:
    """Let convolutions along one axis, and what reads and makes signals between them, be of images.

    Args:
        graph: of operators, with example values in `node.meta["val"]`.
    """
    if not any(_MAKES.get(node.target) is _convolution for node in graph.nodes):
        return
    rows = _Rows(graph)
    for node in list(graph.nodes):
        make = _MAKES.get(node.target)
        image = None if make is None else make(rows, node)
        if image is not None:
            rows.stands_for(image, node)
    graph.eliminate_dead_code()


class _Rows:
    """Images of one row by the nodes that are seen as signals."""

    def __init__(self, graph: torch.fx.Graph) -> None:
        self.graph = graph
        self.images: dict[Node, Node] = {}
        self.turned: dict[Node, Node] = {}  # signals whose channels come last, by those images

    def image(self, x: Node, before: Node) -> Node:
        """The image of a signal."""
        if x not in self.images:
            self.images[x] = self.view(before, _aten.unsqueeze.default, x, _ROW)
        return self.images[x]

    def call(self, before: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
        """An operator in front of the node that it is for, which tells the size of its image."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs)
        value = before.meta["val"]
        with value.fake_mode:  # convolutions would note conditions on sizes there
            for _ in range(4 - value.ndim):
                value = value.unsqueeze(_ROW)
        node.meta["val"] = value
        return node

    def view(self, before: Node, target: Any, x: Node, *args: Any) -> Node:
        """A view of a node, in front of another one."""
        node = self.call(before, target, x, *args)
        with before.meta["val"].fake_mode:
            node.meta["val"] = target(x.meta["val"], *args)
        return node

    def stands_for(self, image: Node, node: Node) -> None:
        """A node becomes what is seen of an image."""
        vector = len(shape_of(node) or ()) == 2
        node.target = _aten.flatten.using_ints if vector else _aten.squeeze.dim
        node.args, node.kwargs = (image, 1 if vector else _ROW), {}
        if not vector:
            self.images[node] = image


def _making(*targets: Any) -> Callable[[Make], Make]:
    def add(make: Make) -> Make:
        _MAKES.update(dict.fromkeys(targets, make))
        return make

    return add


@_making(_aten.conv1d.default, _aten.conv1d.padding)
def _convolution(rows: _Rows, node: Node) -> Node | None:
    x, weight, bias, stride, padding, dilation, groups = filled(
        node, (None, None, None, [1], [0], [1], 1)
    )
    if padding in ("same", "valid"):
        reach = dilation[0] * (weight.meta["val"].shape[2] - 1) if padding == "same" else 0
        padding = [reach / 2]
    if len(shape_of(x) or ()) != 3 or padding[0] > _LARGEST or padding[0] % 1:
        return None
    kernel = rows.view(node, _aten.unsqueeze.default, weight, _ROW)
    return rows.call(
        node, _aten.conv2d.default, rows.image(x, node), kernel, bias, [stride[0]] * 2,
        [0, int(padding[0])], [dilation[0]] * 2, groups,
    )  # fmt: skip


@_making(*_ALIKE)
def _alike(rows: _Rows, node: Node) -> Node | None:
    image = rows.images.get(node.args[0])  # type: ignore[arg-type]
    if image is None:
        return None
    return rows.call(node, node.target, image, *node.args[1:], **node.kwargs)


@_making(*_OF_TWO)
def _of_two(rows: _Rows, node: Node) -> Node | None:
    both = [n for n in node.args if isinstance(n, Node)]
    known = any(n in rows.images for n in both)
    shape = shape_of(node) or ()
    if not known or not all(same_sizes(shape_of(n) or (), shape) for n in both):
        return None
    args = [rows.image(n, node) if isinstance(n, Node) else n for n in node.args]
    return rows.call(node, node.target, *args, **node.kwargs)


@_making(_aten.cat.default)
def _joined(rows: _Rows, node: Node) -> Node | None:
    parts, axis = filled(node, (None, 0))
    if axis % 3 != 1 or not all(n in rows.images for n in parts):
        return None
    return rows.call(node, _aten.cat.default, [rows.images[n] for n in parts], 1)


@_making(_aten.max_pool1d.default)
def _largest(rows: _Rows, node: Node) -> Node | None:
    x, window, stride, padding, dilation, ceil = filled(node, (None, None, [], [0], [1], False))
    if x not in rows.images or dilation != [1]:
        return None
    stride, padding = [1, *(stride or window)], [0, *padding]
    return rows.call(
        node, _aten.max_pool2d.default, rows.images[x], [1, *window], stride, padding, [1, 1], ceil
    )


@_making(_aten.avg_pool1d.default)
def _average(rows: _Rows, node: Node) -> Node | None:
    x, window, stride, padding, ceil, count = filled(node, (None, None, [], [0], False, True))
    if x not in rows.images:
        return None
    stride, padding = [1, *(stride or window)], [0, *padding]
    return rows.call(
        node, _aten.avg_pool2d.default, rows.images[x], [1, *window], stride, padding, ceil, count
    )


@_making(_aten.adaptive_avg_pool1d.default)
def _mean_of_all(rows: _Rows, node: Node) -> Node | None:
    x, size = filled(node, ())
    if x not in rows.images or list(size) != [1]:
        return None
    return rows.call(node, _aten.adaptive_avg_pool2d.default, rows.images[x], [1, 1])


@_making(_aten.mean.dim)
def _mean(rows: _Rows, node: Node) -> Node | None:
    x, axes, keep = filled(node, (None, None, False))
    if x not in rows.images or [a % 3 for a in axes] != [2] or node.kwargs:
        return None
    return rows.call(node, _aten.mean.dim, rows.images[x], [2, 3], keep or False)


@_making(*_FLAT)
def _flattened(rows: _Rows, node: Node) -> Node | None:
    """A vector of each signal: of all its channels and positions, in the same order."""
    image = rows.images.get(node.args[0])  # type: ignore[arg-type]
    after, before = shape_of(node) or (), shape_of(node.args[0]) or ()
    vector = len(after) == 2 and expression(after[0]) == expression(before[0])
    return image if vector else None


@_making(_aten.squeeze.dim)
def _squeezed(rows: _Rows, node: Node) -> Node | None:
    """The one position of each signal."""
    image = rows.images.get(node.args[0])  # type: ignore[arg-type]
    one = image is not None and node.args[1] in (2, -1) and len(shape_of(node) or ()) == 2
    return image if one else None


@_making(*_TURNS)
def _turned(rows: _Rows, node: Node) -> Node | None:
    """Channels last: for a norm over them, and back."""
    x: Any = node.args[0]
    permuted = node.target is _aten.permute.default
    axes: Any = node.args[1] if permuted else node.args[1:]
    swaps = [a % 3 for a in axes] in ([[0, 2, 1]] if permuted else [[1, 2], [2, 1]])
    if not swaps or len(shape_of(x) or ()) != 3:
        return None
    if x in rows.images:
        rows.turned[node] = rows.images[x]
        return None
    last = rows.turned.get(x)
    if last is None or x.target is not _aten.layer_norm.default:
        return None
    return rows.view(node, _aten.permute.default, last, [0, 3, 1, 2])


@_making(_aten.layer_norm.default)
def _norm(rows: _Rows, node: Node) -> Node | None:
    """Of channels that come last and go back again."""
    x, shape, *rest = node.args
    image = rows.turned.get(x)  # type: ignore[arg-type]
    if image is None or len(shape) != 1 or any(u.target not in _TURNS for u in node.users):  # type: ignore[arg-type]
        return None
    last = rows.view(node, _aten.permute.default, image, [0, 2, 3, 1])
    normed = rows.call(node, _aten.layer_norm.default, last, shape, *rest)
    normed.meta["val"] = last.meta["val"]
    rows.turned[node] = normed
    return None
