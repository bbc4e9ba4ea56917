"""Every registered method as a class: `sw.methods.Wanda(pattern="2:4")`."""

from __future__ import annotations

from typing import Any

from sparseworks.core import registry


def _classes() -> dict[str, str]:
    """Class name -> registered name, without importing any method."""
    return {path.rpartition(":")[2]: name for name, path in registry.paths().items()}


def __getattr__(name: str) -> Any:
    found = _classes().get(name)
    if found is None:
        raise AttributeError(f"no method class {name!r}; there are {', '.join(sorted(_classes()))}")
    return registry.resolve(found)


def __dir__() -> list[str]:
    return sorted(_classes())
