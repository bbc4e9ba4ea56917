"""Laws of the pattern whose groups of rows share their columns, against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.patterns import Block, SharedInputs, parse_pattern


def sums(values: torch.Tensor, size: int) -> list[list[float]]:
    """Group sums, in fp32 row by row as they are added up."""
    return [
        [float(c) for c in values[i : i + size].float().sum(0)] for i in range(0, len(values), size)
    ]


@st.composite
def cases(draw):
    rows, columns, size = draw(st.integers(1, 9)), draw(st.integers(1, 7)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randint(-8, 9, (rows, columns), generator=generator).float()
    groups = -(-rows // size)
    return values, size, groups, draw(st.integers(0, groups * columns))


@given(cases())
@settings(max_examples=200, deadline=None)
def test_equals_brute_force(case):
    values, size, groups, keep = case
    pattern = SharedInputs(size)
    assert pattern.units(values.shape) == groups * values.shape[1]
    units = [(-s, g, c) for g, row in enumerate(sums(values, size)) for c, s in enumerate(row)]
    chosen = {(g, c) for _, g, c in sorted(units)[:keep]}
    mask = pattern.select(values, keep)
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            assert bool(mask[row, column]) == ((row // size, column) in chosen)


@given(cases())
@settings(max_examples=200, deadline=None)
def test_balanced_groups_differ_by_at_most_one_and_keep_their_best(case):
    values, size, groups, keep = case
    mask = SharedInputs(size, balanced=True).select(values, keep)
    table = sums(values, size)
    counts, retained = [], 0.0
    for g in range(groups):
        kept = mask[g * size]
        assert bool((mask[g * size : (g + 1) * size] == kept).all())
        counts.append(int(kept.sum()))
        mine = sum(table[g][c] for c in kept.nonzero().flatten().tolist())
        assert mine == sum(sorted(table[g], reverse=True)[: counts[-1]])
        retained += mine
    assert sum(counts) == keep and max(counts) - min(counts) <= 1
    each, rest = divmod(keep, groups)
    base = sum(sum(sorted(row, reverse=True)[:each]) for row in table)
    extra = sorted((sorted(row, reverse=True)[each] for row in table), reverse=True) if rest else []
    assert retained == base + sum(extra[:rest])


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 999))
def test_equals_blocks_where_rows_divide(size, groups, seed):
    values = torch.randn(size * groups, 5, generator=torch.Generator().manual_seed(seed))
    keep = seed % (groups * 5 + 1)
    assert torch.equal(SharedInputs(size).select(values, keep), Block(size, 1).select(values, keep))


@pytest.mark.parametrize("text", ["shared4", "shared8-balanced"])
def test_short_forms_round_trip(text):
    assert str(parse_pattern(text)) == text


def test_refused():
    with pytest.raises(InvalidArgument, match="at least 1 row"):
        parse_pattern("shared0")
    values = torch.ones(4, 2)
    values[0] = -torch.inf
    with pytest.raises(InvalidArgument):
        SharedInputs(2, balanced=True).select(values, 3)
