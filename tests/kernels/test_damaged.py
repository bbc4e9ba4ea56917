"""A packed matrix whose parts do not fit together cannot be made, copied or unpickled."""

from __future__ import annotations

import copy
import io
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseworks.core.errors import InvalidArgument
from sparseworks.kernels import (
    pack_blocks,
    pack_index,
    pack_integer,
    pack_mask,
    pack_nm,
    unpack,
    unpack_blocks,
    unpack_nm,
)

LAWS = settings(max_examples=40, deadline=None)
PACKERS = {
    "masked": (pack_mask, unpack),
    "indexed": (pack_index, unpack),
    "integer": (pack_integer, unpack),
    "block": (pack_blocks, unpack_blocks),
    "nm": (lambda w: pack_nm(w, pattern=(8, 8)), unpack_nm),
}
rows, columns = st.integers(1, 40), st.integers(1, 150)


def packed(layout: str, rows: int, columns: int) -> object:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))
    weight[weight.abs() < 0.5] = 0
    weight[0, 0] = 1
    return PACKERS[layout][0](weight)


def tensors(matrix: object) -> dict[str, Tensor]:
    found = {f.name: getattr(matrix, f.name) for f in fields(matrix)}
    return {n: t for n, t in found.items() if isinstance(t, Tensor)}


def reloaded(matrix: object) -> object:
    """Through a pickle (torch's own, as plain ones do not hold unsigned tensors)."""
    file = io.BytesIO()
    torch.save(matrix, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def refused(matrix: object, part: str, damaged: Tensor) -> None:
    """By hand, and where a sound one was damaged in memory, by copies and pickles of it."""
    with pytest.raises(InvalidArgument, match=f"{type(matrix).__name__}.*{part}.*pack"):
        replace(matrix, **{part: damaged})
    twin = copy.deepcopy(matrix)
    object.__setattr__(twin, part, damaged)
    for way in (copy.deepcopy, reloaded):
        with pytest.raises(InvalidArgument, match=part):
            way(twin)


@pytest.mark.parametrize("layout", PACKERS)
@LAWS
@given(rows=rows, columns=columns)
def test_copies_and_pickles_of_sound_ones_are_the_same(layout, rows, columns):
    matrix, unpacked = packed(layout, rows, columns), PACKERS[layout][1]
    for twin in (copy.deepcopy(matrix), reloaded(matrix)):
        assert torch.equal(unpacked(twin), unpacked(matrix))


@pytest.mark.parametrize("layout", PACKERS)
@LAWS
@given(rows=rows, columns=columns)
def test_every_part_has_its_dtype_and_shape(layout, rows, columns):
    matrix = packed(layout, rows, columns)
    for part, tensor in tensors(matrix).items():
        if part != "start":
            refused(matrix, part, tensor[:-1].clone())
        refused(matrix, part, tensor[None])
        refused(matrix, part, tensor.view(torch.uint8))


@pytest.mark.parametrize("layout", ["masked", "indexed", "integer", "block"])
@LAWS
@given(
    rows=rows, columns=columns, at=st.integers(0, 40),
    by=st.sampled_from([-(1 << 40), -(1 << 12), 1 << 12, 1 << 40]),
)  # fmt: skip
def test_offsets_stay_within_the_values(layout, rows, columns, at, by):
    matrix = packed(layout, rows, columns)
    start = matrix.start.clone()
    start[at % len(start)] += by
    with pytest.raises(InvalidArgument, match=r"start"):
        replace(matrix, start=start)


@pytest.mark.parametrize("layout", ["masked", "integer"])
@LAWS
@given(rows=rows, columns=columns, seed=st.integers(0, 99))
def test_masks_have_as_many_bits_as_there_are_values(layout, rows, columns, seed):
    """Whichever bit changes, a column's or one past the last."""
    matrix = packed(layout, rows, columns)
    raw = matrix.mask.clone().view(torch.uint8)
    place = int(torch.randint(raw.numel(), (), generator=torch.Generator().manual_seed(seed)))
    raw.view(-1)[place] ^= 1 << seed % 8
    refused(matrix, "mask", raw.view(matrix.mask.dtype))


@pytest.mark.parametrize("layout", ["masked", "integer"])
def test_masks_have_no_bits_past_the_last_column(layout):
    """As many as there are values, but one of them past the end."""
    matrix = packed(layout, 3, 5)
    raw = matrix.mask.clone().view(torch.uint8)
    raw[0, 0] &= 0xFE
    raw[0, 0] |= 0x20
    refused(matrix, "mask", raw.view(matrix.mask.dtype))


@pytest.mark.parametrize("layout", ["indexed", "block"])
def test_columns_are_those_of_the_matrix(layout):
    matrix = packed(layout, 40, 150)
    column = matrix.column.clone()
    column[-1] = 150
    refused(matrix, "column", column)


def test_positions_are_those_of_a_group():
    matrix = packed("nm", 20, 16)
    position = matrix.position.clone()
    position.view(torch.int32)[-1, -1, -1, -1] |= 0x80
    refused(matrix, "position", position)
