"""From a tensor to the parts of the smallest layout, a slice at a time.

Everything here works on the bits of the weights: only a weight whose bits are all zero is left
out, so -0.0, NaN payloads and denormals come back as they were, in every dtype. Where the signs of
zeros are not wanted, every slice is rid of them before it is counted or stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparseworks.core.errors import ModelError
from sparseworks.core.masks import MaskEntry, pack_bits, unpack_bits
from sparseworks.io.bits import (
    WORDS,
    count_true,
    has_signed_zero,
    top_bit,
    without_signed_zeros,
    words,
)
from sparseworks.io.codes import mask_to_codes, n_of_m
from sparseworks.io.integers import grid_parts, grid_records
from sparseworks.io.records import Record, dtype_name
from sparseworks.models.quantized import Quantized

__all__ = ["SLICE", "Plan", "encode", "plan"]

SLICE = 1 << 22  # weights treated at a time; a multiple of 8
_PART_OVERHEAD = 128  # bytes of header that one more part costs, about


@dataclass(frozen=True)
class Plan:
    """How a tensor will be stored, decided before anything is written."""

    record: Record
    tensor: Tensor
    entry: MaskEntry | None = None
    signed_zeros: bool = True
    integers: Quantized | None = None

    def flat(self) -> Tensor:
        """The weights in stored order (a copy when the tensor is not contiguous)."""
        t = self.tensor.detach()
        return (t.movedim(self.record.axis, -1) if self.record.moved else t).reshape(-1)


@dataclass(frozen=True)
class _Counts:
    """Of the weights of a tensor, inside and outside its mask."""

    inside: int = 0  # kept by the mask
    inside_values: int = 0  # of these, neither +0.0 nor -0.0
    inside_negative: int = 0  # of these, -0.0
    outside_values: int = 0
    outside_negative: int = 0


def _slice(flat: Tensor, start: int, count: int, signed_zeros: bool) -> Tensor:
    """`count` weights on the CPU, as they are stored."""
    values = flat[start : start + count].cpu().contiguous()
    return values if signed_zeros else without_signed_zeros(values)


def _count(flat: Tensor, entry: MaskEntry | None, signed_zeros: bool) -> _Counts:
    inside = inside_values = inside_negative = values = negative = 0
    for start in range(0, flat.numel(), SLICE):
        bits = words(_slice(flat, start, SLICE, signed_zeros))
        is_negative = bits == top_bit(flat.dtype)
        is_value = (bits != 0) & ~is_negative
        values, negative = values + count_true(is_value), negative + count_true(is_negative)
        if entry is not None:
            kept = unpack_bits(entry.packed[start // 8 : (start + SLICE) // 8], bits.shape)
            inside += count_true(kept)
            inside_values += count_true(kept & is_value)
            inside_negative += count_true(kept & is_negative)
    return _Counts(
        inside, inside_values, inside_negative, values - inside_values, negative - inside_negative
    )


def plan(
    name: str,
    tensor: Tensor,
    entry: MaskEntry | None = None,
    names: tuple[str, ...] = (),
    signed_zeros: bool = True,
    integers: Quantized | None = None,
) -> Plan:
    """Choose the layout that takes the fewest bytes; in a tie the one that says most.

    Args:
        name: for errors.
        tensor: any shape, dtype, device and strides.
        entry: its mask, when it has one.
        names: what the mask record calls the tensor.
        signed_zeros: False: every -0.0 is stored as +0.0.
        integers: of a quantized weight; they count where the tensor is what they say.
    """
    shape, n = tuple(tensor.shape), tensor.numel()
    if entry is not None and entry.shape != shape:
        raise ModelError(f"{name}: the mask has shape {list(entry.shape)}, not {list(shape)}")
    base = Record(dtype_name(tensor.dtype), shape)
    if entry is not None:
        mask = "full" if entry.kept == n else "own"
        base = replace(base, kept=entry.kept, pattern=entry.pattern, names=names, mask=mask)
    if tensor.dtype.itemsize not in WORDS or tensor.dtype == torch.complex32:
        return Plan(
            replace(base, stored=n, nonzero=int((tensor != 0).sum())), tensor, entry, signed_zeros
        )
    c = _count(tensor.detach().reshape(-1), entry, signed_zeros)
    values, negative = c.inside_values + c.outside_values, c.inside_negative + c.outside_negative
    zeros_negative = has_signed_zero(tensor.dtype)  # else these bits are another number
    base = replace(base, nonzero=values + (0 if zeros_negative else negative), kept=c.inside)
    candidates = [] if integers is None else grid_records(base, tensor, integers, entry)
    if entry is not None and c.outside_values == 0:
        masked = replace(
            base, layout="bitmask", mask="stored", stored=c.inside, signs=c.outside_negative > 0
        )
        candidates += [*_as_nm(masked, entry), masked]
    candidates += [
        replace(base, stored=n),
        replace(base, layout="bitmask", stored=values + negative),
        replace(base, layout="bitmask", stored=values, signs=negative > 0),
    ]
    best = min(candidates, key=lambda r: r.nbytes + _PART_OVERHEAD * (len(r.parts()) - 1))
    return Plan(best, tensor, entry, signed_zeros, integers if best.layout == "grid" else None)


def _as_nm(record: Record, entry: MaskEntry) -> list[Record]:
    """The N:M record of a mask that keeps exactly n of every m, along its last or second axis."""
    n, m = n_of_m(entry.pattern)
    if not n or entry.shape == () or record.stored == 0 or record.kept * m != n * record.numel:
        return []
    for axis in dict.fromkeys((len(entry.shape) - 1, min(1, len(entry.shape) - 1))):
        nm = replace(record, layout="nm", n=n, m=m, axis=axis)
        if entry.shape[axis] % m == 0 and all(
            mask_to_codes(part, n, m) is not None for part in _mask_slices(nm, entry)
        ):
            return [nm]
    return []


def _mask_slices(record: Record, entry: MaskEntry) -> Iterator[Tensor]:
    """The mask of an N:M tensor in stored order, in slices of whole runs and whole bytes."""
    step = SLICE // (8 * record.m) * 8 * record.m
    moved = entry.mask.movedim(record.axis, -1).reshape(-1) if record.moved else None
    for start in range(0, record.numel, step):
        if moved is not None:
            yield moved[start : start + step]
        else:
            packed = entry.packed[start // 8 : (start + step) // 8]
            yield unpack_bits(packed, (min(step, record.numel - start),))


class _Bits:
    """Bits that arrive in pieces of any length, packed."""

    def __init__(self) -> None:
        self._done: list[Tensor] = []
        self._rest = torch.zeros(0, dtype=torch.bool)

    def add(self, bits: Tensor) -> None:
        bits = torch.cat([self._rest, bits])
        whole = bits.numel() // 8 * 8
        self._done.append(pack_bits(bits[:whole]))
        self._rest = bits[whole:].clone()

    def packed(self) -> Tensor:
        return torch.cat([*self._done, pack_bits(self._rest)])


def encode(plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """(part, bytes that come next in it): the values in slices, then every other part whole.

    The order is that of `Record.parts`, which is also the order of the hash.
    """
    record, flat, entry = plan.record, plan.flat(), plan.entry
    if record.layout == "dense":
        for start in range(0, flat.numel(), SLICE):
            yield "", _slice(flat, start, SLICE, plan.signed_zeros)
    elif record.layout == "grid":
        assert plan.integers is not None
        yield from grid_parts(record, plan.integers, entry)
    else:
        chosen, signs = _Bits(), _Bits()
        codes = []
        for values, stored in _stored_slices(plan, flat):
            if record.layout == "bitmask":
                chosen.add(stored)
            else:
                code = mask_to_codes(stored, record.n, record.m)
                assert code is not None, "checked by the plan"
                codes.append(code)
            if record.signs:
                signs.add(words(values)[~stored] != 0)
            yield "values", words(values)[stored].view(values.dtype)
        if record.layout == "bitmask":
            yield "bitmask", chosen.packed()
        else:
            yield "codes", torch.cat(codes)
        if record.signs:
            yield "signs", signs.packed()
    if record.mask == "own":
        assert entry is not None
        packed = entry.packed.clone()
        if record.numel % 8:
            packed[-1] &= (1 << record.numel % 8) - 1
        yield "mask", packed


def _stored_slices(plan: Plan, flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(weights, bool: stored) slice by slice."""
    record, entry = plan.record, plan.entry
    if record.layout == "nm":
        assert entry is not None
        start = 0
        for stored in _mask_slices(record, entry):
            yield _slice(flat, start, stored.numel(), plan.signed_zeros), stored
            start += stored.numel()
        return
    for start in range(0, flat.numel(), SLICE):
        values = _slice(flat, start, SLICE, plan.signed_zeros)
        if record.mask == "stored":
            assert entry is not None
            stored = unpack_bits(entry.packed[start // 8 : (start + SLICE) // 8], values.shape)
        else:
            bits = words(values)
            stored = bits != 0
            if record.signs:
                stored &= bits != top_bit(flat.dtype)
        yield values, stored
