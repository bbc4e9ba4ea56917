"""Patterns from their short forms."""

from __future__ import annotations

import re

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.patterns.base import Pattern
from sparseworks.core.patterns.groups import Block, Group
from sparseworks.core.patterns.shared import SharedInputs
from sparseworks.core.patterns.weights import NM, Banded, Unstructured

__all__ = ["parse_pattern"]

_GRAMMAR = (
    (r"unstructured|tensor", lambda _: Unstructured("tensor")),
    (r"row", lambda _: Unstructured("row")),
    (r"(\d+):(\d+)", lambda g: NM(int(g[1]), int(g[2]))),
    (r"block(\d+)x(\d+)", lambda g: Block(int(g[1]), int(g[2]))),
    (r"block(\d+)", lambda g: Block(int(g[1]), int(g[1]))),
    (r"(?:rows|channels)(\d*)", lambda g: Group("rows", int(g[1] or 1))),
    (r"columns(\d*)", lambda g: Group("columns", int(g[1] or 1))),
    (r"shared(\d+)(-balanced)?", lambda g: SharedInputs(int(g[1]), g[2] is not None)),
    (r"band(\d+)", lambda g: Banded(int(g[1]))),
)


def parse_pattern(pattern: str | Pattern) -> Pattern:
    """A pattern from its short form; `str(pattern)` gives it back.

    "unstructured", "row" (unstructured, per row), "2:4", "block16x16", "rows", "rows64",
    "channels", "columns", "columns64", "shared4", "shared4-balanced", "band3".

    Raises:
        InvalidArgument: the text is none of these.
    """
    if isinstance(pattern, Pattern):
        return pattern
    for expression, build in _GRAMMAR:
        if found := re.fullmatch(expression, str(pattern).strip().lower()):
            return build(found)
    raise InvalidArgument(
        f"unknown pattern {pattern!r}; use 'unstructured', 'row', 'N:M', 'blockHxW', 'rows[S]', "
        "'columns[S]', 'shared[G]' or 'band[W]'"
    )
