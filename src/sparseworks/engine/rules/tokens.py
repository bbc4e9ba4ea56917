"""Linear layers, layer norm, views of heads, attention."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from sparseworks.engine.ir import Attention, Heads, Norm, Product, Value
from sparseworks.engine.pieces import Lowering, Native, filled, kind_of, rule, shape_of

_aten = torch.ops.aten


@rule(_aten.linear.default)
def _linear(state: Lowering, node: Node) -> bool:
    x, weight, bias = filled(node, (None, None, None))
    w = state.constant(weight)
    kind = kind_of(x, state)
    if w is None or kind is None or (bias is not None and state.constant(bias) is None):
        return False
    if kind == "image" and len(shape_of(x) or ()) != 2:
        return False
    found = state.inputs(kind, x)
    if found is None:
        return False
    piece, (value,) = found
    op = Product(Value(kind, w.shape[0]), value, w, state.constant(bias), weight.name)
    return state.add(piece, node, op)


@rule(_aten.layer_norm.default)
def _layer_norm(state: Lowering, node: Node) -> bool:
    x, shape, weight, bias, epsilon = filled(node, (None, None, None, None, 1e-5))[:5]
    if len(shape) != 1 or any(n is not None and state.constant(n) is None for n in (weight, bias)):
        return False
    found = state.inputs("tokens", x)
    if found is None or len(shape_of(x) or ()) != 3:
        return False
    piece, (value,) = found
    gamma, beta = state.constant(weight), state.constant(bias)
    return state.add(
        piece, node, Norm(Value("tokens", value.channels), value, gamma, beta, epsilon)
    )


# views of heads


@rule(_aten.view.default, _aten.reshape.default, _aten.unflatten.int, _aten.flatten.using_ints,
       _aten._unsafe_view.default, _aten.squeeze.dims)  # fmt: skip
def _view(state: Lowering, node: Node) -> bool:
    (x, *_) = filled(node, ())
    known = state.native.get(x)
    before, after = shape_of(x) or (), shape_of(node) or ()
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


@rule(_aten.transpose.int)
def _transpose(state: Lowering, node: Node) -> bool:
    axes = list(range(4))
    a, b = (axis % 4 for axis in filled(node, ())[1:])
    axes[a], axes[b] = b, a
    return _permuted(state, node, axes)


@rule(_aten.permute.default)
def _permute(state: Lowering, node: Node) -> bool:
    _, order = filled(node, ())
    return len(order) == 4 and _permuted(state, node, [a % 4 for a in order])


def _permuted(state: Lowering, node: Node, axes: list[int]) -> bool:
    known = state.native.get(filled(node, ())[0])
    if known is None or known.heads is None:
        return False
    order = tuple(known.heads.order[a] for a in axes)
    state.native[node] = replace(known, heads=replace(known.heads, order=order))
    return True


_SDPA = _aten.scaled_dot_product_attention.default


@rule(_SDPA)
def _attention(state: Lowering, node: Node) -> bool:
    q, k, v, mask, dropout, causal = filled(node, (None, None, None, None, 0.0, False))
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
        if (
            mask in state.native
            or state.levels.get(mask, 0) > piece.level
            or len(shape) != 4
            or shape[1] != 1
        ):
            return False
        name = mask.name
        piece.masks[name] = mask
    scale = float(node.kwargs.get("scale") or heads[0].size ** -0.5)  # type: ignore[arg-type]
    out = Value("tokens", heads[0].heads * heads[0].size)
    op = Attention(out, heads[0], heads[1], heads[2], scale, bool(causal), name)
    state.add(piece, node, op)
    state.native[node] = Native(
        piece, out, Heads(out, heads[0].heads, heads[0].size, 0, ("b", "h", "s", "d"))
    )
    return True
