"""`name=value` on the command line, for options of methods, optimizers and models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sparseworks.core.errors import InvalidArgument

__all__ = ["parse_options"]


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """`name=value` pairs, values as JSON where they are, objects of `file.py:name`, else text."""
    from sparseworks.diagnostics.metrics import load_object

    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise InvalidArgument(f"{pair!r}: use name=value")
        try:
            options[name] = json.loads(text)
        except json.JSONDecodeError:
            options[name] = load_object(text) if ".py:" in text else text
    return options
