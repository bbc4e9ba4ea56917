"""The elimination of columns against its recursion in fp64, one number at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseworks.core.errors import InvalidArgument
from sparseworks.kernels import instruction_set
from sparseworks.kernels.elimination import eliminate, eliminate_reference


def problem(rows, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    factor = torch.randn(n, n, generator=g).triu(1) / max(1, n) + torch.eye(n)
    factor *= torch.rand(n, 1, generator=g) + 0.5
    mask = torch.rand(rows, n, generator=g) < 0.5
    return torch.randn(rows, n, generator=g), mask, factor


def plainly(values, mask, factor):
    values, factor, total = values.double().clone(), factor.double(), 0.0
    for row, keeps in zip(values, mask):
        for j in range(len(row)):
            new = row[j].clone() if keeps[j] else torch.zeros((), dtype=torch.float64)
            e = (row[j] - new) / factor[j, j]
            row[j + 1 :] -= e * factor[j, j + 1 :]
            row[j] = new
            total += float(e) ** 2
    return values, total


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(1, 70), st.integers(0, 99), st.booleans())
def test_both_are_the_recursion(rows, n, seed, native):
    values, mask, factor = problem(rows, n, seed)
    wanted, total = plainly(values, mask, factor)
    found = (eliminate if native else eliminate_reference)(values, mask, factor)
    assert found == pytest.approx(total, rel=1e-4)
    torch.testing.assert_close(values.double(), wanted, rtol=1e-4, atol=1e-5)
    assert bool((values[~mask] == 0).all())


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512f"])
@pytest.mark.parametrize("rows,n", [(1, 1), (16, 128), (300, 128), (523, 37)])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_path_is_the_reference(isa, rows, n, threads, monkeypatch):
    monkeypatch.setenv("SPARSEWORKS_ISA", isa)
    try:
        instruction_set()
    except InvalidArgument as error:
        pytest.skip(str(error))
    values, mask, factor = problem(rows, n)
    wanted = values.clone()
    total = eliminate_reference(wanted, mask, factor)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert eliminate(values, mask, factor) == pytest.approx(total, rel=1e-4)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(values, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", [True, False])
def test_all_or_nothing_kept(mask):
    values, _, factor = problem(20, 33)
    before = values.clone()
    total = eliminate(values, torch.full(values.shape, mask), factor)
    if mask:
        assert torch.equal(values, before) and total == 0
    else:
        assert not values.any() and total > 0


@pytest.mark.parametrize("made", [torch.Tensor.double, lambda v: v.t().contiguous().t()])
def test_other_tensors_go_the_way_of_the_reference(made):
    values, mask, factor = problem(7, 40)
    wanted, total = plainly(values, mask, factor)
    values = made(values)
    assert eliminate(values, mask, factor.to(values.dtype)) == pytest.approx(total, rel=1e-4)
    torch.testing.assert_close(values.double(), wanted, rtol=1e-4, atol=1e-5)
