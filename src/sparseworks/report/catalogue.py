"""The catalogue of methods, from the registry: for the terminal and for the documentation."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from sparseworks.core import registry
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.kinds import call_of, command_of
from sparseworks.core.registry import MethodInfo

__all__ = ["as_dict", "catalogue_markdown", "classes", "describe"]


def classes() -> list[Any]:
    """The class of every method that can be had, by room, kind and name; others are warned of."""
    found = []
    for name in registry.names():
        try:
            found.append(registry.resolve(name))
        except InvalidArgument as error:  # an installed package that is broken
            warnings.warn(str(error), stacklevel=2)
    return sorted(found, key=lambda cls: (cls.info.room, cls.info.kind, cls.info.name))


def describe(cls: Any) -> str:
    """One method in full, as text."""
    info: MethodInfo = cls.info
    module = inspect.getdoc(inspect.getmodule(cls)) or ""
    lines = [
        f"{info.name}: {info.summary}",
        "",
        module,
        "",
        inspect.getdoc(cls) or "",
        "",
        f"paper     {info.title} ({info.authors}, {info.year})",
        f"call      {call_of(cls)}",
        f"command   {command_of(cls)}",
        f"needs     {', '.join(info.needs) or 'nothing'}",
        f"pattern   {info.pattern}",
        f"budget    {info.budget}",
        f"tensors   {info.tensors}",
        f"cost      {info.cost}",
    ]
    if is_dataclass(cls) and fields(cls):
        lines.append("options   " + ", ".join(f"{f.name}={f.default!r}" for f in fields(cls)))
    return "\n".join(lines)


def as_dict(cls: Any) -> dict[str, Any]:
    """What the registry says of a method, with what runs it."""
    return {**asdict(cls.info), "call": call_of(cls), "command": command_of(cls)}


def catalogue_markdown() -> str:
    """The page `docs/catalogue.md`."""
    lines = [
        "# Catalogue of methods",
        "",
        "Generated from the registry (`make docs`); `sparseworks methods NAME` explains one.",
        "",
        "| method | call | command | default tensors | pattern | budget | needs | cost | paper |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for cls in classes():
        i = cls.info
        needs = ", ".join(i.needs) or "nothing"
        lines.append(
            f"| `{i.name}` | `{call_of(cls)}` | `{command_of(cls)}` | {i.tensors} | {i.pattern} "
            f"| {i.budget} | {needs} "
            f"| {i.cost} | {i.title} ({i.authors}, {i.year}) |"
        )
    return "\n".join(lines) + "\n"
