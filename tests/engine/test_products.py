"""A sparse linear layer agrees with torch for every shape, sparsity, instruction set and number of
threads."""

from __future__ import annotations

import concurrent.futures

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseworks.core.errors import InvalidArgument
from sparseworks.engine.products import SparseLinear
from sparseworks.kernels import available

pytestmark = pytest.mark.skipif(not available(), reason="the native kernels are not built")

SIZES = st.sampled_from([1, 2, 3, 7, 15, 16, 17, 31, 48, 65, 97, 128])


def problem(rows, columns, tokens, density, seed):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=g)
    w *= torch.rand(rows, columns, generator=g) < density
    if rows > 2:
        w[rows // 2] = 0  # an empty row
    return w, torch.randn(tokens, columns, generator=g), torch.randn(rows, generator=g)


@pytest.fixture(params=["avx512", "avx2", "base"])
def isa(request, force_isa):
    force_isa(request.param)


@given(SIZES, SIZES, SIZES, st.sampled_from([0.0, 0.05, 0.3, 1.0]), st.integers(1, 4),
       st.booleans(), st.integers(0, 999))  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_agrees_with_torch(rows, columns, tokens, density, threads, with_bias, seed):
    w, x, b = problem(rows, columns, tokens, density, seed)
    bias = b if with_bias else None
    expected = torch.nn.functional.linear(x.double(), w.double()).float()
    expected = expected + b if with_bias else expected
    layer = SparseLinear(w, bias, threads)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.columns(x.T), expected.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1, 1), (300, 257, 130), (33, 1000, 64), (16, 16, 4096)])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_instruction_set(isa, shape, threads):
    w, x, b = problem(*shape, 0.2, 0)
    wanted = torch.nn.functional.linear(x, w, b)
    torch.testing.assert_close(SparseLinear(w, b, threads)(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(1100, 700, 130), (70, 900, 16), (530, 512, 300)])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_many_blocks_of_columns(isa, shape, threads):
    w, x, b = problem(*shape, 0.1, 0)
    wanted = torch.nn.functional.linear(x, w, b)
    layer = SparseLinear(w, b, threads)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.columns(x.T), wanted.T, rtol=1e-4, atol=1e-4)


def test_concurrent_callers():
    w, x, b = problem(200, 300, 500, 0.2, 0)
    layer, expected = SparseLinear(w, b, 2), torch.nn.functional.linear(x, w, b)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for got in pool.map(lambda _: layer(x), range(60)):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_leading_axes_and_strides():
    w, _, b = problem(10, 12, 1, 0.5, 0)
    x = torch.randn(4, 12, 3).transpose(1, 2)
    expected = torch.nn.functional.linear(x, w, b)
    torch.testing.assert_close(SparseLinear(w, b)(x), expected, rtol=1e-4, atol=1e-5)
    assert SparseLinear(w, None)(torch.randn(0, 12)).shape == (0, 10)
    assert SparseLinear(w, None).columns(torch.randn(12, 0)).shape == (10, 0)


def test_misuse_is_refused(monkeypatch):
    layer = SparseLinear(torch.eye(4), None)
    with pytest.raises(InvalidArgument, match=r"reads fp32 \[\.\.\., 4\]"):
        layer(torch.randn(2, 5))
    with pytest.raises(InvalidArgument, match=r"reads fp32 \[4, n\]"):
        layer.columns(torch.randn(2, 4))
    with pytest.raises(InvalidArgument, match="float64"):
        layer(torch.randn(2, 4).double())
    with pytest.raises(InvalidArgument, match="NaN"):
        SparseLinear(torch.full((2, 2), float("nan")), None)
    with pytest.raises(InvalidArgument, match="fp32 matrix"):
        SparseLinear(torch.zeros(3), None)
