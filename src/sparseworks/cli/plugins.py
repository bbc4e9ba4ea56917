"""`--plugin FILE.py`: methods of a file of the user, for every command that runs methods."""

from __future__ import annotations

from typing import Annotated, Any

import tyro

__all__ = ["Plugins", "load_plugins"]

Plugins = Annotated[
    tuple[str, ...],
    tyro.conf.arg(
        help="Python files that register methods of your own (`sparseworks new-method` writes "
        "one). They are run with all your rights: name only files that you trust."
    ),
]


def load_plugins(options: Any) -> None:
    """Run the files that the options of a command name.

    Raises:
        InvalidArgument: one is not there, fails, or registers nothing.
    """
    from sparseworks.core.plugins import load_plugin

    for file in getattr(options, "plugin", ()):
        load_plugin(file)
