"""Real text that every Python carries: docstrings and sources of the standard library."""

from __future__ import annotations

import ast
import inspect
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sparseworks.core.errors import DataError

__all__ = ["Docstring", "docstrings", "sources"]

_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "ensurepip"}


@dataclass(frozen=True)
class Docstring:
    """A documented function or class.

    Args:
        name: "module.Class.function".
        summary: first line of the docstring.
        body: the rest of it.
    """

    name: str
    summary: str
    body: str


def sources() -> Iterator[tuple[str, str]]:
    """(module path, source) of the standard library's Python files, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = False
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _LEFT_OUT & set(parts) or any(p.startswith("_") for p in parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        found = True
        yield ".".join(parts)[:-3], text
    if not found:
        raise DataError(f"{root}: the standard library's sources are not installed")


@cache
def docstrings() -> tuple[Docstring, ...]:
    """Docstrings with a summary line and a body, in a fixed order, each summary once."""
    found: dict[str, Docstring] = {}
    for module, text in sources():
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        for name, doc in _documented(tree, module):
            summary, _, rest = inspect.cleandoc(doc).partition("\n")
            body = " ".join(rest.split())
            if len(summary.split()) >= 4 and len(body.split()) >= 12:
                found.setdefault(summary.strip(), Docstring(name, summary.strip(), body))
    if not found:
        raise DataError("the standard library's docstrings are stripped in this installation")
    return tuple(found.values())


def _documented(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name = f"{prefix}.{child.name}"
            if doc := ast.get_docstring(child, clean=False):
                yield name, doc
            yield from _documented(child, name)
