"""Linear layers, layer norm, attention."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Node

from sparseworks.engine.ir import Attention, Heads, Norm, Product, Value
from sparseworks.engine.pieces import Lowering, Native, filled, kind_of, rule, shape_of
from sparseworks.engine.views import Run, View

_aten = torch.ops.aten


@rule(_aten.linear.default)
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


_SDPA = _aten.scaled_dot_product_attention.default


@rule(_SDPA)
def _attention(state: Lowering, node: Node) -> bool:
    q, k, v, mask, dropout, causal = filled(node, (None, None, None, None, 0.0, False))
    known = [state.native.get(n) for n in (q, k, v)]
    heads = [_heads(state, n) for n in known if n is not None]
    if len(heads) < 3 or None in heads or dropout or len({n.piece for n in known}) != 1:  # type: ignore[union-attr]
        return False
    one, two, three = (h for h in heads if h is not None)
    piece = known[0].piece  # type: ignore[union-attr]
    if two.heads != three.heads or len({h.size for h in (one, two, three)}) != 1:
        return False
    if one.heads != two.heads and not node.kwargs.get("enable_gqa"):
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
    scale = float(node.kwargs.get("scale") or one.size**-0.5)  # type: ignore[arg-type]
    channels = one.heads * one.size
    op = Attention(Value("tokens", channels), one, two, three, scale, bool(causal), name)
    b, s, c = state.bases[one.value].of(channels).dims
    parted = View((b, s, c)).regrouped([*(_size(d) for d in (b, s)), one.heads, one.size])
    assert parted is not None
    return state.add(piece, node, op, parted.permuted((0, 2, 1, 3)))


def _size(dim: tuple[Run, ...]) -> Any:
    return dim[0].size if dim else sympy.Integer(1)


def _heads(state: Lowering, known: Native) -> Heads | None:
    """A view [entries, heads, tokens, channels of a head] as heads that lie side by side."""
    view, base = known.view, state.bases.get(known.value)
    if view is None or base is None or len(view.dims) != 4 or len(base.dims) != 3:
        return None
    entries, heads, tokens, channels = view.dims
    size, count = _size(channels), _size(heads)
    if not (size.is_Integer and count.is_Integer):
        return None
    plain = channels in ((), (Run("c", size),))
    beside = heads in ((), (Run("c", count, int(size)),))
    if (entries, tokens) != base.dims[:2] or not plain or not beside:
        return None
    return Heads(known.value, int(count), int(size), view.first)
