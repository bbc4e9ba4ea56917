"""Attention where it is one operator; `attend` also serves what is spelt out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from sparseworks.engine.ir import Attention, Heads, Value
from sparseworks.engine.making import Lowering, rule
from sparseworks.engine.nodes import filled
from sparseworks.engine.pieces import Native
from sparseworks.engine.rules.dims import one_run, renamed, size_of
from sparseworks.engine.rules.terms import repeats, summed
from sparseworks.engine.views import Run, View

__all__ = ["attend"]

_aten = torch.ops.aten
_SDPA = _aten.scaled_dot_product_attention.default


@rule(_SDPA)
def _attention(state: Lowering, node: Node) -> bool:
    q, k, v, mask, dropout, causal = filled(node, (None, None, None, None, 0.0, False))
    known = [state.native[n] for n in (q, k, v) if n in state.native]
    heads = [h for n in known if (h := _heads(state, n)) is not None]
    if len(heads) < 3 or dropout or len({n.piece for n in known}) != 1 or known[2].factor != 1:
        return False
    one, two, three = heads
    seen = {n.view.sizes()[1] for n in known if n.view is not None}
    if len(seen) != 1 and not node.kwargs.get("enable_gqa"):
        return False
    scale = float(node.kwargs.get("scale") or one.size**-0.5)  # type: ignore[arg-type]
    scale *= known[0].factor * known[1].factor
    b, s, _ = state.bases[one.value].dims
    view = View((b, one_run("h", one.heads), renamed(s, "i"), renamed(s, "j")))
    terms = [] if mask is None else [(mask, view, 1.0)]
    out = View((b, one_run("c", one.heads, one.size), s, one_run("c", one.size)))
    return attend(state, node, (one, two, three), scale, terms, out, causal=bool(causal))


def attend(
    state: Lowering, node: Node, heads: Sequence[Heads], scale: float,
    terms: Sequence[tuple[Node, View, float]], view: View, *, causal: bool = False,
) -> bool:  # fmt: skip
    """The node is attention, seen as `view`; what is added to its scores stays with torch."""
    q, k, v = heads
    piece = state.pieces_of[q.value]
    if k.heads != v.heads or q.heads % k.heads or len({h.size for h in heads}) != 1:
        return False
    if any(state.levels.get(t, 0) > piece.level or t in state.native for t, _, _ in terms):
        return False
    if any(repeats(t, seen) for t, seen, _ in terms):
        return False
    mask, bias = summed(state, terms, q.heads)
    if node.name in state.plain:
        return False
    for term in (mask, bias):
        if term is not None:
            piece.masks[term.name] = term
    if bias is not None:
        piece.biases.add(bias.name)
    read, more = (None if t is None else t.name for t in (mask, bias))
    out = Value("tokens", q.heads * q.size)
    return state.add(piece, node, Attention(out, q, k, v, scale, causal, read, more), view)


def _heads(state: Lowering, known: Native) -> Heads | None:
    """A view [entries, heads, tokens, channels of a head] as heads that lie side by side."""
    view, base = known.view, state.bases.get(known.value)
    if view is None or base is None or len(view.dims) != 4 or len(base.dims) != 3:
        return None
    entries, heads, tokens, channels = view.dims
    size = size_of(channels)
    if heads and heads[-1].step == 0:  # the same head for several queries
        heads = heads[:-1]
    count = size_of(heads)
    if not (size.is_Integer and count.is_Integer):
        return None
    plain = channels in ((), (Run("c", size),))
    beside = heads in ((), (Run("c", count, int(size)),))
    if (entries, tokens) != base.dims[:2] or not plain or not beside:
        return None
    return Heads(known.value, int(count), int(size), view.first)
