"""The method registry: the only global state. Names map to classes that are imported when used."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar, Literal, Protocol

from sparseworks.core.errors import InvalidArgument

__all__ = [
    "Kind",
    "MethodInfo",
    "Need",
    "build",
    "names",
    "options_of",
    "paths",
    "register",
    "resolve",
]

Kind = Literal[
    "one-shot", "hooked", "transform", "driver", "structured", "measurement", "activation"
]
Need = Literal["data", "loss", "labels", "training"]


@dataclass(frozen=True)
class MethodInfo:
    """What the catalogue says of a method.

    Args:
        name: the public string.
        title: title of the paper.
        authors: "First author et al.".
        year: of publication.
        card: number of the method card ("a01"); "" when there is none.
        room: folder of the house.
        kind: how it is called: one-shot (`prune`), hooked (`sparsify`), transform, driver,
            structured (`slim`), measurement, activation (`sparse_activations`).
        needs: what the caller must give.
        pattern: default pattern and what else is accepted.
        budget: default budget.
        tensors: default tensors, when not the usual prunable ones.
        cost: what it costs in passes over model or data.
        summary: one line on what it does.
    """

    name: str
    title: str
    authors: str
    year: int
    room: str
    kind: Kind
    card: str = ""
    needs: tuple[Need, ...] = ()
    pattern: str = "any"
    budget: str = "uniform"
    tensors: str = "default"
    cost: str = ""
    summary: str = ""


class Registered(Protocol):
    info: ClassVar[MethodInfo]


_PATHS: dict[str, str] = {}


def register(methods: Mapping[str, str]) -> None:
    """Add methods as {name: "package.module:Class"}; nothing is imported yet."""
    _PATHS.update(methods)


def paths() -> dict[str, str]:
    """Registered name -> "package.module:Class"."""
    return dict(_PATHS)


def names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_PATHS)


def resolve(name: str) -> Any:
    """The class of a method.

    Raises:
        InvalidArgument: no method has this name; the nearest names are given.
    """
    if name not in _PATHS:
        near = difflib.get_close_matches(name, _PATHS, n=2, cutoff=0.4)
        hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
        raise InvalidArgument(f"unknown method {name!r}{hint} (`sparseworks methods` lists all)")
    module, _, attribute = _PATHS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def options_of(method: Any) -> dict[str, Any]:
    """The options of a method object as plain values, for records and comparison.

    Fields with `repr=False` (models, data) are left out.
    """
    plain = (bool, int, float, str, type(None))
    shown = [f.name for f in fields(method) if f.repr] if is_dataclass(method) else []
    found = {name: getattr(method, name) for name in shown}
    return {n: v if isinstance(v, plain) else str(v) for n, v in found.items()}


def build(method: Any, **options: Any) -> Any:
    """A method object from its name and options, or the object itself.

    Raises:
        InvalidArgument: unknown name, or an option that the method does not have.
    """
    if not isinstance(method, str):
        if options:
            raise InvalidArgument(
                f"options {sorted(options)} go into the {type(method).__name__}(...) object itself"
            )
        return method
    cls = resolve(method)
    known = [f.name for f in fields(cls)] if is_dataclass(cls) else []
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(known)}"
            raise InvalidArgument(f"method {method!r} has no option {option!r}{hint}")
    return cls(**options)
