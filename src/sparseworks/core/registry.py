"""The method registry: the only global state. Names map to classes that are imported when used."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import warnings
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar, Protocol

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.kinds import Kind, MethodInfo, Need, check_kind, check_method
from sparseworks.core.places import place_of, said

__all__ = [
    "GROUP",
    "Kind",
    "MethodInfo",
    "Need",
    "build",
    "forget_module",
    "has_option",
    "names",
    "names_of_module",
    "of_packages",
    "options_of",
    "paths",
    "register",
    "register_class",
    "resolve",
    "restore",
    "snapshot",
]


class Registered(Protocol):
    info: ClassVar[MethodInfo]


GROUP = "sparseworks.methods"
"""The group of entry points by which installed packages bring methods."""

_PATHS: dict[str, str] = {}
_CLASSES: dict[str, type[Any]] = {}  # of users, by name; all others are in _PATHS alone
_PACKAGES: dict[str, str] = {}  # name -> the installed package that brings it
_looked: list[bool] = []  # once the installed packages were asked


def register(methods: Mapping[str, str]) -> None:
    """Add methods as {name: "package.module:Class"}; nothing is imported yet."""
    _PATHS.update(methods)


def register_class(cls: type[Any]) -> None:
    """Add a class that is there, under the name in its `info`.

    Raises:
        InvalidArgument: a method of another place has the name.
    """
    _ask_packages()
    name, path = cls.info.name, _path_of(cls)
    if _PATHS.get(name, path) != path:
        raise InvalidArgument(
            f"{cls.__name__}: the name {name!r} is taken by {_PATHS[name]}; choose another for "
            "info.name"
        )
    _PATHS[name], _CLASSES[name] = path, cls


def _path_of(cls: type[Any]) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def names_of_module(module: str) -> tuple[str, ...]:
    """The names of the classes of a module that registered themselves."""
    return tuple(sorted(n for n, cls in _CLASSES.items() if cls.__module__ == module))


def forget_module(module: str) -> None:
    """Take back what the classes of a module registered."""
    for name in names_of_module(module):
        del _PATHS[name], _CLASSES[name]


def snapshot() -> tuple[dict[str, str], dict[str, type[Any]]]:
    """What is registered now, for `restore`."""
    return dict(_PATHS), dict(_CLASSES)


def restore(held: tuple[dict[str, str], dict[str, type[Any]]]) -> None:
    """What was registered when `snapshot` was called, and nothing else."""
    _PATHS.clear()
    _PATHS.update(held[0])
    _CLASSES.clear()
    _CLASSES.update(held[1])


def _ask_packages() -> None:
    """Once, on first use: the methods of installed packages, by name only."""
    if _looked:
        return
    _looked.append(True)
    for point in importlib.metadata.entry_points(group=GROUP):
        package = point.dist.name if point.dist is not None else "?"
        if point.name in _PATHS:
            warnings.warn(
                f"package {package} brings a method {point.name!r}, whose name is taken by "
                f"{_PATHS[point.name]}; it is left out",
                stacklevel=3,
            )
            continue
        _PATHS[point.name], _PACKAGES[point.name] = point.value, package


def of_packages() -> dict[str, str]:
    """Method -> the installed package that brings it."""
    _ask_packages()
    return dict(_PACKAGES)


def paths() -> dict[str, str]:
    """Registered name -> "package.module:Class"."""
    _ask_packages()
    return dict(_PATHS)


def names() -> list[str]:
    """All registered names, sorted."""
    _ask_packages()
    return sorted(_PATHS)


def resolve(name: str) -> Any:
    """The class of a method.

    Raises:
        InvalidArgument: no method has this name; the nearest names are given. Or the package that
            brings it fails.
    """
    if name not in _PATHS:
        _ask_packages()
    if name not in _PATHS:
        near = difflib.get_close_matches(name, _PATHS, n=2, cutoff=0.4)
        hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
        raise InvalidArgument(f"unknown method {name!r}{hint} (`sparseworks methods` lists all)")
    if name in _CLASSES:
        return _CLASSES[name]
    if name in _PACKAGES:
        return _of_package(name)
    module, _, attribute = _PATHS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def _of_package(name: str) -> Any:
    """A class that an installed package brings, which may be no method or not there at all."""
    whose = f"method {name!r} of the installed package {_PACKAGES[name]} ({_PATHS[name]})"
    module, _, attribute = _PATHS[name].partition(":")
    try:
        found = importlib.import_module(module)
    except Exception as error:
        raise InvalidArgument(
            f"{whose}: {place_of(error)}: {said(error)}; repair or uninstall the package"
        ) from error
    cls = getattr(found, attribute, None)
    if cls is None:
        raise InvalidArgument(f"{whose}: {found.__file__} has no {attribute!r}")
    try:
        check_method(cls)
    except InvalidArgument as error:
        raise InvalidArgument(f"{whose}: {error}") from None
    if cls.info.name != name:
        raise InvalidArgument(f"{whose}: its info.name is {cls.info.name!r}; both must be one name")
    return cls


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
