"""What changes the axes of a value and nothing else, and parts of its channels."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import sympy
import torch
from torch.fx import Node

from sparseworks.engine.ir import Gather, Product, Value
from sparseworks.engine.making import Lowering, rule
from sparseworks.engine.nodes import filled, shape_of
from sparseworks.engine.pieces import Native
from sparseworks.engine.views import Run, View, base_view

__all__ = ["VIEWS", "joined", "seen", "take"]

_aten = torch.ops.aten
_ORDERS = (_aten.permute.default, _aten.transpose.int)
_SPLITS = (_aten.split.Tensor, _aten.split_with_sizes.default, _aten.chunk.default)

Dim = tuple[Run, ...]
Viewed = Callable[[View, Node], View | None]
VIEWS: dict[Any, Viewed] = {}  # what a node sees of its first argument


def _viewing(*targets: Any) -> Callable[[Viewed], Viewed]:
    def add(function: Viewed) -> Viewed:
        VIEWS.update(dict.fromkeys(targets, function))
        return function

    return add


@_viewing(_aten.view.default, _aten.reshape.default, _aten.unflatten.int,
          _aten.flatten.using_ints, _aten._unsafe_view.default)  # fmt: skip
def _regrouped(view: View, node: Node) -> View | None:
    return view.regrouped(shape_of(node) or ())


@_viewing(_aten.transpose.int, _aten.swapaxes.default, _aten.swapdims.default)
def _transposed(view: View, node: Node) -> View:
    _, one, two = filled(node, ())
    axes = list(range(len(view.dims)))
    axes[one], axes[two] = axes[two], axes[one]
    return view.permuted(axes)


@_viewing(_aten.t.default, _aten.mT.default)
def _turned(view: View, node: Node) -> View:
    axes = list(range(len(view.dims)))
    return view.permuted([*axes[:-2], axes[-1], axes[-2]])


@_viewing(_aten.permute.default)
def _permuted(view: View, node: Node) -> View:
    return view.permuted(filled(node, ())[1])


@_viewing(_aten.movedim.int, _aten.movedim.intlist)
def _moved(view: View, node: Node) -> View:
    _, source, target = filled(node, ())
    rank = len(view.dims)
    both = [[a % rank for a in ([n] if isinstance(n, int) else n)] for n in (source, target)]
    order = [a for a in range(rank) if a not in both[0]]
    for to, origin in sorted(zip(both[1], both[0], strict=True)):
        order.insert(to, origin)
    return view.permuted(order)


@_viewing(_aten.unsqueeze.default)
def _unsqueezed(view: View, node: Node) -> View:
    return view.unsqueezed(filled(node, ())[1])


@_viewing(_aten.squeeze.dim, _aten.squeeze.dims)
def _squeezed(view: View, node: Node) -> View | None:
    axes = filled(node, ())[1]
    rank, found = len(view.dims), view
    for axis in sorted(a % rank for a in ([axes] if isinstance(axes, int) else axes))[::-1]:
        if view.dims[axis] == ():
            found = found.squeezed(axis) or found
    return found if len(found.dims) == len(shape_of(node) or ()) else None


@_viewing(_aten.select.int)
def _selected(view: View, node: Node) -> View | None:
    _, axis, index = filled(node, ())
    return view.selected(axis, index) if isinstance(index, int) else None


@_viewing(_aten.expand.default)
def _expanded(view: View, node: Node) -> View | None:
    """Axes of size 1 several times: runs that stay where they are."""
    sizes = shape_of(node) or ()
    dims = []
    for dim, size in zip(view.dims, sizes[len(sizes) - len(view.dims) :], strict=True):
        if dim or size == 1:
            dims.append(dim)
        elif isinstance(size, int):
            dims.append((Run("c", sympy.Integer(size), 0),))
        else:
            return None
    return View(tuple(dims), view.first) if len(sizes) == len(dims) else None


@_viewing(_aten.repeat_interleave.self_int)
def _repeated(view: View, node: Node) -> View | None:
    _, count, axis, *_ = filled(node, (None, None, None))
    if axis is None or not isinstance(count, int):
        return None
    at = axis % len(view.dims)
    longer = (*view.dims[at], Run("c", sympy.Integer(count), 0))
    return View((*view.dims[:at], longer, *view.dims[at + 1 :]), view.first)


def _as_image(state: Lowering, node: Node, known: Native) -> bool:
    """Channels come last, or back to where they are; a single pixel becomes a vector."""
    before, after = shape_of(node.args[0]) or (), shape_of(node) or ()
    if known.view is None and VIEWS[node.target] is _regrouped:
        vector = len(before) == 4 and len(after) == 2 and tuple(before[2:]) == (1, 1)
        if vector or tuple(map(str, before)) == tuple(map(str, after)):
            return state.same(node, node.args[0])
    base = state.bases.get(known.value)
    if base is None or len(before) != 4:
        return False
    view = VIEWS[node.target](known.view or base, node)
    kept = view is not None and len(view.dims) == 4
    return kept and state.see(node, known, view if view == base or view == _last(base) else None)


def _last(base: View) -> View:
    return base.permuted((0, 2, 3, 1))


def seen(state: Lowering, node: Any) -> tuple[Native, View] | None:
    """A node of tokens as a view."""
    known = state.native.get(node)
    if known is None or known.piece.kind != "tokens":
        return None
    return known, known.view or state.bases[known.value]


@rule(*VIEWS, last=True)
def _view(state: Lowering, node: Node) -> bool:
    x: Any = node.args[0]
    found = seen(state, x)
    if found is not None:
        return state.see(node, found[0], VIEWS[node.target](found[1], node))
    if x not in state.native:
        return node.target in _ORDERS and _turned_input(state, node, x)
    return _as_image(state, node, state.native[x])


def _turned_input(state: Lowering, node: Node, x: Any) -> bool:
    """What is [tokens, entries, channels] from here on."""
    shape = shape_of(x) or ()
    axes = _axes(node, len(shape))
    linear = any(user.target is _aten.linear.default for user in node.users)
    if axes != [1, 0, 2] or not linear or x.name in state.plain:
        return False
    loaded = state.inputs("tokens", x)
    if loaded is None:
        return False
    piece, (value,) = loaded
    return state.see(node, Native(piece, value), base_view(shape).permuted(axes))


def _axes(node: Node, rank: int) -> list[int]:
    """The order in which a permutation puts the axes."""
    view = View(tuple((Run(str(i), sympy.Integer(2)),) for i in range(rank)))
    found = VIEWS[node.target](view, node)
    return [] if found is None else [int(dim[0].axis) for dim in found.dims]


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
    found, taken = seen(state, x), False
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
    found = seen(state, x)
    if found is not None:
        return state.see(node, found[0], found[1].narrowed(axis, first, count))
    known = state.native.get(x)
    if known is None or len(shape_of(x) or ()) != 4 or axis % 4 != 1:
        return False
    op = Gather(Value("image", count), [(known.value, first, count)])
    return state.add(known.piece, node, op)


def joined(state: Lowering, node: Node, parts: Sequence[Any], axis: int) -> bool:
    """Channels of what is seen of values, one after the other along an axis."""
    known = [state.native.get(n) for n in parts]
    if any(k is None or k.piece is not known[0].piece for k in known):  # type: ignore[union-attr]
        return False
    found = [k for k in known if k is not None]
    views = [k.view or state.bases[k.value] for k in found]
    at, piece = axis % len(views[0].dims), found[0].piece
    others = {tuple(d for d in _without_channels(v)) for v in views}
    if len(others) != 1 or any(r.axis != "c" for v in views for r in v.dims[at]):
        return False
    if node.name in state.plain:
        return False
    values = list(dict.fromkeys(k.value for k in found))
    firsts = dict(zip(values, accumulate((v.channels for v in values), initial=0), strict=False))
    wide = torch.broadcast_shapes(  # type: ignore[no-untyped-call]
        *(_but(v.channels().shape, at) for v in views)
    )
    places = []
    for k, view in zip(found, views, strict=True):
        own = view.channels() + firsts[k.value]
        own = own.expand(*wide[:at], own.shape[at], *wide[at + 1 :])
        places.append(torch.stack([own.double(), torch.full(own.shape, k.factor).double()]))
    index, factor = torch.cat(places, at + 1)
    total = sum(v.channels for v in values)
    source = values[0]
    if len(values) > 1:
        source = Value(source.kind, total)
        state.hidden(piece, Gather(source, [(v, 0, v.channels) for v in values]))
    count = index.numel()
    weight = torch.zeros(count, total)
    weight[torch.arange(count), index.flatten().long()] = factor.flatten().float()
    dims, step = [], count
    for dim, size in zip(views[0].dims, index.shape, strict=True):
        step //= size
        own_run = (Run("c", sympy.Integer(size), step),) if size > 1 else ()
        dims.append((*(r for r in dim if r.axis != "c"), *own_run))
    product = Product(Value(source.kind, count), source, weight, None, "")
    return state.add(piece, node, product, View(tuple(dims)))


def _without_channels(view: View) -> list[Dim]:
    return [tuple(r for r in dim if r.axis != "c") for dim in view.dims]


def _but(shape: Sequence[int], axis: int) -> list[int]:
    return [1 if a == axis else n for a, n in enumerate(shape)]
