"""Views of a tokens value: through what of it each axis of a tensor runs.

Reshaping, permuting and selecting axes move nothing in a program; an operation that needs its
operands in an order of its own, as attention does, looks at what they are views of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import Tensor

__all__ = ["Run", "View", "base_view", "image_view", "expression", "merged"]


@dataclass(frozen=True)
class Run:
    """A run through one axis of the value.

    Args:
        axis: "b" of entries, and "w" within them where they are split, "s" of tokens, "c" of
            channels; of scores "h" of heads, "i" and "j" of positions.
        size: a number, or an expression of the sizes that may change.
        step: channels from one to the next.
    """

    axis: str
    size: sympy.Expr
    step: int = 1


@dataclass(frozen=True)
class View:
    """Of each axis the runs that it consists of, the slowest first; axes of size 1 have none.

    Args:
        dims: by axis.
        first: channel.
    """

    dims: tuple[tuple[Run, ...], ...]
    first: int = 0

    def sizes(self) -> list[sympy.Expr]:
        """Of the axes."""
        return [math.prod((run.size for run in dim), start=sympy.Integer(1)) for dim in self.dims]

    def channels(self) -> Tensor:
        """The channel at each place of the axes that run through channels; others have size 1."""
        found = torch.full((1,) * len(self.dims), self.first)
        for axis, dim in enumerate(self.dims):
            own = torch.zeros(1, dtype=torch.long)
            for run in dim:
                if run.axis == "c":
                    own = (own[:, None] + torch.arange(int(run.size)) * run.step).flatten()
            found = found + own.view(-1, *(1,) * (len(self.dims) - axis - 1))
        return found

    def covers(self, channels: int) -> bool:
        """Whether all channels are seen, each once."""
        return self.channels().flatten().sort().values.tolist() == list(range(channels))

    def permuted(self, order: Sequence[int]) -> View:
        return replace(self, dims=tuple(self.dims[a % len(self.dims)] for a in order))

    def unsqueezed(self, axis: int) -> View:
        at = axis % (len(self.dims) + 1)
        return replace(self, dims=(*self.dims[:at], (), *self.dims[at:]))

    def squeezed(self, axis: int) -> View | None:
        at = axis % len(self.dims)
        return None if self.dims[at] else replace(self, dims=self.dims[:at] + self.dims[at + 1 :])

    def narrowed(self, axis: int, first: int, count: int) -> View | None:
        """A part of an axis of channels."""
        at = axis % len(self.dims)
        if len(self.dims[at]) != 1 or self.dims[at][0].axis != "c":
            return None
        (run,) = self.dims[at]
        kept = (replace(run, size=sympy.Integer(count)),) if count != 1 else ()
        dims = (*self.dims[:at], kept, *self.dims[at + 1 :])
        return View(dims, self.first + first * run.step)

    def selected(self, axis: int, index: int) -> View | None:
        """One of an axis of channels, without the axis."""
        one = self.narrowed(axis, index, 1) if index >= 0 else None
        return None if one is None else one.squeezed(axis)

    def regrouped(self, sizes: Sequence[Any]) -> View | None:
        """The same elements in axes of other sizes, as reshape makes them."""
        left = [run for dim in self.dims for run in dim]
        dims = []
        for size in sizes:
            dim: list[Run] = []
            missing = expression(size)
            while missing != 1:
                if not left:
                    return None
                run = left[0]
                share = sympy.cancel(missing / run.size)
                if sympy.denom(share) == 1:
                    dim.append(left.pop(0))
                    missing = share
                    continue
                if run.axis == "b" and sympy.cancel(run.size / missing).is_Integer:
                    dim.append(replace(run, size=missing))  # windows of an entry, say
                    left[0] = Run("w", sympy.cancel(run.size / missing))
                    missing = sympy.Integer(1)
                    continue
                if run.axis not in "ch" or not missing.is_Integer or int(run.size) % int(missing):
                    return None
                inner = int(run.size) // int(missing)
                dim.append(Run(run.axis, missing, run.step * inner))
                left[0] = Run(run.axis, sympy.Integer(inner), run.step)
                missing = sympy.Integer(1)
            dims.append(merged(dim))
        return None if left else replace(self, dims=tuple(dims))

    def whole(self, channels: int) -> bool:
        """Whether the last axis is all channels, in order."""
        others = [run.axis for dim in self.dims[:-1] for run in dim]
        return self.first == 0 and self == self.of(channels) and "c" not in others

    def of(self, channels: int, axis: int = -1) -> View:
        """The same with another number of channels in the last axis, or another one."""
        at = axis % len(self.dims)
        own = () if channels == 1 else (Run("c", sympy.Integer(channels)),)
        return replace(self, dims=(*self.dims[:at], own, *self.dims[at + 1 :]))


def base_view(shape: Sequence[Any]) -> View:
    """Of a value itself: `[entries, tokens, channels]`, or `[tokens, channels]`."""
    axes = "bsc"[-len(shape) :]
    sizes = [expression(n) for n in shape]
    return View(tuple(() if n == 1 else (Run(a, n),) for a, n in zip(axes, sizes, strict=True)))


def image_view(shape: Sequence[Any]) -> View | None:
    """Of an image `[entries, channels, height, width]` itself, where its sizes are known."""
    if len(shape) != 4 or not all(isinstance(n, int) for n in shape[1:]):
        return None
    entries, channels, height, width = (expression(n) for n in shape)
    runs = [Run("b", entries), Run("c", channels), Run("s", height, int(width)), Run("s", width)]
    return View(tuple(() if run.size == 1 else (run,) for run in runs))


def expression(size: Any) -> sympy.Expr:
    """A number, or the expression of a size that may change."""
    if isinstance(size, torch.SymInt):
        return size.node.expr
    return sympy.sympify(size)


def merged(dim: Sequence[Run]) -> tuple[Run, ...]:
    """Runs that continue each other as one."""
    found: list[Run] = []
    for run in dim:
        before = found[-1] if found else Run("", run.size)
        if (before.axis, run.axis) == ("b", "w"):
            found[-1] = Run("b", before.size * run.size)
            continue
        both = before.axis == run.axis and run.axis in "ch"
        if both and before.step == run.step * int(run.size):
            found[-1] = Run(run.axis, before.size * run.size, run.step)
        else:
            found.append(run)
    return tuple(found)
