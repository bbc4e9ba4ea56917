"""From an exported graph to native operations: one rule per operator.

A rule looks at a node and either appends operations and says what the node's value is now, or
declines; what no rule takes runs through torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from sparseworks.core.errors import ModelError
from sparseworks.engine import rules as _rules  # fills the table
from sparseworks.engine.making import LAST, RULES, Lowering
from sparseworks.engine.patterns import gelu_in_parts, root_mean_square
from sparseworks.engine.pieces import Piece
from sparseworks.engine.rules.scores import SCORES
from sparseworks.engine.signals import widened
from sparseworks.engine.tidying import fixed_nodes, folded, tidied

__all__ = ["Piece", "lower"]


def lower(graph: torch.fx.Graph, constants: Mapping[str, Tensor]) -> list[Piece]:
    """Take what can be taken of an exported graph.

    Args:
        graph: of operators, with example values in `node.meta["val"]`.
        constants: parameters and buffers by the name of their node.

    Returns:
        Programs with at least one sparse product each; a node of the graph is made by at most one.
    """
    tidied(graph)
    widened(graph)
    plain: set[str] = set()
    inserted: dict[Any, Node] = {}
    spelt = {n: found for n in graph.nodes if (found := gelu_in_parts(n)) is not None}
    norms = {n: root for n in graph.nodes if (root := root_mean_square(n)) is not None}
    fixed = fixed_nodes(graph, constants)
    constants = folded(graph, fixed, constants)
    while True:
        state = Lowering(constants, plain, inserted)
        for node, (x, between) in spelt.items():
            state.gelus[node] = x
            state.passed |= between
        for node, (x, epsilon, between) in norms.items():
            state.norms[node] = x, epsilon
            state.passed |= between
        for node in graph.nodes:
            taken = node in fixed or node in state.passed or node.op != "call_function"
            if node.op == "call_function" and (taken or not _taken(state, node)):
                state.levels[node] = state.level_of(node)
        pieces, viewed = state.finished(graph)
        if not viewed:
            return pieces
        if viewed <= plain:
            raise ModelError(f"views of {', '.join(sorted(viewed))} are read, which rules made")
        plain |= viewed


def _taken(state: Lowering, node: Node) -> bool:
    scores = next((state.scores[n] for n in node.all_input_nodes if n in state.scores), None)
    change = None if scores is None else SCORES.get(node.target)
    if scores is not None and change is not None:
        changed = change(state, node, scores)
        if changed is None:
            return False
        state.scores[node] = changed
        state.levels[node] = state.level_of(node)
        return True
    rule = RULES.get(node.target)
    known = (state.native.get(n) for n in node.all_input_nodes)
    turned = any(k is not None and k.piece.kind == "image" and k.view is not None for k in known)
    if turned and node.target not in LAST:
        return False
    return rule is not None and rule(state, node)


del _rules
