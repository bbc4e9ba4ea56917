"""Mixtures of experts: methods that route, registered by name only."""

from sparseworks.core import registry

_ROOM = "sparseworks.experts"

registry.register(
    {
        "upcycling": f"{_ROOM}.copying:Upcycling",
    }
)
