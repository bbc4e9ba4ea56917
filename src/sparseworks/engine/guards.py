"""Which sizes an exported graph is right for: what tracing and the rules took for granted.

Python code may take another way for other sizes (`if height > 100`), and operators may need sizes
that fit together (`2 * (height // 2) == height`). torch.export notes such conditions in terms of
the sizes of the inputs; they are kept as plain data and looked at once for every new set of sizes.

Conditions that no size is 1 are left out, and sizes of 1 count as 2: export never sees a 1, because
operators could broadcast it, and what was traced broadcasts it as they do.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor

__all__ = ["guards_of", "holds", "written"]

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Equality": operator.eq,
    "Unequality": operator.ne,
    "StrictLessThan": operator.lt,
    "LessThan": operator.le,
    "StrictGreaterThan": operator.gt,
    "GreaterThan": operator.ge,
    "Add": lambda *terms: sum(terms),
    "Mul": lambda *factors: math.prod(factors),
    "Pow": operator.pow,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "CeilDiv": lambda a, b: -(-a // b),
    "Max": max,
    "Min": min,
    "And": lambda *parts: all(parts),
    "Or": lambda *parts: any(parts),
    "Not": operator.not_,
}
_SIGNS = {"Equality": "==", "Unequality": "!=", "StrictLessThan": "<", "LessThan": "<=",
          "StrictGreaterThan": ">", "GreaterThan": ">=", "Add": "+", "Mul": "*", "Mod": "%",
          "PythonMod": "%", "FloorDiv": "//", "CleanDiv": "//", "Pow": "**", "And": "and",
          "Or": "or"}  # fmt: skip


def guards_of(graph: torch.fx.Graph) -> list[Any]:
    """The conditions so far on the sizes of a graph's inputs, as nested lists.

    Raises:
        NotImplementedError: a condition that plain data cannot say.
    """
    inputs = [n.meta.get("val") for n in graph.nodes if n.op == "placeholder"]
    sizes = [s for t in inputs if isinstance(t, Tensor) for s in t.shape if not isinstance(s, int)]
    if not sizes:
        return []
    known = {str(s) for s in sizes}
    found: dict[str, Any] = {}
    first: Any = sizes[0]
    for guard in first.node.shape_env.guards:
        expr = guard.expr
        one = isinstance(expr, sympy.Ne) and 1 in expr.args
        if not one and {str(s) for s in expr.free_symbols} <= known:
            found[str(expr)] = _encoded(expr)
    return list(found.values())


def _encoded(expr: Any) -> Any:
    if expr.is_Symbol:
        return str(expr)
    if expr.is_Integer:
        return int(expr)
    name = type(expr).__name__
    if expr in (sympy.true, sympy.false):
        return int(bool(expr))
    if name not in _FUNCTIONS:
        raise NotImplementedError(f"sizes for which {expr}")
    return [name, *(_encoded(a) for a in expr.args)]


def holds(guard: Any, sizes: Mapping[str, int]) -> bool:
    """Whether a condition holds for these sizes of axes by name."""
    try:
        return bool(_value(guard, sizes))
    except ZeroDivisionError:
        return False


def _value(expr: Any, sizes: Mapping[str, int]) -> Any:
    if isinstance(expr, str):
        return max(2, sizes[expr])
    if not isinstance(expr, list):
        return expr
    return _FUNCTIONS[expr[0]](*(_value(a, sizes) for a in expr[1:]))


def written(guard: Any, names: Mapping[str, str]) -> str:
    """A condition in words of Python, with these names of axes."""
    if isinstance(guard, str):
        return names.get(guard, guard)
    if not isinstance(guard, list):
        return str(guard)
    parts = [written(a, names) for a in guard[1:]]
    if guard[0] not in _SIGNS:
        return f"{guard[0].lower()}({', '.join(parts)})"
    nested = [f"({p})" if isinstance(a, list) else p for a, p in zip(guard[1:], parts, strict=True)]
    return f" {_SIGNS[guard[0]]} ".join(nested)
