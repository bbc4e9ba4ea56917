"""Programs in the making: what they are made of, and what is known of their nodes."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node

from sparseworks.engine.ir import Attention, Op, Value
from sparseworks.engine.views import View

__all__ = ["Native", "Piece", "Scores"]


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
        biases: names of those masks that differ from head to head.
    """

    kind: str
    level: int
    ops: list[Op] = field(default_factory=list)
    inputs: dict[str, Node] = field(default_factory=dict)
    outputs: dict[str, Node] = field(default_factory=dict)
    masks: dict[str, Node] = field(default_factory=dict)
    biases: set[str] = field(default_factory=set)

    @property
    def attends(self) -> bool:
        return any(isinstance(op, Attention) for op in self.ops)


@dataclass(eq=False)
class Scores:
    """q k^T on its way to attention.

    Args:
        a, b: what is multiplied, each `[entries, heads, positions, channels]` in some order.
        view: how its axes run: "b" through entries, "h" through heads, "i" and "j" through the
            positions of a and b.
        runs: of heads, from the slowest one, with the channels from one to the next in a and b.
        size: channels of a head.
        factor: of the product.
        terms: what is added, each seen as `view` at that time, and a factor.
        keys: once it is a distribution, the axis that it is one over, "i" or "j".
    """

    a: Native
    b: Native
    view: View
    runs: tuple[tuple[int, int, int], ...]
    size: int
    factor: float = 1.0
    terms: tuple[tuple[Node, View, float], ...] = ()
    keys: str = ""


@dataclass(eq=False)
class Native:
    """What is known of a node that a program makes.

    Args:
        view: where it is not the value itself.
        factor: it is the value times this number.
    """

    piece: Piece
    value: Value
    view: View | None = None
    factor: float = 1.0

    @property
    def whole(self) -> bool:
        """Whether it has all channels in its last axis, whatever the order of the others."""
        plain = self.view is None or self.view.whole(self.value.channels)
        return plain and self.factor == 1
