"""Methods of others: a decorator for one's own class, a file that holds some, installed packages.

    @sw.register
    @dataclass(frozen=True)
    class Mine(OneShot): ...

Loading a plugin runs it: it is a program with all rights of the user, not data.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from sparseworks.core import registry
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.kinds import check_method
from sparseworks.core.places import place_of, said

__all__ = ["load_plugin", "place_in_plugin", "register"]

Method = TypeVar("Method", bound=type[Any])

_LOADED: dict[Path, tuple[str, tuple[str, ...]]] = {}  # file -> digest, names of its methods


def register(cls: Method) -> Method:
    """Make a class a method under `cls.info.name`, for all calls and commands; a decorator.

    Raises:
        InvalidArgument: it is not a method yet (what lacks is said), or another has its name.
    """
    check_method(cls)
    for option in fields(cls):
        if option.default is MISSING and option.default_factory is MISSING:
            raise InvalidArgument(
                f"{cls.__name__}: option {option.name!r} has no default; give it one, for the "
                "catalogue and the commands make the method from its name alone"
            )
    registry.register_class(cls)
    return cls


def load_plugin(file: str | Path) -> tuple[str, ...]:
    """Run a Python file that registers methods; the names of its methods.

    The file runs with all your rights: load only what you trust. A second call of an unchanged
    file does nothing; a file that changed is run again and its methods replace the former ones.

    Raises:
        InvalidArgument: no such file, it fails (with file and line), or it registers nothing.
    """
    path = Path(file).expanduser().resolve()
    if path.suffix != ".py" or not path.is_file():
        raise InvalidArgument(f"plugin {file}: no such file; give the path of a .py file")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if path in _LOADED and _LOADED[path][0] == digest:
        return _LOADED[path][1]
    name = f"sparseworks_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    before = registry.snapshot()
    registry.forget_module(name)
    held = sys.modules.get(name)
    try:
        _run(path, name)
        found = registry.names_of_module(name)
        if not found:
            raise InvalidArgument(
                f"plugin {file}: registers no method; put @sw.register above its class"
            )
    except BaseException as error:
        registry.restore(before)
        sys.modules.pop(name, None)
        if held is not None:
            sys.modules[name] = held
        if not isinstance(error, Exception):
            raise
        place = place_of(error, {str(path)})
        if isinstance(error, InvalidArgument):
            if not place:  # ours, of the whole file
                raise
            raise InvalidArgument(f"plugin {place}: {error}") from error
        raise InvalidArgument(f"plugin {place or path}: {said(error)}") from error
    _LOADED[path] = digest, found
    return found


def _run(path: Path, name: str) -> None:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    # not through the loader's cache: a file edited within a second would be the old one
    exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)


def place_in_plugin(error: BaseException) -> str:
    """ "file:line" of the last line of a loaded plugin that an error passed; "" if none."""
    return place_of(error, {str(f) for f in _LOADED}) if _LOADED else ""
