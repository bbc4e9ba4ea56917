"""Sparse problems and optimizers. Registered by name only."""

from sparseworks.core import registry

_ROOM = "sparseworks.solvers"

registry.register({"dct-adamw": f"{_ROOM}.dct_adamw:DCTAdam"})
