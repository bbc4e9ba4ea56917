"""Recoveries: what repairs a tensor once its mask is chosen, under any method.

    sw.prune(model, "magnitude", sparsity=0.6, recovery="dsnot", data=batches)

| recovery | what it does | evidence |
| --- | --- | --- |
| refit | re-solves the kept weights of every row by least squares | Hessian |
| dsnot | swaps pruned and kept weights until the mean output error cancels | moments of inputs |
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.evidence import Collector
from sparseworks.core.patterns import Pattern
from sparseworks.weights.oneshot.base import Solution, Target
from sparseworks.weights.oneshot.parts import made, text_of

__all__ = ["Recovery", "get_recovery", "name_of"]

_NAMED = {"refit": "refit:Refit", "dsnot": "dsnot:DSnoT"}


@runtime_checkable
class Recovery(Protocol):
    """Repairs one tensor; a frozen dataclass whose fields are options."""

    evidence: ClassVar[type[Collector]]
    """What it must know of the inputs."""

    def check(self, pattern: Pattern) -> None:
        """Raise `InvalidArgument` where it cannot keep this pattern."""

    def recover(
        self, target: Target, dense: Tensor, solution: Solution, seen: Collector
    ) -> Solution:
        """The repaired weights and mask, of the same pattern and number of kept weights.

        Args:
            dense: fp32 matrix before pruning, `[groups * out, in]`.
            solution: what the method made of it.
            seen: the evidence.
        """


def get_recovery(given: str | Recovery | None) -> Recovery | None:
    """A recovery from "name" or "name:option=value,...", itself, or None.

    Raises:
        InvalidArgument: no recovery has this name, or not this option.
    """
    if given is None or isinstance(given, Recovery):
        return given
    found: Recovery | None = made("recovery", given, _NAMED) if isinstance(given, str) else None
    if found is None:
        raise InvalidArgument(f"recovery={given!r}; one of {', '.join(_NAMED)}, or None")
    return found


def name_of(given: Any) -> str | None:
    """The text that makes a recovery again."""
    if given is None or isinstance(given, str):
        return given
    names = {path.rpartition(":")[2]: name for name, path in _NAMED.items()}
    return text_of(names.get(type(given).__name__, type(given).__name__), given)
