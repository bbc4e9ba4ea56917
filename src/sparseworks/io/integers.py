"""Layout "grid": weights as integers in groups, as `models.quantized` knows them.

Integers of masked weights are their group's zero and need not be stored; a mask inside of groups
then says which are. Without a mask the zeros that rounding made can be left out the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from sparseworks.core.masks import MaskEntry, pack_bits, unpack_bits
from sparseworks.io.bits import count_true
from sparseworks.io.codes import codes_to_mask, mask_to_codes, n_of_m
from sparseworks.io.records import Record
from sparseworks.kernels.grids import Grid
from sparseworks.models.matrix import Layout, as_matrix
from sparseworks.models.quantized import Quantized

__all__ = [
    "grid_parts", "grid_records", "pack_integers", "read_grid", "unpack_integers",
]  # fmt: skip


def pack_integers(values: Tensor, bits: int) -> Tensor:
    """uint8: integers in [-2^(bits - 1), 2^(bits - 1)), one after the other, lowest bit first."""
    moved = values.reshape(-1, 1).to(torch.int16) + (1 << (bits - 1))
    return pack_bits((moved >> torch.arange(bits, dtype=torch.int16) & 1).bool())


def unpack_integers(packed: Tensor, count: int, bits: int) -> Tensor:
    """int8, the inverse of `pack_integers`."""
    flags = unpack_bits(packed, (count, bits)).to(torch.int16)
    moved = (flags << torch.arange(bits, dtype=torch.int16)).sum(1, dtype=torch.int16)
    return (moved - (1 << (bits - 1))).to(torch.int8)


def grid_records(
    base: Record, tensor: Tensor, given: Quantized, entry: MaskEntry | None
) -> list[Record]:
    """The records that a tensor may have which is what its integers say; none where it is not."""
    if not given.holds(tensor):
        return []
    whole = replace(
        base, layout="grid", stored=given.groups * given.group, bits=given.bits, group=given.group,
        zeros=given.grid.zero is not None, order=given.layout,
    )  # fmt: skip
    needed, live = _not_zero(given), _live(given)
    found = [whole, *_with_places(whole, given, needed, "")]
    if entry is not None and whole.mask == "own":
        kept, masked = _matrix(entry, given), replace(whole, mask="stored")
        if torch.equal(kept, live.expand_as(kept)):
            found.append(masked)
        elif not bool((needed & ~kept).any() or (kept & ~live).any()):
            found += _with_places(masked, given, kept, entry.pattern)
    return found


def _with_places(base: Record, given: Quantized, stored: Tensor, pattern: str) -> list[Record]:
    """The records in which these integers `[rows, groups, group]` are stored, and no others."""
    base = replace(base, stored=count_true(stored), groups=given.groups)
    found = [replace(base, places="live")]
    if torch.equal(stored.any(2, keepdim=True), _live(given)):
        found.append(replace(base, places="all"))
        n, m = n_of_m(pattern)
        even = n and base.numel % m == 0 and base.stored == base.numel // m * n
        if even and mask_to_codes(stored.flatten(), n, m) is not None:
            found.append(replace(base, places="nm", n=n, m=m))
    return found


def _live(given: Quantized) -> Tensor:
    """Bool `[rows, groups, 1]`."""
    scale = given.grid.scale
    live = torch.ones(scale.shape, dtype=torch.bool) if given.live is None else given.live
    return live[..., None]


def _not_zero(given: Quantized) -> Tensor:
    """Bool, of the codes' shape: integers that are not the zero of their group."""
    zero = 0 if given.grid.zero is None else given.grid.zero[..., None]
    return (given.grid.codes != zero) & _live(given)


def _matrix(entry: MaskEntry, given: Quantized) -> Tensor:
    """A mask in the order and shape of the codes."""
    return as_matrix(entry.mask, given.layout).reshape(given.grid.codes.shape)


def grid_parts(
    record: Record, given: Quantized, entry: MaskEntry | None
) -> Iterator[tuple[str, Tensor]]:
    """(part, values), in the order of `Record.parts`."""
    grid, live = given.grid, _live(given)
    if not record.places:
        stored = live.expand(grid.codes.shape)
    elif record.mask == "stored":
        assert entry is not None
        stored = _matrix(entry, given)
    else:
        stored = _not_zero(given)
    live = live[..., 0]
    yield "integers", pack_integers(grid.codes[stored], record.bits)
    yield "scales", grid.scale[live]
    if grid.zero is not None:
        yield "zeros", pack_integers(grid.zero[live], record.bits)
    if "live" in record.parts():
        yield "live", pack_bits(live)
    if record.places == "nm":
        codes = mask_to_codes(stored.flatten(), record.n, record.m)
        assert codes is not None, "checked by the plan"
        yield "codes", codes
    elif record.places:
        yield "bitmask", pack_bits(stored[live] if record.places == "live" else stored)


def read_grid(record: Record, part: Callable[[str], Tensor]) -> tuple[Quantized, Tensor] | None:
    """The integers of a record whose parts are there, and a bool matrix of those that are stored;
    None where the parts contradict the record."""
    places = _read_places(record, part)
    if places is None:
        return None
    live, stored = places
    total, rows = live.numel(), record.rows
    zero = torch.zeros(total, dtype=torch.int8)
    if record.zeros:
        zero[live] = unpack_integers(part("zeros"), record.live_groups, record.bits)
    codes = zero[:, None].repeat(1, record.group)
    codes[stored] = unpack_integers(part("integers"), record.stored, record.bits)
    scale = torch.zeros(total, dtype=torch.float16)
    scale[live] = part("scales")
    grid = Grid(
        codes.view(rows, -1, record.group), scale.view(rows, -1),
        zero.view(rows, -1) if record.zeros else None,
    )  # fmt: skip
    flags = live.view(rows, -1) if record.live_groups < total else None
    found = Quantized(grid, record.bits, flags, record.shape, cast(Layout, record.order))
    return found, stored.reshape(rows, -1)


def _read_places(record: Record, part: Callable[[str], Tensor]) -> tuple[Tensor, Tensor] | None:
    """Bool `[groups]`, live, and `[groups, group]`, stored; None as `read_grid`."""
    total, group = record.numel // record.group, record.group
    live = torch.ones(total, dtype=torch.bool)
    if "live" in record.parts():
        live = unpack_bits(part("live"), (total,))
        if count_true(live) != record.live_groups:
            return None
    if record.places == "":
        return live, live[:, None].expand(total, group)
    if record.places == "live":
        stored = torch.zeros(total, group, dtype=torch.bool)
        stored[live] = unpack_bits(part("bitmask"), (record.groups, group))
    else:
        flat = (
            unpack_bits(part("bitmask"), (record.numel,))
            if record.places == "all"
            else codes_to_mask(part("codes"), record.numel // record.m, record.n, record.m)
        )
        if flat is None:
            return None
        stored = flat.view(total, group)
        live = stored.any(1)
    sound = count_true(live) == record.groups and count_true(stored) == record.stored
    return (live, stored) if sound else None
