"""Programs in the making, and the rules that lower nodes into them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from sparseworks.engine.ir import Activation, Load, Op, Product, Store, Value
from sparseworks.engine.nodes import batch_of, place_of, shape_of
from sparseworks.engine.pieces import Native, Piece, Scores
from sparseworks.engine.views import View, base_view, expression, image_view

__all__ = ["LAST", "RULES", "Lowering", "kind_of", "rule"]

Rule = Callable[["Lowering", Node], bool]
RULES: dict[Any, Rule] = {}
LAST: set[Any] = set()  # operators whose rules take images with their channels last as well


def rule(*targets: Any, last: bool = False) -> Callable[[Rule], Rule]:
    def add(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, rule))
        if last:
            LAST.update(targets)
        return rule

    return add


class Lowering:
    """Programs in the making.

    Args:
        constants: parameters and buffers by the name of their node.
        plain: names of nodes that may not be seen through views.
        inserted: operators that were added to the graph, by what they compute.
    """

    def __init__(
        self, constants: Mapping[str, Tensor], plain: Set[str], inserted: dict[Any, Node]
    ) -> None:
        self.constants, self.plain, self.inserted = constants, plain, inserted
        self.native: dict[Node, Native] = {}
        self.levels: dict[Node, int] = {}
        self.pieces: dict[tuple[str, int, str], Piece] = {}
        self.loaded: dict[tuple[Piece, Node], Value] = {}
        self.made: dict[Value, Op] = {}
        self.padded: dict[Node, tuple[Node, int, int]] = {}  # by a convolution that follows
        self.passed: set[Node] = set()  # that are part of what reads them
        self.norms: dict[Node, tuple[Node, float]] = {}  # by the root mean square, spelt out
        self.gelus: dict[Node, Node] = {}  # that are spelt out, and of what
        self.scores: dict[Node, Scores] = {}  # of attention
        self.roots: dict[Value, Node] = {}  # the node that is the value itself
        self.bases: dict[Value, View] = {}  # of tokens
        self.pieces_of: dict[Value, Piece] = {}

    # what a rule needs

    def constant(self, node: Any) -> Tensor | None:
        return self.constants.get(node.name) if isinstance(node, Node) else None

    def number(self, value: Any) -> float | None:
        """A number, also as a constant tensor of one element."""
        if isinstance(value, int | float):
            return float(value)
        held = self.constant(value)
        return float(held) if held is not None and held.numel() == 1 else None

    def level_of(self, node: Node) -> int:
        """How many programs have to be complete before torch can make this node."""
        return max(
            (
                self.native[n].piece.level + 1 if n in self.native else self.levels.get(n, 0)
                for n in node.all_input_nodes
            ),
            default=0,
        )

    def insert(self, target: Any, x: Node, *args: Any, **kwargs: Any) -> Node:
        """An operator of torch on a node, behind it in the graph."""
        key = (target, x, str(args), str(kwargs))
        node = self.inserted.get(key)
        if node is None:
            read: list[Node] = []
            map_arg((x, args), read.append)
            after = max(read, key=place_of)
            with x.graph.inserting_after(after):
                node = x.graph.call_function(target, (x, *args), kwargs)
            given = map_arg(node.args, lambda n: n.meta["val"])
            with x.meta["val"].fake_mode:
                node.meta["val"] = target(*given, **kwargs)
            self.inserted[key] = node
        self.levels[node] = self.level_of(node)
        return node

    def inputs(self, kind: str, *nodes: Any) -> tuple[Piece, list[Value]] | None:
        """These nodes as values of one program; None where they cannot be."""
        if not all(isinstance(n, Node) and shape_of(n) is not None for n in nodes):
            return None
        known = [self.native.get(n) for n in nodes]
        if any(k is not None and k.piece.kind != kind for k in known):
            return None
        if any(k is not None and (k.view is not None or k.factor != 1) for k in known):
            return self._seen_alike(known)
        batches = {batch_of(n, kind) for n in nodes}
        if None in batches or len(batches) != 1:
            return None
        level = max(
            self.native[n].piece.level if n in self.native else self.levels.get(n, 0) for n in nodes
        )
        key = (kind, level, str(batches.pop()))
        piece = self.pieces.setdefault(key, Piece(kind, level))
        return piece, [self.loaded_into(piece, n) for n in nodes]

    def _seen_alike(self, known: Sequence[Native | None]) -> tuple[Piece, list[Value]] | None:
        """Values of one program through the same view of all channels."""
        found = [k for k in known if k is not None and k.whole]
        if len(found) < len(known) or len({(k.piece, k.view) for k in found}) != 1:
            return None
        return found[0].piece, [k.value for k in found]

    def loaded_into(self, piece: Piece, node: Node) -> Value:
        """A node as a value of a program."""
        known = self.native.get(node)
        if known is not None and known.piece is piece:
            return known.value
        if (piece, node) not in self.loaded:
            shape = shape_of(node)
            assert shape is not None
            channels = shape[1] if piece.kind == "image" else shape[-1]
            value = Value(piece.kind, int(channels))
            piece.ops.append(Load(value, node.name, vector=len(shape) == 2))
            piece.inputs[node.name] = node
            self.loaded[piece, node] = value
            self.pieces_of[value] = piece
            self.made[value] = piece.ops[-1]
            self.roots[value] = node
            base = base_view(shape) if piece.kind == "tokens" else image_view(shape)
            if base is not None:
                self.bases[value] = base
        return self.loaded[piece, node]

    def add(self, piece: Piece, node: Node, op: Op, view: View | None = None) -> bool:
        """The node is what the operation makes, seen as its inputs are, or as `view` says.

        Declined where others would have to read a view of it.
        """
        inputs = (self.native.get(n) for n in node.all_input_nodes)
        seen = next((k.view for k in inputs if k is not None and k.view is not None), None)
        base: View | None
        if piece.kind == "tokens":
            base = self.bases[op.inputs()[0]].of(op.out.channels)
        elif seen is None:
            base = image_view(shape_of(node) or ())
        else:  # an image with its channels last
            base = self.bases[op.inputs()[0]].of(op.out.channels, 1)
        view = view or (None if seen is None else seen.of(op.out.channels))
        if view is not None and node.name in self.plain:
            return False
        if view == base:
            view = None
        piece.ops.append(op)
        self.pieces_of[op.out] = piece
        self.made[op.out] = op
        self.roots[op.out] = node
        if base is not None:
            self.bases[op.out] = base
        self.native[node] = Native(piece, op.out, view)
        return True

    def hidden(self, piece: Piece, op: Op) -> None:
        """An operation whose value no node of the graph is."""
        piece.ops.append(op)
        self.made[op.out], self.pieces_of[op.out] = op, piece
        if piece.kind == "tokens":
            self.bases[op.out] = self.bases[op.inputs()[0]].of(op.out.channels)

    def see(self, node: Node, known: Native, view: View | None) -> bool:
        """The node is a view of a value."""
        if view == self.bases.get(known.value):
            view = None
        elif view is None or self.roots[known.value].name in self.plain:
            return False
        self.native[node] = replace(known, view=view)
        return True

    def scaled(self, node: Node, known: Native, factor: float) -> bool:
        """The node is a value, or what is seen of it, times a number."""
        if self.roots[known.value].name in self.plain:
            return False
        self.native[node] = replace(known, factor=known.factor * factor)
        return True

    def same(self, node: Node, source: Any) -> bool:
        """The node's value is its input's."""
        if source not in self.native:
            return False
        self.native[node] = replace(self.native[source])
        return True

    def alone(self, node: Any) -> Op | None:
        """What makes this node, where nothing else reads it."""
        known = self.native.get(node)
        if known is None or not known.whole:
            return None
        op = self.made[known.value]
        while True:  # through nodes that are the same value
            if len(node.users) != 1:
                return None
            before = node.args[0] if node.args else None
            if not isinstance(before, Node) or before not in self.native:
                return op
            if self.native[before].value is not op.out:
                return op
            node = before

    def product_alone(self, node: Any) -> Product | None:
        """The product that makes this node, where nothing else reads it and it may be extended."""
        op = self.alone(node)
        extended = isinstance(op, Product) and op.activation == Activation.NONE
        return op if extended else None  # type: ignore[return-value]

    def size(self, graph: torch.fx.Graph, wanted: Any) -> Any:
        """A size as an argument of an operator: a number, or a node that reads it off an input."""
        if wanted.is_Integer:
            return int(wanted)
        for node in graph.nodes:
            value = node.meta.get("val")
            if node.op == "placeholder" and isinstance(value, Tensor):
                for axis, size in enumerate(value.shape):
                    if expression(size) == wanted:
                        return self.insert(torch.ops.aten.sym_size.int, node, axis)
        return None

    # the end

    def finished(self, graph: torch.fx.Graph) -> tuple[list[Piece], set[str]]:
        """Store what others read, and leave out programs that have nothing to skip.

        Returns:
            The programs; and values of which others read views, which no program stores.
        """
        viewed = set()
        pieces = [p for p in self.pieces.values() if any(isinstance(o, Product) for o in p.ops)]
        for node in graph.nodes:
            known = self.native.get(node)
            if known is None or known.piece not in pieces:
                continue
            piece = known.piece
            outside = [u for u in self._readers(node) if self._piece(u) is not piece]
            if outside and known.view is None and known.factor == 1:
                self._store(piece, node, known.value)
            elif outside:
                viewed.add(self.roots[known.value].name)
        return sorted(pieces, key=lambda p: p.level), viewed

    def _readers(self, node: Node) -> list[Node]:
        """Who reads a node; through what is part of them, as padding is."""
        found = []
        for user in node.users:
            passed = user in self.padded or user in self.passed
            found += self._readers(user) if passed else [user]
        return found

    def _piece(self, node: Node) -> Piece | None:
        known = self.native.get(node)
        return None if known is None else known.piece

    def _store(self, piece: Piece, node: Node, value: Value) -> None:
        if node.name not in piece.outputs:
            shape = shape_of(node) or ()
            piece.ops.append(Store(value, node.name, vector=len(shape) == 2))
            piece.outputs[node.name] = node


def kind_of(node: Any, state: Lowering) -> str | None:
    """How a value that a linear layer reads is best seen."""
    if not isinstance(node, Node):
        return None
    if node in state.native:
        return state.native[node].piece.kind
    return "tokens" if len(shape_of(node) or ()) in (2, 3) else None
