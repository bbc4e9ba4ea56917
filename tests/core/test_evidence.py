"""Streaming evidence equals the formula on all inputs at once, however they are cut."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseworks.core.evidence import Hessian, InputMoments, InputNorm


@given(st.lists(st.integers(0, 7), min_size=1, max_size=5), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_streams_equal_formulas(cuts, seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(n, 5, generator=generator) * 3 + 1 for n in cuts]
    x = torch.cat(parts)
    norm, moments, hessian = (kind(2, 5) for kind in (InputNorm, InputMoments, Hessian))
    for collector in (norm, moments, hessian):
        for part in parts:
            collector.update(part, 1)
        collector.samples = 4
        assert collector.unseen_groups() == ([0] if len(x) else [0, 1])
    torch.testing.assert_close(norm.norm[1], (x.square().sum(0) / 4).sqrt())
    torch.testing.assert_close(hessian.hessian(1), 2 / 4 * x.t() @ x, rtol=1e-4, atol=1e-4)
    if len(x):
        torch.testing.assert_close(moments.mean[1], x.mean(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            moments.variance[1], x.var(0, unbiased=False), rtol=1e-3, atol=1e-4
        )


def test_a_hessian_of_several_bands_is_whole_and_symmetric():
    g = torch.Generator().manual_seed(0)
    rows = [torch.randn(6, 2100, generator=g) for _ in range(3)]
    hessian = Hessian(1, 2100)
    for part in rows:
        hessian.samples += 1
        hessian.update(part, 0)
    found, every = hessian.hessian(0), torch.cat(rows).double()
    torch.testing.assert_close(found.double(), every.t() @ every * 2 / 3, rtol=1e-4, atol=1e-4)
    assert torch.equal(found, found.t())
