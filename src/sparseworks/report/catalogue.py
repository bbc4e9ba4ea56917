"""The catalogue of methods, from the registry: for the terminal and for the documentation."""

from __future__ import annotations

import inspect
from dataclasses import fields, is_dataclass
from typing import Any

from sparseworks.core import registry
from sparseworks.core.registry import MethodInfo
from sparseworks.training.experiment import Driver

__all__ = ["catalogue_markdown", "describe", "infos"]


def infos() -> list[MethodInfo]:
    """What the registry says of every method, by room and name."""
    found: list[MethodInfo] = [registry.resolve(n).info for n in registry.names()]
    return sorted(found, key=lambda i: (i.room, i.kind, i.name))


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
        f"call      {_entry(info)}",
        f"needs     {', '.join(info.needs) or 'nothing'}",
        f"pattern   {info.pattern}",
        f"budget    {info.budget}",
        f"tensors   {info.tensors}",
        f"cost      {info.cost}",
    ]
    if is_dataclass(cls) and fields(cls):
        lines.append("options   " + ", ".join(f"{f.name}={f.default!r}" for f in fields(cls)))
    return "\n".join(lines)


def _entry(info: MethodInfo) -> str:
    cls = registry.resolve(info.name)
    if issubclass(cls, Driver):
        return f'sw.experiment(fit, model, "{info.name}", ...)'
    if info.kind == "driver" and hasattr(cls, "fit"):
        return f"sw.methods.{cls.__name__}(...).fit(model, example, batches, ...)"
    return {
        "one-shot": f'sw.prune(model, "{info.name}", ...)',
        "hooked": f'sw.sparsify(model, optimizer, "{info.name}", ...)',
        "transform": f'sw.transform(model, "{info.name}", ...)',
        "activation": f'sw.sparse_activations(model, "{info.name}", ...)',
        "structured": f'sw.slim(model, example, method="{info.name}", ...)',
        "measurement": getattr(cls, "entry", f"sw.methods.{cls.__name__}()(model, ...)"),
    }.get(info.kind, f"sw.methods ({info.kind})")


def catalogue_markdown() -> str:
    """The page `docs/catalogue.md`."""
    lines = [
        "# Catalogue of methods",
        "",
        "Generated from the registry (`make docs`); `sparseworks methods NAME` explains one.",
        "",
        "| method | call | default tensors | pattern | budget | needs | cost | paper |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for i in infos():
        needs = ", ".join(i.needs) or "nothing"
        lines.append(
            f"| `{i.name}` | `{_entry(i)}` | {i.tensors} | {i.pattern} | {i.budget} | {needs} "
            f"| {i.cost} | {i.title} ({i.authors}, {i.year}) |"
        )
    return "\n".join(lines) + "\n"
