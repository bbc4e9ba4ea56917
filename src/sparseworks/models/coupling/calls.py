"""One call of an operation, as the handlers of operations see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sparseworks.models.coupling.provenance import Atoms

__all__ = ["Call", "Cost"]


@dataclass(frozen=True, eq=False)
class Cost:
    """Multiply-adds of one operation: `macs` times the share kept of each label array."""

    name: str
    macs: float
    labels: tuple[Any, ...]


@dataclass
class Call:
    """One call of an operation, its arguments by their schema names."""

    atoms: Atoms
    arguments: dict[str, Any]
    shapes: list[tuple[int, ...]]
    costs: list[Cost] = field(default_factory=list)
    name: str = ""
    siblings: Callable[[str], list[dict[str, Any]]] = lambda _: []
    held: Callable[[], bool] = lambda: False

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shapes[0]

    def first(self, *names: str) -> Any:
        return next((self.arguments[n] for n in names if self.arguments.get(n) is not None), None)

    def cost(self, macs: float, *labels: Any) -> None:
        self.costs.append(Cost(self.name, float(macs), tuple(x for x in labels if x is not None)))
