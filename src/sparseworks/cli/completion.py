"""Print the completion of commands, options, methods and files for a shell.

Put what it prints where the shell looks (see the examples), and again after an update.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from sparseworks.core.errors import MissingDependency

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options:
    """Options of `sparseworks completion`."""

    shell: Annotated[Literal["bash", "zsh", "fish"], tyro.conf.Positional] = "bash"
    """Which shell."""


def run(options: Options) -> None:
    """Build the parser of all commands and let tyro write its script."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            tyro.extras.subcommand_cli_from_dict(
                _commands(),
                prog="sparseworks",
                args=["--tyro-print-completion", options.shell],
            )
    except ImportError as error:  # of older versions of tyro
        raise MissingDependency(
            f"completion needs a newer tyro: pip install -U tyro ({error})"
        ) from None
    print(said.getvalue(), end="")


def _commands() -> dict[str, Any]:
    """Command -> its options, with the names of its methods as what may stand behind --method."""
    from sparseworks.cli import COMMANDS
    from sparseworks.core import registry
    from sparseworks.core.kinds import command_of

    methods: dict[str, list[str]] = {}
    for name in registry.names():
        method = registry.resolve(name)
        if method.info.kind == "optimizer":  # behind --optimizer
            continue
        methods.setdefault(command_of(method).split()[1], []).append(name)
        if method.info.kind == "one-shot":
            for command in ("compare", "curve"):
                methods.setdefault(command, []).append(name)
    methods["train"].append("dense")
    made: dict[str, Any] = {}
    for command, text in COMMANDS.items():
        module = importlib.import_module(f"sparseworks.cli.{command.replace('-', '_')}")
        made[command] = _with_choices(module.Options, methods.get(command, ()), text)
    return made


def _with_choices(options: type, names: Any, text: str) -> type:
    """The same options, where a method is one of these names, and with --config."""
    known: Any = Literal[tuple(names)] if names else str
    places = {"method": known, "methods": tuple[known, ...]}
    first = {"methods": ()}  # no default matters here, but it must be of the type
    fields: list[tuple[str, Any, Any]] = [
        (f.name, places[f.name], dataclasses.field(default=first.get(f.name, names[0])))
        for f in dataclasses.fields(options)
        if names and f.name in places
    ]
    file = dataclasses.field(default="")
    made = dataclasses.make_dataclass(
        "Options", [*fields, ("config", str, file)], bases=(options,), frozen=True
    )
    made.__doc__ = text
    return made
