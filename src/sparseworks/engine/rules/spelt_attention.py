"""Attention that is spelt out in products, sums and a softmax in whatever order.

Scores = q k^T are followed through what models do to them (`Scores`) until a softmax of them meets
v; they are never stored. Which operand of the first product is q shows at the softmax: keys are
what it is over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch.fx import Node

from sparseworks.engine.ir import Heads
from sparseworks.engine.making import Lowering, rule
from sparseworks.engine.pieces import Native, Scores
from sparseworks.engine.rules.attention import attend
from sparseworks.engine.rules.dims import Dim, one_run, renamed, size_of
from sparseworks.engine.views import Run, View, merged

__all__ = ["contracted"]

_aten = torch.ops.aten

Letters = tuple[str, str, str]  # of two operands and their product


def contracted(state: Lowering, node: Node, x: Any, y: Any, letters: Letters | None = None) -> bool:
    """Scores, or what their softmax makes of v; of a matrix product where no letters are given."""
    if not all(isinstance(n, Node) and (n in state.native or n in state.scores) for n in (x, y)):
        return False
    found = [_dims(state, n) for n in (x, y)]
    if None in found:
        return False
    if letters is None:
        letters = _of_matrices(len(found[0]), len(found[1]))  # type: ignore[arg-type]
    if any(len(set(term)) != len(term) for term in letters):
        return False
    dims = [dict(zip(term, f, strict=True)) for term, f in zip(letters, found, strict=False)]  # type: ignore[arg-type]
    if x in state.scores and y in state.native:
        return _weighted(state, node, state.scores[x], state.native[y], dims, letters[2])
    if y in state.scores and x in state.native:
        return _weighted(state, node, state.scores[y], state.native[x], dims[::-1], letters[2])
    if x in state.native and y in state.native:
        return _scored(state, node, (state.native[x], state.native[y]), dims, letters[2])
    return False


def _dims(state: Lowering, node: Node) -> tuple[Dim, ...] | None:
    if node in state.scores:
        return state.scores[node].view.dims
    known = state.native[node]
    if known.piece.kind != "tokens" or len(state.bases[known.value].dims) != 3:
        return None
    return (known.view or state.bases[known.value]).dims


def _of_matrices(one: int, two: int) -> Letters:
    """Of `matmul`: the axes before the last two are the same ones, counted from behind."""
    rank = max(one, two)
    shared = "".join(chr(ord("A") + i) for i in range(rank - 2))
    return shared[rank - one :] + "xy", shared[rank - two :] + "yz", shared + "xz"


def _scored(
    state: Lowering, node: Node, pair: tuple[Native, Native], dims: Sequence[Mapping[str, Dim]],
    out: str,
) -> bool:  # fmt: skip
    """x y^T, head by head."""
    one, two = dims
    gone = [c for c in one if c in two and c not in out]
    if pair[0].piece is not pair[1].piece or len(gone) != 1 or set(out) != {*one, *two} - {*gone}:
        return False
    size = int(size_of(one[gone[0]])) if size_of(one[gone[0]]).is_Integer else 0
    if not size or any(d[gone[0]] != one_run("c", size) for d in dims):
        return False
    base = state.bases[pair[0].value].dims
    runs: list[tuple[int, int, int]] = []
    made: list[list[Any]] = []
    entries = positions = 0
    for letter in out:
        (first, a), (other, b) = (_parted(d.get(letter, ())) for d in dims)
        axes = {run.axis for run in (*a, *b)}
        if first != other:
            return False
        entries += len(first)
        if not first and (a, b) in ((base[1], ()), ((), base[1])):
            positions |= 1 if a else 2
            made.append(list(renamed(a or b, "i" if a else "j")))
        elif axes <= {"c"}:
            parts = _aligned(a, b)
            if parts is None:
                return False
            made.append([*first, *parts])
            runs += parts
        else:
            return False
    if positions != 3 or entries != len(base[0]):
        return False
    runs.sort(key=lambda r: -max(r[1], r[2]))
    steps = dict(zip(runs, _steps([r[0] for r in runs]), strict=True))
    if len(steps) != len(runs):
        return False
    view = View(tuple(
        tuple(r if isinstance(r, Run) else Run("h", sympy.Integer(r[0]), steps[r]) for r in parts)
        for parts in made
    ))  # fmt: skip
    factor = pair[0].factor * pair[1].factor
    return _kept(state, node, Scores(*pair, view, tuple(runs), size, factor))


def _parted(dim: Dim) -> tuple[Dim, Dim]:
    """The run through entries that comes first, and what follows."""
    first = dim[:1] if dim and dim[0].axis == "b" else ()
    return first, dim[len(first) :]


def _aligned(a: Dim, b: Dim) -> list[tuple[int, int, int]] | None:
    """Runs of heads cut alike: sizes, and the steps in both; 0 where there is but one head."""
    if not a or not b:
        return [(int(r.size), r.step, 0) if a else (int(r.size), 0, r.step) for r in a or b]
    found = []
    left, right = ([[int(r.size), r.step] for r in dim] for dim in (a, b))
    while left or right:
        if not (left and right):
            return None
        size = min(left[0][0], right[0][0])
        steps = []
        for side in (left, right):
            whole, step = side[0]
            if whole % size:
                return None
            steps.append(step * (whole // size))
            side[0][0] = whole // size
            if whole == size:
                side.pop(0)
        found.append((size, *steps))
    return found  # type: ignore[return-value]


def _steps(sizes: Sequence[int]) -> list[int]:
    """Of heads that are counted through, the slowest first."""
    return [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]


def _kept(state: Lowering, node: Node, scores: Scores) -> bool:
    """The node is scores: torch makes it where anything but attention reads it."""
    state.scores[node] = scores
    state.levels[node] = state.level_of(node)
    return True


def _weighted(
    state: Lowering, node: Node, scores: Scores, v: Native, dims: Sequence[Mapping[str, Dim]],
    out: str,
) -> bool:  # fmt: skip
    """The mean of v that the distribution gives."""
    weights, values = dims
    gone = [c for c in weights if c in values and c not in out]
    if not scores.keys or len(gone) != 1 or v.factor != 1 or v.piece is not scores.a.piece:
        return False
    if [r.axis for r in weights[gone[0]]] != [scores.keys]:
        return False
    base = state.bases[v.value].dims
    if values[gone[0]] != base[1] or set(out) != {*weights, *values} - {*gone}:
        return False
    queries = "j" if scores.keys == "i" else "i"
    q, k = (scores.a, scores.b) if queries == "i" else (scores.b, scores.a)
    size = scores.size
    made: list[list[Run]] = []
    seen: dict[int, tuple[int, int]] = {}
    for letter in out:
        (first, p), (other, x) = (_parted(d.get(letter, ())) for d in dims)
        axes = {run.axis for run in p}
        if first != other:
            return False
        if axes == {queries} and not x:
            made.append(list(base[1]))
        elif not p and x == one_run("c", size):
            made.append([*first, *x])
        elif axes <= {"h"} and {run.axis for run in x} <= {"c"} and (p or not x):
            parts = _aligned(p, x)
            if parts is None:
                return False
            seen |= {step: (count, of_v) for count, step, of_v in parts}
            runs = [Run("c", sympy.Integer(n), step * size) for n, step, _ in parts]
            made.append([*first, *runs])
        else:
            return False
    at = 1 if queries == "i" else 2
    found = [
        _in_order(n, size, [(r[0], r[i]) for r in scores.runs]) for n, i in ((q, at), (k, 3 - at))
    ]
    found.append(_in_order(v, size, [seen[s] for s in sorted(seen, reverse=True)]))
    if None in found or found[0].heads != math.prod(r[0] for r in scores.runs):  # type: ignore[union-attr]
        return False
    view = View(tuple(merged(dim) for dim in made))
    named = [(t, _queries_first(w, queries), f) for t, w, f in scores.terms]
    if not attend(state, node, found, scores.factor, named, view):  # type: ignore[arg-type]
        return False
    state.passed |= _chain(state, node)
    return True


def _queries_first(view: View, queries: str) -> View:
    """With "i" for queries and "j" for keys."""
    if queries == "i":
        return view
    turned = {"i": "j", "j": "i"}
    return View(tuple(
        tuple(replace(r, axis=turned.get(r.axis, r.axis)) for r in dim) for dim in view.dims
    ))  # fmt: skip


def _in_order(known: Native, size: int, runs: Sequence[tuple[int, int]]) -> Heads | None:
    """Heads that lie side by side, where several queries that follow each other may share one."""
    own = [(count, step) for count, step in runs if step]
    if [step for _, step in runs if step] != [s * size for s in _steps([c for c, _ in own])]:
        return None
    if any(step for _, step in runs[len(own) :]):
        return None
    first = known.view.first if known.view is not None else 0
    return Heads(known.value, math.prod(c for c, _ in own), size, first)


def _chain(state: Lowering, node: Node) -> set[Node]:
    """The nodes of scores that attention is made of."""
    found: set[Node] = set()
    left = [n for n in node.all_input_nodes if n in state.scores]
    while left:
        found.add(left[-1])
        left += [n for n in left.pop().all_input_nodes if n in state.scores and n not in found]
    return found


@rule(_aten.bmm.default)
def _products(state: Lowering, node: Node) -> bool:
    x, y = node.args[:2]
    return contracted(state, node, x, y)


@rule(_aten.baddbmm.default)
def _products_added(state: Lowering, node: Node) -> bool:
    term, x, y = node.args[:3]
    alpha, beta = (float(node.kwargs.get(k, 1)) for k in ("alpha", "beta"))  # type: ignore[arg-type]
    if not contracted(state, node, x, y) or node not in state.scores:
        return False
    scores = state.scores[node]
    scores = replace(scores, factor=alpha * scores.factor)
    if beta != 0:
        assert isinstance(term, Node)
        scores = replace(scores, terms=((term, scores.view, beta),))
    return _kept(state, node, scores)


@rule(_aten.einsum.default)
def _einsum(state: Lowering, node: Node) -> bool:
    equation, operands = node.args[:2]
    left, arrow, out = str(equation).replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or len(terms) != 2 or "." in left or not isinstance(operands, Sequence):
        return False
    return contracted(state, node, *operands[:2], letters=(*terms, out))  # type: ignore[misc,arg-type]
