"""Measurements on models and on claims. The room registers its methods here by name only."""

from sparseworks.core import registry

_ROOM = "sparseworks.diagnostics"

registry.register(
    {
        "essential-sparsity": f"{_ROOM}.essential_sparsity:EssentialSparsity",
        "fair-comparison": f"{_ROOM}.audit:FairComparison",
    }
)
