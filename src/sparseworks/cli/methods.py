"""The catalogue of methods: what each needs, its defaults, its source."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import Annotated

import tyro

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options:
    """Options of `sparseworks methods`."""

    name: Annotated[str, tyro.conf.Positional] = ""
    """Show one method in full."""
    room: str | None = None
    """Only the methods of one room (weights, attention, ...)."""
    json: bool = False
    """Print as JSON."""


def run(options: Options) -> None:
    """List all methods, or explain one."""
    import sparseworks  # noqa: F401  (registers the rooms)
    from sparseworks.core import registry
    from sparseworks.report.catalogue import describe, infos

    if options.name:
        cls = registry.resolve(options.name)
        if options.json:
            json.dump(asdict(cls.info), sys.stdout, indent=1)
            print()
        else:
            print(describe(cls))
        return
    listed = [i for i in infos() if options.room in (None, i.room)]
    if options.json:
        json.dump([asdict(i) for i in listed], sys.stdout, indent=1)
        print()
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{len(listed)} methods", title_justify="left")
    for column in ("method", "room", "kind", "needs", "pattern", "budget", "what it does"):
        table.add_column(column)
    for i in listed:
        needs = ", ".join(i.needs)
        table.add_row(i.name, i.room, i.kind, needs, i.pattern, i.budget, i.summary)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
