"""Evaluation mode, or hooks, for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["evaluating", "hooked"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; every module's own afterwards."""
    training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was


@contextmanager
def hooked(hooks: Iterable[Any]) -> Iterator[None]:
    """Take hooks off in the end.

    Args:
        hooks: their handles, from a generator that puts one on at a time, so that none stays when
            the next one fails.
    """
    handles: list[Any] = []
    try:
        for handle in hooks:
            handles.append(handle)
        yield
    finally:
        for handle in handles:
            handle.remove()
