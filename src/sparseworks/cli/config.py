"""`--config FILE`: options of a command from a YAML or JSON file; those of the command line win."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import tyro

from sparseworks.core.errors import InvalidArgument, MissingDependency

__all__ = ["take_config"]

_NOTHING = ("", "null", "~", "None")  # as YAML's files write it: the option's default
_TRUTHS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def take_config(options: type, arguments: Sequence[str], prog: str) -> tuple[Any, list[str]]:
    """Take `--config FILE` out of the arguments.

    Args:
        options: the dataclass of the command.
        arguments: of the command line.
        prog: the name of the command, for messages.

    Returns:
        What the file says, as an object of `options` (None without one), and the other arguments.

    Raises:
        InvalidArgument: the file cannot be read, or names options that the command does not have.
        SystemExit: a value is not of its option's type; tyro has said which.
    """
    for i, argument in enumerate(arguments):
        if argument == "--":
            break
        if argument == "--config" or argument.startswith("--config="):
            inline = argument.partition("=")[2]
            if not inline and i + 1 >= len(arguments):
                raise InvalidArgument("--config needs the name of a YAML or JSON file")
            path = Path(inline or arguments[i + 1])
            rest = [*arguments[:i], *arguments[i + (1 if inline else 2) :]]
            if any(a.partition("=")[0] == "--config" for a in rest):
                raise InvalidArgument("--config is given twice; one file holds all options")
            words = _words(options, _read(path), path)
            return tyro.cli(options, args=words, prog=f"{prog} --config {path}"), rest
    return None, list(arguments)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not a text file"
        raise InvalidArgument(f"{path}: cannot be read ({why})") from None
    values = _yaml(text, path) if path.suffix in (".yaml", ".yml") else _json(text, path)
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InvalidArgument(f"{path}: holds no options; write name: value, one a line")
    return values


def _json(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidArgument(f"{path}: not JSON ({error})") from None


def _yaml(text: str, path: Path) -> Any:
    try:
        import yaml
    except ImportError:
        raise MissingDependency(
            f"{path}: YAML needs pyyaml (pip install pyyaml); JSON needs nothing"
        ) from None
    try:
        # every value as it is written: YAML itself would read 2:4 as 124 (minutes and seconds)
        return yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise InvalidArgument(f"{path}: not YAML ({error})") from None


def _words(options: type, values: Mapping[str, Any], path: Path) -> list[str]:
    """The command line that says the same, so that the file is checked as that is."""
    hints = get_type_hints(options, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(options)}
    given: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; `--help` lists those there are"
            raise InvalidArgument(f"{path}: no option {key!r}{hint}")
        if name in given:
            raise InvalidArgument(f"{path}: option {key!r} stands there twice")
        given[name] = value
    places: list[str] = []
    flags: list[str] = []
    for name in fields:  # positional ones in their order
        value = given.get(name)
        if value is None or value in _NOTHING:
            continue
        if tyro.conf.Positional in getattr(hints[name], "__metadata__", ()):
            places += _texts(value)
            continue
        flag = "--" + name.replace("_", "-")
        if hints[name] is bool:
            flags.append(flag if _truth(value, name, path) else "--no-" + flag[2:])
        elif isinstance(value, list | tuple | dict):
            flags += [flag, *_texts(value)]
        else:
            flags.append(f"{flag}={value}")
    return [*places, *flags]


def _truth(value: Any, name: str, path: Path) -> bool:
    if str(value).lower() not in _TRUTHS:
        raise InvalidArgument(f"{path}: {name}: {value!r} is neither true nor false")
    return _TRUTHS[str(value).lower()]


def _texts(value: Any) -> list[str]:
    """Words of a value: of a mapping name=value, as options of methods are written."""
    if isinstance(value, dict):
        return [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in value.items()]
    return [str(v) for v in (value if isinstance(value, list | tuple) else [value])]
