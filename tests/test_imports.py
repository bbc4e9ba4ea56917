"""No two files of the package need each other, wherever their imports stand."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import sparseworks

ROOT = Path(sparseworks.__file__).parent
Graph = dict[str, set[str]]


def modules(root: Path) -> dict[str, Path]:
    """Every file of a package by its module's name."""
    found = {}
    for path in root.rglob("*.py"):
        parts = [root.name, *path.relative_to(root).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path) -> Iterator[tuple[str, str]]:
    """(module, name in it or "") of every import statement, wherever it stands."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(above if node.level else ()), *filter(None, [node.module])])
            yield from ((base, alias.name) for alias in node.names)


def graph_of(root: Path) -> Graph:
    """File -> files it imports. A name of a package is the module of that name, if there is one."""
    known = modules(root)
    graph: Graph = {name: set() for name in known}
    for name, path in known.items():
        for module, attribute in imported(name, path):
            inner = f"{module}.{attribute}"
            graph[name] |= {inner if inner in known else module} & known.keys()
        graph[name].discard(name)
    return graph


def circles(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """The strongly connected components of more than one file."""

    def reached(start: str, edges: Mapping[str, set[str]]) -> set[str]:
        seen, left = {start}, [start]
        while left:
            new = edges[left.pop()] - seen
            seen |= new
            left += new
        return seen

    backwards: Graph = {name: set() for name in graph}
    for name, targets in graph.items():
        for target in targets:
            backwards[target].add(name)
    found: list[set[str]] = []
    for name in graph:
        if not any(name in circle for circle in found):
            found.append(reached(name, graph) & reached(name, backwards))
    return [circle for circle in found if len(circle) > 1]


def test_no_files_are_in_a_circle():
    graph = graph_of(ROOT)
    assert len(graph) > 200 and sum(map(len, graph.values())) > 500
    found = circles(graph)
    assert not found, [
        f"{a} -> {b}" for circle in found for a in sorted(circle) for b in graph[a] & circle
    ]


def test_circles_are_seen_wherever_the_imports_stand(tmp_path):
    root = tmp_path / "pkg"
    files = {
        "__init__": "from .far import x",
        "far": "import os, pkg.sub.a",
        "sub/__init__": "",
        "sub/a": "def f():\n    from pkg.sub import b",
        "sub/b": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..far import x",
        "sub/c": "from . import b\nfrom .. import y",
    }
    for name, text in files.items():
        path = root / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert circles(graph_of(root)) == [{"pkg.far", "pkg.sub.a", "pkg.sub.b"}]
    (root / "sub" / "b.py").write_text("")
    assert circles(graph_of(root)) == []
