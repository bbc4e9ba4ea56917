"""The method registry: the only global state. Names map to classes that are imported when used."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar, Protocol

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.kinds import Kind, MethodInfo, Need, check_kind

__all__ = [
    "Kind",
    "MethodInfo",
    "Need",
    "build",
    "has_option",
    "names",
    "options_of",
    "paths",
    "register",
    "resolve",
]


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
    """The options of a method object as JSON values, for records and comparison.

    `build(name, **options_of(method))` makes an equal method again, where all options are plain
    values; others are told by their text. Fields with `repr=False` (models, data) are left out.
    """
    shown = [f.name for f in fields(method) if f.repr] if is_dataclass(method) else []
    return {name: _plain(getattr(method, name)) for name in shown}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return str(value)


def _frozen(value: Any) -> Any:
    """Lists as tuples: options are values, and JSON knows lists alone."""
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


def has_option(method: Any, option: str) -> bool:
    """Does a method, by name or object, have an option of this name?"""
    cls = resolve(method) if isinstance(method, str) else type(method)
    return is_dataclass(cls) and option in {f.name for f in fields(cls)}


def build(method: Any, kinds: tuple[Kind, ...] = (), /, **options: Any) -> Any:
    """A method object from its name and options, or the object itself.

    Args:
        method: registered name, or an object.
        kinds: those that the caller can use; empty: any.
        options: fields of the method, as themselves or as JSON values.

    Raises:
        InvalidArgument: unknown name, an option that the method does not have, or another kind.
    """
    if not isinstance(method, str):
        if options:
            raise InvalidArgument(
                f"options {sorted(options)} go into the {type(method).__name__}(...) object itself"
            )
        if kinds:
            check_kind(type(method), kinds)
        return method
    cls = resolve(method)
    if kinds and cls.info.kind not in kinds:
        check_kind(cls, kinds)  # first, for the options are those of another call
    known = [f.name for f in fields(cls)] if is_dataclass(cls) else []
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(known)}"
            raise InvalidArgument(f"method {method!r} has no option {option!r}{hint}")
    return cls(**{name: _frozen(value) for name, value in options.items()})
