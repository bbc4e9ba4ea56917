"""Parts of a one-shot method said in text: "name" or "name:option=value,...", values as JSON."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from sparseworks.core.errors import InvalidArgument

__all__ = ["made", "text_of"]

_PACKAGE = "sparseworks.weights.oneshot"


def made(kind: str, text: str, named: Mapping[str, str]) -> Any:
    """The part that a text says, or None where no part has its name.

    Args:
        kind: of part, for errors ("budget").
        text: name and options.
        named: name -> "module:Class" below this package; the classes are dataclasses.

    Raises:
        InvalidArgument: an option that the part does not have, or cannot take.
    """
    name, _, told = text.partition(":")
    if name not in named:
        return None
    module, _, attribute = named[name].partition(":")
    cls = getattr(importlib.import_module(f"{_PACKAGE}.{module}"), attribute)
    known = [f.name for f in fields(cls)]
    options = {}
    for pair in filter(None, told.split(",")):
        option, equals, value = pair.partition("=")
        if not equals or option not in known:
            raise InvalidArgument(
                f"{kind} {text!r}: use {name}:option=value,...; it has {', '.join(known)}"
            )
        try:
            options[option] = json.loads(value)
        except json.JSONDecodeError:
            options[option] = value
    try:
        return cls(**options)
    except TypeError as error:
        raise InvalidArgument(f"{kind} {text!r}: {error}") from None


def text_of(name: str, part: Any) -> str:
    """The text that makes a part again: its name, and the options that are not the default."""
    told = [
        f"{f.name}={v if isinstance(v, str) else json.dumps(v)}"
        for f in fields(part)
        if (v := getattr(part, f.name)) != f.default
    ]
    return name + (":" + ",".join(told) if told else "")
