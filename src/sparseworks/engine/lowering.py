"""From an exported graph to native operations: one rule per operator.

A rule looks at a node and either appends operations and says what the node's value is now, or
declines; what no rule takes runs through torch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparseworks.engine import rules as _rules  # fills the table
from sparseworks.engine.patterns import gelu_in_parts
from sparseworks.engine.pieces import RULES, Lowering, Piece

__all__ = ["Piece", "lower"]


def lower(graph: torch.fx.Graph, constants: Mapping[str, Tensor]) -> list[Piece]:
    """Take what can be taken of an exported graph.

    Args:
        graph: of operators, with example values in `node.meta["val"]`.
        constants: parameters and buffers by the name of their node.

    Returns:
        Programs with at least one sparse product each; a node of the graph is made by at most one.
    """
    plain: set[str] = set()
    spelt = {n: found for n in graph.nodes if (found := gelu_in_parts(n)) is not None}
    while True:
        state = Lowering(constants, plain)
        for node, (x, between) in spelt.items():
            state.gelus[node] = x
            state.passed |= between
        for node in graph.nodes:
            if node.op != "call_function":
                continue
            rule = None if node in state.passed else RULES.get(node.target)
            if rule is None or not rule(state, node):
                state.levels[node] = state.level_of(node)
        pieces, viewed = state.finished(graph)
        if not viewed:
            return pieces
        plain |= viewed


del _rules
