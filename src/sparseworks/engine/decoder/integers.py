"""Quantized matrices as a decoder takes them: the integers that the model records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparseworks.kernels.grids import Grid
from sparseworks.kernels.panels import Format
from sparseworks.models.quantized import Quantized

__all__ = ["Integers", "integers_of"]


@dataclass(frozen=True)
class Integers:
    """A quantized matrix, its rows in the order of the decoder.

    Args:
        grid: codes, scales and zeros.
        bits: of a code.
    """

    grid: Grid
    bits: int

    def packed_as(self) -> tuple[Format, Grid] | None:
        """The format whose groups hold these very integers, and they in its groups; None: none."""
        if self.grid.zero is None and self.bits > 4:
            return _with(Format.INT8, self.grid)
        if self.bits > 4:
            return None  # the decoder has no zero points for bytes
        plain = self.grid.zero is None and bool((self.grid.scale != 0).all())
        return (_with(Format.INT4, self.grid) if plain else None) or _with(
            Format.GROUP_INT4, self.grid
        )


def _with(format: Format, grid: Grid) -> tuple[Format, Grid] | None:
    finer = grid.finer(format.group)
    return None if finer is None else (format, finer)


def integers_of(
    record: Mapping[str, Quantized],
    modules: Mapping[str, Any],
    joined: Callable[[list[Tensor]], Tensor],
) -> Callable[[], Integers] | None:
    """What the weights of some layers were quantized to, where all were, in the same way.

    Args:
        record: of the model.
        modules: name -> layer.
        joined: rows of all layers in the order of the decoder.
    """
    found = [record.get(f"{name}.weight") for name in modules]
    if any(q is None or not q.holds(m.weight) for q, m in zip(found, modules.values())):
        return None
    given = [q for q in found if q is not None]
    if len({(q.bits, q.group, q.grid.zero is None) for q in given}) > 1:
        return None
    group = given[0].group

    def make() -> Integers:
        codes = joined([q.grid.codes.flatten(1) for q in given])
        zeros = [q.grid.zero for q in given if q.grid.zero is not None]
        zero = joined(zeros) if zeros else None
        scale = joined([q.grid.scale for q in given])
        return Integers(Grid(codes.view(codes.shape[0], -1, group), scale, zero), given[0].bits)

    return make
