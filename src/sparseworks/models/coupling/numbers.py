"""Numbers that modules hold, followed through the arithmetic of a forward pass.

`self.width // 2` is an int like any other, and remembers how it was made from which attribute. What
it told a size (`x.view(n, self.heads, -1)`) says later what the attribute must become.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Attribute", "Formula", "Number", "attributes", "evaluate", "solved"]


@dataclass(frozen=True)
class Attribute:
    """`module.name`, or one entry of it where it is a tuple or list."""

    module: str
    name: str
    index: int | None
    value: int

    def __str__(self) -> str:
        place = "" if self.index is None else f"[{self.index}]"
        return f"{self.module or 'the model'}.{self.name}{place}"


@dataclass(frozen=True)
class Operation:
    """`left sign right`, with sign one of + - * //."""

    sign: str
    left: Formula
    right: Formula


Formula = int | Attribute | Operation
_APPLY: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b,
}


class Number(int):
    """An int with the formula that made it; `source` is the trace that it belongs to.

    No formula: the number comes from what follows a cut by itself, such as the shape of a tensor.
    """

    formula: Formula | None
    source: object

    @classmethod
    def of(cls, value: int, formula: Formula | None, source: object) -> Number:
        number = cls(value)
        number.formula, number.source = formula, source
        return number

    def _with(self, sign: str, other: Any, reverse: bool = False) -> Any:
        if type(other) is not int and not isinstance(other, Number):
            return NotImplemented
        told = other.formula if isinstance(other, Number) else int(other)
        pair = [(int(self), self.formula), (int(other), told)]
        (a, left), (b, right) = reversed(pair) if reverse else pair
        made = None if left is None or right is None else Operation(sign, left, right)
        return Number.of(_APPLY[sign](a, b), made, self.source)

    def __add__(self, other: Any) -> Any:
        return self._with("+", other)

    def __radd__(self, other: Any) -> Any:
        return self._with("+", other, reverse=True)

    def __sub__(self, other: Any) -> Any:
        return self._with("-", other)

    def __rsub__(self, other: Any) -> Any:
        return self._with("-", other, reverse=True)

    def __mul__(self, other: Any) -> Any:
        return self._with("*", other)

    def __rmul__(self, other: Any) -> Any:
        return self._with("*", other, reverse=True)

    def __floordiv__(self, other: Any) -> Any:
        return self._with("//", other)

    def __rfloordiv__(self, other: Any) -> Any:
        return self._with("//", other, reverse=True)

    def __neg__(self) -> Any:
        return self._with("-", 0, reverse=True)

    def __reduce__(self) -> Any:
        return int, (int(self),)  # a copy that outlives the trace is an int


def attributes(formula: Formula) -> set[Attribute]:
    """Every attribute that a formula reads."""
    if isinstance(formula, Operation):
        return attributes(formula.left) | attributes(formula.right)
    return {formula} if isinstance(formula, Attribute) else set()


def evaluate(formula: Formula, values: Mapping[Attribute, int]) -> int:
    """The number that a formula makes of the values of its attributes."""
    if isinstance(formula, Operation):
        left, right = evaluate(formula.left, values), evaluate(formula.right, values)
        return _APPLY[formula.sign](left, right) if formula.sign != "//" or right else 0
    return values[formula] if isinstance(formula, Attribute) else formula


def solved(wanted: Iterable[tuple[Formula, int]]) -> tuple[dict[Attribute, int], set[Attribute]]:
    """Values of attributes for which every formula makes the number wanted of it.

    Returns:
        the values that are certain, and the attributes of formulas that cannot be met. A formula of
        several attributes that nothing else determines tells none of them.
    """
    values: dict[Attribute, int] = {}
    pending = list(wanted)
    refused: set[Attribute] = set()
    moved = True
    while moved:
        moved = False
        for formula, size in list(pending):
            open_ = attributes(formula) - values.keys()
            if len(open_) > 1:
                continue
            pending.remove((formula, size))
            if open_:
                moved = True
                attribute = open_.pop()
                found = _inverse(formula, attribute, size, values)
                values[attribute] = attribute.value if found is None else found
            if evaluate(formula, values) != size:
                refused |= attributes(formula)
    return values, refused


def _inverse(
    formula: Formula, attribute: Attribute, size: int, values: Mapping[Attribute, int]
) -> int | None:
    """What `attribute` must be for the formula to be `size`; None when no division comes out."""
    if not isinstance(formula, Operation):
        return size
    left_open = attribute in attributes(formula.left)
    if left_open and attribute in attributes(formula.right):
        return None
    part, rest = (formula.left, formula.right) if left_open else (formula.right, formula.left)
    known = evaluate(rest, values)
    if formula.sign == "+":
        inner = size - known
    elif formula.sign == "-":
        inner = size + known if left_open else known - size
    elif formula.sign == "*":
        if known == 0 or size % known:
            return None
        inner = size // known
    elif left_open:
        inner = size * known
    else:
        if size == 0:
            return None
        inner = known // size
    return _inverse(part, attribute, inner, values)
