"""Laws of `Pattern.select`, against brute force on random tensors with many ties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseworks.core.errors import InvalidArgument, PatternError
from sparseworks.core.patterns import (
    NM,
    Banded,
    Block,
    Group,
    IndexGroups,
    Unstructured,
    check_sparsity,
    count_dropped,
    parse_pattern,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def brute_top(values: list[float], keep: int) -> list[bool]:
    """Keep the largest; ties keep the lowest index."""
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))[:keep]
    return [i in set(order) for i in range(len(values))]


ROWS, COLUMNS = st.integers(1, 7), st.integers(1, 9)


@st.composite
def scores(draw, rows=ROWS, columns=COLUMNS):
    shape = draw(rows), draw(columns)
    dtype = draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    if draw(st.booleans()):  # many ties, signed zeros
        values = torch.randint(-2, 3, shape, generator=generator).float()
        values[values == 0] *= torch.where(torch.rand(shape, generator=generator) < 0.5, -1.0, 1.0)[
            values == 0
        ]
    else:
        values = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-30, 30))
    top = torch.finfo(dtype).max
    return values.double().clamp(-top, top).to(dtype)


@given(scores(), st.data())
@settings(max_examples=200, deadline=None)
def test_unstructured_equals_brute_force(values, data):
    keep = data.draw(st.integers(0, values.numel()))
    mask = Unstructured().select(values, keep)
    assert mask.sum() == keep
    expected = brute_top([v + 0.0 for v in values.float().flatten().tolist()], keep)
    assert mask.flatten().tolist() == expected


@given(scores(), st.data())
@settings(max_examples=200, deadline=None)
def test_rows_equal_brute_force(values, data):
    each = data.draw(st.integers(0, values.shape[1]))
    mask = Unstructured("row").select(values, each * values.shape[0])
    for row, got in zip(values.float().tolist(), mask.tolist()):
        assert got == brute_top(row, each)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_nm_equals_brute_force(data):
    m = data.draw(st.sampled_from([1, 2, 3, 4, 8, 16, 33]))
    n = data.draw(st.integers(1, m))
    values = data.draw(scores(columns=st.integers(1, 4).map(lambda k: k * m)))
    mask = NM(n, m).select(values)
    for row, got in zip(values.float().tolist(), mask.tolist()):
        for start in range(0, len(row), m):
            assert got[start : start + m] == brute_top(row[start : start + m], n)


@pytest.mark.parametrize("m", [2, 3, 4, 8, 16])
def test_nm_of_large_tensors_is_that_of_a_stable_sort(m):
    """Larger than the pieces it is chosen in, the last of them short; few values, so many ties."""
    g = torch.Generator().manual_seed(m)
    values = torch.randint(-2, 3, (3, m * 150_001), generator=g).float()
    order = values.view(-1, m).argsort(dim=1, descending=True, stable=True)
    for n in range(1, m + 1, max(1, m // 4)):
        expected = torch.zeros(order.shape, dtype=torch.bool).scatter_(1, order[:, :n], True)
        assert torch.equal(NM(n, m).select(values), expected.view(values.shape))


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_blocks_equal_brute_force(data):
    h, w = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    values = data.draw(
        scores(st.integers(1, 3).map(lambda k: k * h), st.integers(1, 3).map(lambda k: k * w))
    )
    pattern = Block(h, w)
    keep = data.draw(st.integers(0, pattern.units(values.shape)))
    mask = pattern.select(values, keep)
    pooled = pattern.pool(values)
    kept = brute_top([v + 0.0 for v in pooled.flatten().tolist()], keep)
    for index, alive in enumerate(kept):
        r, c = divmod(index, values.shape[1] // w)
        block = mask[r * h : (r + 1) * h, c * w : (c + 1) * w]
        assert bool(block.all()) if alive else not bool(block.any())
        expected = values[r * h : (r + 1) * h, c * w : (c + 1) * w].double().sum()
        assert math.isclose(pooled[r, c], expected, rel_tol=1e-4, abs_tol=float("1e-4") * float(
            values.abs().max() + 1e-30) * h * w)  # fmt: skip


@given(scores(), st.sampled_from(["rows", "columns"]), st.data())
@settings(max_examples=100, deadline=None)
def test_groups_live_or_die_together(values, axis, data):
    extent = values.shape[0 if axis == "rows" else 1]
    size = data.draw(st.sampled_from([s for s in range(1, extent + 1) if extent % s == 0]))
    pattern = Group(axis, size)
    keep = data.draw(st.integers(0, pattern.units(values.shape)))
    mask = pattern.select(values, keep)
    lines = mask.all(1) if axis == "rows" else mask.all(0)
    assert torch.equal(lines, mask.any(1) if axis == "rows" else mask.any(0))
    assert lines.view(-1, size).all(1).sum() == keep == lines.sum() // size
    pooled = pattern.pool(values).tolist()
    assert lines.view(-1, size)[:, 0].tolist() == brute_top([v + 0.0 for v in pooled], keep)


def test_columns_of_a_convolution_repeat_over_taps():
    pattern = Group("columns", 1, stride=3)
    values = torch.tensor([[1.0, 5, 2, 1, 5, 2], [1, 5, 2, 1, 5, 2]])
    mask = pattern.select(values, 1)
    assert mask.tolist() == [[False, True, False] * 2] * 2


def test_arbitrary_groups():
    labels = torch.tensor([[0, 1, 1], [-1, 0, 2]])
    mask = IndexGroups(labels).select(torch.tensor([[1.0, 5, 5], [0, 1, 3]]), 1)
    assert mask.tolist() == [[False, True, True], [True, False, False]]


@given(scores(), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_band(values, width):
    mask = Banded(width).select(values)
    rows, columns = values.shape
    for r in range(rows):
        for c in range(columns):
            assert bool(mask[r, c]) == (abs(c - r * columns // rows) <= width)


@given(scores(), st.data())
@settings(max_examples=100, deadline=None)
def test_minus_infinity_is_never_kept(values, data):
    banned = torch.rand(values.shape) < 0.5
    values = values.float().masked_fill(banned, -torch.inf)
    eligible = int((~banned).sum())
    keep = data.draw(st.integers(0, values.numel()))
    if keep <= eligible:
        assert not bool((Unstructured().select(values, keep) & banned).any())
    else:
        with pytest.raises(InvalidArgument, match="eligible"):
            Unstructured().select(values, keep)


@pytest.mark.parametrize(
    "pattern", [Unstructured(), Unstructured("row"), NM(1, 2), Block(1, 2), Group("rows")]
)
def test_nan_is_refused(pattern):
    values = torch.tensor([[1.0, float("nan")], [0.0, 1.0]])
    with pytest.raises(InvalidArgument, match="NaN"):
        pattern.select(values, pattern.keep((2, 2), 0.5))


def test_infinite_scores_are_kept_first():
    values = torch.tensor([[1.0, float("inf"), 3e38, -3e38]])
    assert Unstructured().select(values, 2).tolist() == [[False, True, True, False]]


def test_a_row_with_too_few_eligible_scores_is_named():
    values = torch.tensor([[1.0, 2.0], [float("-inf")] * 2])
    with pytest.raises(InvalidArgument, match="row 1"):
        Unstructured("row").select(values, 2)
    with pytest.raises(InvalidArgument, match="eligible"):
        NM(1, 2).select(values)


def test_selection_agrees_with_sort_across_chunks():
    values = torch.randn(5_000_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    keep = 1_234_567
    mask = Unstructured().select(values.view(1000, 5000), keep).flatten()
    order = torch.sort(values.float(), descending=True, stable=True).indices[:keep]
    expected = torch.zeros(values.numel(), dtype=torch.bool)
    expected[order] = True
    assert torch.equal(mask, expected)


@pytest.mark.parametrize(
    "text", ["unstructured", "row", "2:4", "block16x16", "rows", "rows64", "columns", "band3"]
)
def test_short_forms_round_trip(text):
    assert str(parse_pattern(text)) == text


@pytest.mark.parametrize("text", ["", "3", "4:2", "0:4", "block", "block0x4", "diag", "2:4:8"])
def test_bad_short_forms_are_refused(text):
    with pytest.raises(InvalidArgument):
        parse_pattern(text)


def test_patterns_that_do_not_divide_are_refused():
    with pytest.raises(PatternError, match="multiple of 3"):
        NM(2, 3).check((4, 8))
    with pytest.raises(PatternError, match="multiple of 4, not 3"):
        NM(2, 4).check((4, 12), run=3)  # 3 channels at 4 taps: a run may not cross taps
    with pytest.raises(PatternError, match="divisible"):
        Block(4, 4).check((4, 6))


@given(st.integers(0, 10**9), st.integers(0, 99))
def test_dropped_counts_are_exact_in_decimals(units, percent):
    assert count_dropped(units, percent / 100) == units * percent // 100


@pytest.mark.parametrize("value", [1.0, -0.1, 50, float("nan"), "0.5", True])
def test_sparsity_is_a_fraction(value):
    with pytest.raises(InvalidArgument):
        check_sparsity(value)
    if value == 50:
        with pytest.raises(InvalidArgument, match=r"did you mean 0\.5"):
            check_sparsity(value)
