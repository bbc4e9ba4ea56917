"""Functions that models spell out in several operators."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

__all__ = ["gelu_in_parts", "root_mean_square"]

_aten = torch.ops.aten


def gelu_in_parts(node: Node) -> tuple[Node, set[Node]] | None:
    """x, and what lies between, of 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    seen: set[Node] = set()

    def operands(n: Any, target: Any, number: float | None = None) -> Any:
        """The two operands of a node, or the one beside a number."""
        if not isinstance(n, Node) or n.target is not target or n.kwargs:
            return None
        seen.add(n)
        if number is None:
            return n.args
        plain = [a for a in n.args if isinstance(a, int | float)]
        close = len(plain) == 1 and abs(plain[0] - number) < 1e-6 * abs(number)
        return next((a for a in n.args if isinstance(a, Node)), None) if close else None

    if node.target is not _aten.mul.Tensor or len(node.args) != 2:
        return None
    mul, add, power = _aten.mul.Tensor, _aten.add.Tensor, _aten.pow.Tensor_Scalar
    for half, rest in (node.args, node.args[::-1]):
        seen.clear()
        x = operands(half, mul, 0.5)
        tanh = operands(operands(rest, add, 1.0), _aten.tanh.default)
        inner = operands(tanh[0], mul, math.sqrt(2 / math.pi)) if tanh else None
        terms = operands(inner, add)
        if x is None or terms is None or x not in terms:
            continue
        cube = operands(terms[1 - terms.index(x)], mul, 0.044715)
        if operands(cube, power, 3.0) is x:
            return x, seen
    return None


def root_mean_square(node: Node) -> tuple[Node, float, set[Node]] | None:
    """x, epsilon, and what lies between, of x rsqrt(mean(x^2) + epsilon) over the last axis."""
    if node.target is not _aten.mul.Tensor or len(node.args) != 2:
        return None
    for x, scale in (node.args, node.args[::-1]):
        root = _operands(scale, _aten.rsqrt.default)
        total = _operands(root[0], _aten.add.Tensor) if root else None
        mean = _operands(total[0], _aten.mean.dim) if total else None
        if not (root and total and mean) or not isinstance(total[1], float):
            continue
        if len(mean) < 3 or not mean[2] or list(mean[1]) != [-1]:
            continue
        squares = [_operands(mean[0], t) for t in (_aten.pow.Tensor_Scalar, _aten.mul.Tensor)]
        if squares[0] == (x, 2) or squares[1] == (x, x):
            return x, total[1], {scale, root[0], total[0], mean[0]}  # type: ignore[return-value,arg-type]
    return None


def _operands(node: Any, target: Any) -> tuple[Any, ...] | None:
    plain = isinstance(node, Node) and node.target is target and not node.kwargs
    return tuple(node.args) if plain else None
