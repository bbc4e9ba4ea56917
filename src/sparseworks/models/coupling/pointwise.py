"""Operations that meet entry by entry, make tensors in place, or tell nothing."""

from __future__ import annotations

from typing import Any

from sparseworks.models.coupling.calls import Call
from sparseworks.models.coupling.provenance import Provenance, frozen

__all__ = ["constant", "counted", "elementwise", "opaque", "same", "tensors"]


def tensors(value: Any) -> list[Provenance]:
    """Every tensor in an argument."""
    if isinstance(value, Provenance):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors(v)]
    return []


def elementwise(call: Call) -> Provenance:
    return call.atoms.elementwise(
        [t for v in call.arguments.values() for t in tensors(v)], call.shape
    )


def same(call: Call) -> Provenance:
    return call.atoms.elementwise([call.first("self", "input")], call.shape)


def constant(call: Call) -> Provenance:
    """Made in place: whatever it meets has to agree on its sizes."""
    return call.atoms.source(call.shape)


def counted(call: Call) -> Provenance:
    """Made in place with values of their own: nothing of it can be cut."""
    return frozen(call.shape)


def opaque(call: Call) -> Any:
    """Values or order decide: nothing that enters can be cut."""
    for value in call.arguments.values():
        for tensor in tensors(value):
            call.atoms.freeze_all(tensor)
    results = [frozen(s) for s in call.shapes]
    return results if len(results) > 1 else results[0]
