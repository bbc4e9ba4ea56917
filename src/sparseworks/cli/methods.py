"""The catalogue of methods: the command that runs each, what it needs, its defaults, its source."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from sparseworks.cli.plugins import Plugins

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options:
    """Options of `sparseworks methods`."""

    name: Annotated[str, tyro.conf.Positional] = ""
    """Show one method in full."""
    room: str | None = None
    """Only the methods of one room (weights, attention, ...)."""
    plugin: Plugins = ()
    json: bool = False
    """Print as JSON."""


def run(options: Options) -> None:
    """List all methods, or explain one."""
    import sparseworks  # noqa: F401  (registers the rooms)
    from sparseworks.core import registry
    from sparseworks.core.kinds import command_of
    from sparseworks.report.catalogue import as_dict, classes, describe

    if options.name:
        cls = registry.resolve(options.name)
        if options.json:
            json.dump(as_dict(cls), sys.stdout, indent=1)
            print()
        else:
            print(describe(cls))
        return
    listed = [cls for cls in classes() if options.room in (None, cls.info.room)]
    if options.json:
        json.dump([as_dict(cls) for cls in listed], sys.stdout, indent=1)
        print()
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{len(listed)} methods", title_justify="left")
    for column in ("method", "kind", "what it does", "command"):
        table.add_column(column, overflow="fold")
    for cls in listed:
        table.add_row(cls.info.name, cls.info.kind, cls.info.summary, command_of(cls))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
