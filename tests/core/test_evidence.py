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
