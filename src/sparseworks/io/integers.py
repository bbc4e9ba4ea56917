"""Layout "grid": weights as integers in groups, as `models.quantized` knows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from sparseworks.core.masks import MaskEntry, pack_bits, unpack_bits
from sparseworks.io.bits import count_true
from sparseworks.io.records import Record
from sparseworks.kernels.grids import Grid
from sparseworks.models.matrix import Layout
from sparseworks.models.quantized import Quantized

__all__ = ["grid_parts", "grid_record", "pack_integers", "read_grid", "unpack_integers"]


def pack_integers(values: Tensor, bits: int) -> Tensor:
    """uint8: integers in [-2^(bits - 1), 2^(bits - 1)), one after the other, lowest bit first."""
    moved = values.reshape(-1, 1).to(torch.int16) + (1 << (bits - 1))
    return pack_bits((moved >> torch.arange(bits, dtype=torch.int16) & 1).bool())


def unpack_integers(packed: Tensor, count: int, bits: int) -> Tensor:
    """int8, the inverse of `pack_integers`."""
    flags = unpack_bits(packed, (count, bits)).to(torch.int16)
    moved = (flags << torch.arange(bits, dtype=torch.int16)).sum(1, dtype=torch.int16)
    return (moved - (1 << (bits - 1))).to(torch.int8)


def grid_record(
    base: Record, tensor: Tensor, given: Quantized, entry: MaskEntry | None
) -> Record | None:
    """The record of a tensor that is what its integers say, or None where it is something else."""
    if not given.holds(tensor):
        return None
    made = replace(
        base, layout="grid", stored=given.groups * given.group, bits=given.bits, group=given.group,
        zeros=given.grid.zero is not None, order=given.layout,
    )  # fmt: skip
    if entry is not None and made.mask == "own" and torch.equal(entry.mask, given.mask()):
        made = replace(made, mask="stored")
    return made


def grid_parts(record: Record, given: Quantized) -> Iterator[tuple[str, Tensor]]:
    """(part, values), in the order of `Record.parts`."""
    grid = given.grid
    live = torch.ones(grid.scale.shape, dtype=torch.bool) if given.live is None else given.live
    yield "integers", pack_integers(grid.codes[live], record.bits)
    yield "scales", grid.scale[live]
    if grid.zero is not None:
        yield "zeros", pack_integers(grid.zero[live], record.bits)
    if record.stored < record.numel:
        yield "live", pack_bits(live)


def read_grid(record: Record, part: Callable[[str], Tensor]) -> Quantized | None:
    """The integers of a record whose parts are there; None where the flags contradict it."""
    total, group = record.numel // record.group, record.group
    kept = record.stored // group
    live = torch.ones(total, dtype=torch.bool)
    if kept < total:
        live = unpack_bits(part("live"), (total,))
        if count_true(live) != kept:
            return None
    codes = torch.zeros(total, group, dtype=torch.int8)
    codes[live] = unpack_integers(part("integers"), kept * group, record.bits).view(-1, group)
    scale = torch.zeros(total, dtype=torch.float16)
    scale[live] = part("scales")
    zero = None
    if record.zeros:
        zero = torch.zeros(total, dtype=torch.int8)
        zero[live] = unpack_integers(part("zeros"), kept, record.bits)
    rows = record.rows
    grid = Grid(
        codes.view(rows, -1, group), scale.view(rows, -1),
        None if zero is None else zero.view(rows, -1),
    )  # fmt: skip
    flags = live.view(rows, -1) if kept < total else None
    return Quantized(grid, record.bits, flags, record.shape, cast(Layout, record.order))
