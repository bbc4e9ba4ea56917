"""The native selection against a stable sort, and against the reference where it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseworks.core.errors import InvalidArgument
from sparseworks.kernels import instruction_set
from sparseworks.kernels.selection import keep_largest, keep_largest_per_row

ODD = [0.0, -0.0, float("inf"), -1e-45, 1e-45, 3.4e38, -3.4e38, 1.0, -1.0]


def by_sort(scores, keep):
    """The first `keep` of a stable descending sort of each row; +0 and -0 are one number."""
    order = torch.sort(scores + 0.0, dim=1, descending=True, stable=True).indices[:, :keep]
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, order, True)


@pytest.fixture(params=["base", "avx2", "avx512f"])
def isa(request, monkeypatch):
    monkeypatch.setenv("SPARSEWORKS_ISA", request.param)
    try:
        return instruction_set()
    except InvalidArgument as error:
        pytest.skip(str(error))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_it_is_a_stable_sort(data):
    rows, columns = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 70))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    scores = torch.randn(rows, columns, generator=g)
    kind = data.draw(st.sampled_from(["all", "ties", "odd", "equal"]))
    if kind == "ties":
        scores = scores.mul(2).round() / 2
    elif kind == "odd":
        scores = torch.tensor(ODD)[torch.randint(len(ODD), (rows, columns), generator=g)]
    elif kind == "equal":
        scores = torch.full_like(scores, -0.0)
    keep = data.draw(st.integers(0, columns))
    assert torch.equal(keep_largest_per_row(scores, keep), by_sort(scores, keep))
    flat = scores.reshape(1, -1)
    keep = data.draw(st.integers(0, flat.numel()))
    assert torch.equal(keep_largest(scores, keep), by_sort(flat, keep).view(scores.shape))


@pytest.mark.parametrize("columns", [1, 15, 2048, 70001])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_path_is_the_sort(isa, columns, threads):
    scores = torch.randn(5, columns, generator=torch.Generator().manual_seed(columns))
    scores[1] = scores[1].bfloat16().float()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for keep in {0, 1, columns // 2, columns}:
            assert torch.equal(keep_largest_per_row(scores, keep), by_sort(scores, keep))
    finally:
        torch.set_num_threads(before)


def test_what_cannot_be_kept_is_refused_with_its_row(isa):
    scores = torch.randn(4, 40)
    scores[2, :30] = -torch.inf
    assert torch.equal(keep_largest_per_row(scores, 10), by_sort(scores, 10))
    with pytest.raises(InvalidArgument, match="row 2 has fewer than 11"):
        keep_largest_per_row(scores, 11)
    with pytest.raises(InvalidArgument, match="only 130 are eligible"):
        keep_largest(scores, 131)
    with pytest.raises(InvalidArgument, match="not between"):
        keep_largest_per_row(scores, 41)
    for nan in (float("nan"), -float("nan")):
        scores[1, 3] = nan
        with pytest.raises(InvalidArgument, match="NaN"):
            keep_largest_per_row(scores, 10)


@pytest.mark.parametrize("made", [torch.Tensor.double, lambda s: s.t().contiguous().t()])
def test_other_tensors_go_the_way_of_the_reference(made):
    scores = torch.randn(6, 9)
    assert torch.equal(keep_largest_per_row(made(scores), 4), by_sort(scores, 4))
