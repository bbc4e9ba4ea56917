"""What models do to scores of attention before they meet v: scale, mask, softmax, change axes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from sparseworks.engine.making import Lowering
from sparseworks.engine.nodes import filled
from sparseworks.engine.pieces import Scores
from sparseworks.engine.rules.terms import LOWEST, fits
from sparseworks.engine.rules.views import VIEWS

__all__ = ["SCORES"]

_aten = torch.ops.aten
_NEVER = -1e4  # and below: scores that no query looks at

Change = Callable[[Lowering, Node, Scores], Scores | None]
SCORES: dict[Any, Change] = {}


def _changing(*targets: Any) -> Callable[[Change], Change]:
    def add(change: Change) -> Change:
        SCORES.update(dict.fromkeys(targets, change))
        return change

    return add


@_changing(*VIEWS)
def _seen(state: Lowering, node: Node, scores: Scores) -> Scores | None:
    view = VIEWS[node.target](scores.view, node)
    return None if view is None else replace(scores, view=view)


@_changing(_aten.contiguous.default, _aten.clone.default, _aten.detach.default,
           _aten.alias.default, _aten.to.dtype, _aten._to_copy.default, _aten.type_as.default,
           _aten.to.dtype_layout, _aten.to.device)  # fmt: skip
def _same(state: Lowering, node: Node, scores: Scores) -> Scores | None:
    return scores if node.meta["val"].dtype == torch.float32 else None


@_changing(_aten.dropout.default, _aten.dropout_.default, _aten.native_dropout.default)
def _dropped(state: Lowering, node: Node, scores: Scores) -> Scores | None:
    return None if filled(node, ())[2] else scores


@_changing(_aten.mul.Tensor, _aten.mul_.Tensor, _aten.mul.Scalar)
def _multiplied(state: Lowering, node: Node, scores: Scores) -> Scores | None:
    x, y = node.args[:2]
    return _times(scores, state.number(y if x in state.scores else x))


@_changing(_aten.div.Tensor, _aten.div_.Tensor, _aten.div.Scalar)
def _divided(state: Lowering, node: Node, scores: Scores) -> Scores | None:
    number = state.number(node.args[1])
    return _times(scores, 1 / number) if number and not node.kwargs else None


def _times(scores: Scores, number: float | None) -> Scores | None:
    if number is None or scores.keys:
        return None
    terms = tuple((node, view, number * factor) for node, view, factor in scores.terms)
    return replace(scores, factor=number * scores.factor, terms=terms)


@_changing(_aten.add.Tensor, _aten.add_.Tensor, _aten.sub.Tensor)
def _added(state: Lowering, node: Node, scores: Scores) -> Scores | None:
    x, y = node.args[:2]
    sign = -1.0 if node.target is _aten.sub.Tensor else 1.0
    term = y if x in state.scores else x
    if (sign < 0 and term is x) or node.kwargs.get("alpha", 1) != 1:
        return None
    return _with(scores, term, sign)


def _with(scores: Scores, term: Any, factor: float = 1.0) -> Scores | None:
    if scores.keys or not fits(term, scores.view) or term.meta["val"].dtype == torch.bool:
        return None
    return replace(scores, terms=(*scores.terms, (term, scores.view, factor)))


@_changing(_aten.masked_fill.Scalar, _aten.masked_fill_.Scalar, _aten.masked_fill.Tensor)
def _filled(state: Lowering, node: Node, scores: Scores) -> Scores | None:
    _, mask, value = node.args
    return _masked(state, scores, mask, state.number(value), hidden=True)


@_changing(_aten.where.self, _aten.where.ScalarOther, _aten.where.ScalarSelf)
def _chosen(state: Lowering, node: Node, scores: Scores) -> Scores | None:
    mask, x, y = node.args
    hidden = y in state.scores
    return _masked(state, scores, mask, state.number(x if hidden else y), hidden=hidden)


def _masked(
    state: Lowering, scores: Scores, mask: Any, value: float | None, *, hidden: bool
) -> Scores | None:
    """Scores that a number stands for where the mask says so, or does not: it is added instead.

    A number like -1e9 takes away whatever it is added to; a query that sees no key sees all alike.
    """
    if value is None or not value <= _NEVER or mask in state.scores or not fits(mask, scores.view):
        return None
    numbers = (LOWEST, 0.0) if hidden else (0.0, LOWEST)
    return _with(scores, state.insert(_aten.where.Scalar, mask, *numbers))


@_changing(_aten.softmax.int, _aten._softmax.default)
def _softmax(state: Lowering, node: Node, scores: Scores) -> Scores | None:
    axis: Any = node.args[1]
    runs = scores.view.dims[axis % len(scores.view.dims)]
    known = len(runs) == 1 and runs[0].axis in "ij" and node.meta["val"].dtype == torch.float32
    return replace(scores, keys=runs[0].axis) if known and not scores.keys else None
