"""Axes of views, as the rules of attention speak of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy

from sparseworks.engine.views import Run

__all__ = ["Dim", "one_run", "renamed", "size_of"]

Dim = tuple[Run, ...]


def one_run(axis: str, size: int, step: int = 1) -> Dim:
    return () if size == 1 else (Run(axis, sympy.Integer(size), step),)


def renamed(dim: Dim, axis: str) -> Dim:
    return tuple(replace(run, axis=axis) for run in dim)


def size_of(dim: Dim) -> Any:
    return dim[0].size if dim else sympy.Integer(1)
