"""Programs in the making, and what the rules know of the nodes of an exported graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from sparseworks.engine.ir import Activation, Attention, Load, Op, Product, Store, Value
from sparseworks.engine.views import View, base_view

__all__ = ["RULES", "Lowering", "Native", "Piece", "filled", "kind_of", "rule", "same_sizes",
           "shape_of", "size_now"]  # fmt: skip


@dataclass(eq=False)
class Piece:
    """A native program in the making: values of one kind and batch that need no torch in between.

    Args:
        kind: "image" or "tokens".
        level: how many times torch has to run before it.
        ops: in order.
        inputs: nodes of the graph that it reads.
        outputs: nodes of the graph that others read.
        masks: of attention, nodes of the graph.
    """

    kind: str
    level: int
    ops: list[Op] = field(default_factory=list)
    inputs: dict[str, Node] = field(default_factory=dict)
    outputs: dict[str, Node] = field(default_factory=dict)
    masks: dict[str, Node] = field(default_factory=dict)

    @property
    def attends(self) -> bool:
        return any(isinstance(op, Attention) for op in self.ops)


@dataclass(eq=False)
class Native:
    """What is known of a node that a program makes; `view` where it is not the value itself."""

    piece: Piece
    value: Value
    view: View | None = None

    @property
    def whole(self) -> bool:
        """Whether it has all channels in its last axis, whatever the order of the others."""
        return self.view is None or self.view.whole(self.value.channels)


Rule = Callable[["Lowering", Node], bool]
RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    def add(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, rule))
        return rule

    return add


class Lowering:
    """Programs in the making.

    Args:
        constants: parameters and buffers by the name of their node.
        plain: names of nodes that may not be seen through views.
    """

    def __init__(self, constants: Mapping[str, Tensor], plain: Set[str]) -> None:
        self.constants, self.plain = constants, plain
        self.native: dict[Node, Native] = {}
        self.levels: dict[Node, int] = {}
        self.pieces: dict[tuple[str, int, str], Piece] = {}
        self.loaded: dict[tuple[Piece, Node], Value] = {}
        self.made: dict[Value, Op] = {}
        self.padded: dict[Node, tuple[Node, int, int]] = {}  # by a convolution that follows
        self.passed: set[Node] = set()  # that are part of what reads them
        self.gelus: dict[Node, Node] = {}  # that are spelt out, and of what
        self.roots: dict[Value, Node] = {}  # the node that is the value itself
        self.bases: dict[Value, View] = {}  # of tokens

    # what a rule needs

    def constant(self, node: Any) -> Tensor | None:
        return self.constants.get(node.name) if isinstance(node, Node) else None

    def level_of(self, node: Node) -> int:
        """How many programs have to be complete before torch can make this node."""
        return max(
            (
                self.native[n].piece.level + 1 if n in self.native else self.levels.get(n, 0)
                for n in node.all_input_nodes
            ),
            default=0,
        )

    def inputs(self, kind: str, *nodes: Any) -> tuple[Piece, list[Value]] | None:
        """These nodes as values of one program; None where they cannot be."""
        if not all(isinstance(n, Node) and shape_of(n) is not None for n in nodes):
            return None
        known = [self.native.get(n) for n in nodes]
        if any(k is not None and k.piece.kind != kind for k in known):
            return None
        if any(k is not None and k.view is not None for k in known):
            return self._seen_alike(known)
        batches = {_batch(n, kind) for n in nodes}
        if None in batches or len(batches) != 1:
            return None
        level = max(
            self.native[n].piece.level if n in self.native else self.levels.get(n, 0) for n in nodes
        )
        key = (kind, level, str(batches.pop()))
        piece = self.pieces.setdefault(key, Piece(kind, level))
        return piece, [self._value(piece, n) for n in nodes]

    def _seen_alike(self, known: Sequence[Native | None]) -> tuple[Piece, list[Value]] | None:
        """Values of one program through the same view of all channels."""
        found = [k for k in known if k is not None and k.whole]
        if len(found) < len(known) or len({(k.piece, k.view) for k in found}) != 1:
            return None
        return found[0].piece, [k.value for k in found]

    def _value(self, piece: Piece, node: Node) -> Value:
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
            self.made[value] = piece.ops[-1]
            self.roots[value] = node
            if piece.kind == "tokens":
                self.bases[value] = base_view(shape)
        return self.loaded[piece, node]

    def add(self, piece: Piece, node: Node, op: Op, view: View | None = None) -> bool:
        """The node is what the operation makes, seen as its inputs are, or as `view` says.

        Declined where others would have to read a view of it.
        """
        base = None
        if piece.kind == "tokens":
            base = self.bases[op.inputs()[0]].of(op.out.channels)
            inputs = (self.native.get(n) for n in node.all_input_nodes)
            seen = next((k.view for k in inputs if k is not None and k.view is not None), None)
            view = view or (None if seen is None else seen.of(op.out.channels))
        if view is not None and node.name in self.plain:
            return False
        piece.ops.append(op)
        self.made[op.out] = op
        self.roots[op.out] = node
        if base is not None:
            self.bases[op.out] = base
        self.native[node] = Native(piece, op.out, view)
        return True

    def see(self, node: Node, known: Native, view: View | None) -> bool:
        """The node is a view of a value."""
        if view == self.bases.get(known.value):
            view = None
        elif view is None or self.roots[known.value].name in self.plain:
            return False
        self.native[node] = replace(known, view=view)
        return True

    def same(self, node: Node, source: Any) -> bool:
        """The node's value is its input's."""
        if source not in self.native:
            return False
        self.native[node] = replace(self.native[source])
        return True

    def product_alone(self, node: Any) -> Product | None:
        """The product that makes this node, where nothing else reads it and it may be extended."""
        known = self.native.get(node)
        op = self.made.get(known.value) if known is not None and known.whole else None
        if not isinstance(op, Product) or op.activation != Activation.NONE:
            return None
        while True:  # through nodes that are the same value
            if len(node.users) != 1:
                return None
            before = node.args[0] if node.args else None
            if not isinstance(before, Node) or before not in self.native:
                return op
            if self.native[before].value is not op.out:
                return op
            node = before

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
            if outside and known.view is None:
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


def shape_of(node: Any) -> tuple[Any, ...] | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return None
    return tuple(value.shape)


def size_now(size: Any) -> int:
    """A size in the example."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else size


def same_sizes(one: tuple[Any, ...], two: tuple[Any, ...]) -> bool:
    """Whether operands of one operator have equal axes.

    Sizes that are equal in the example are so in all: torch, which would broadcast else, noted it.
    """
    return [size_now(n) for n in one] == [size_now(n) for n in two]


def _batch(node: Node, kind: str) -> tuple[str, ...] | None:
    """What all values of a program have in common."""
    shape = shape_of(node) or ()
    if kind == "image":
        known = len(shape) in (2, 4) and isinstance(shape[1], int)
        return (str(shape[0]),) if known else None
    if len(shape) not in (2, 3) or not isinstance(shape[-1], int):
        return None
    return tuple(str(n) for n in shape[:-1])


def kind_of(node: Any, state: Lowering) -> str | None:
    """How a value that a linear layer reads is best seen."""
    if not isinstance(node, Node):
        return None
    if node in state.native:
        return state.native[node].piece.kind
    return "tokens" if len(shape_of(node) or ()) in (2, 3) else None


def filled(node: Node, defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a node, with the defaults of those that were not given."""
    return (*node.args, *defaults[len(node.args) :])
