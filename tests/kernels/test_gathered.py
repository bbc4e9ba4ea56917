"""The gathered product against float64 torch, on every path this processor has; results do not
depend on the number of threads."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparseworks.core.errors import InvalidArgument
from sparseworks.kernels import (
    available,
    gathered,
    gathered_reference,
    pack_columns,
    unpack_columns,
)

LAWS = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SIZES = st.sampled_from([1, 2, 15, 16, 17, 61, 64, 127, 200, 509])


def problem(rows, columns, tokens, sparsity, seed, dtype=torch.float32):
    made = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=made).to(dtype)
    x = torch.randn(tokens, columns, generator=made)
    x[:, torch.rand(columns, generator=made) < sparsity] = 0
    return weight, x, torch.randn(rows, generator=made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
@LAWS
@given(SIZES, SIZES, st.integers(1, 9), st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.integers(1, 4),
       st.booleans(), st.integers(0, 999))  # fmt: skip
def test_equals_float64(
    isa, dtype, monkeypatch, rows, columns, tokens, sparsity, threads, biased, seed
):
    if not available():
        pytest.skip("no native kernels here")
    weight, x, b = problem(rows, columns, tokens, sparsity, seed, dtype)
    bias = b if biased else None
    packed = pack_columns(weight)
    monkeypatch.setenv("SPARSEWORKS_ISA", isa)
    try:
        got = gathered(packed, x, None, bias, threads)
    except InvalidArgument as error:
        pytest.skip(str(error))
    want = x.double() @ weight.double().t() + (b.double() if biased else 0)
    size = x.double().abs() @ weight.double().abs().t() + 1
    assert bool(((got - want).abs() <= 1e-5 * size).all())
    assert torch.equal(got, gathered(packed, x, None, bias, 1))


@LAWS
@given(SIZES, SIZES, st.integers(0, 5), st.data())
def test_takes_any_index(rows, columns, tokens, data):
    weight, x, bias = problem(rows, columns, tokens, 0.0, rows)
    chosen = data.draw(st.lists(st.integers(0, columns - 1), max_size=20))  # unsorted, repeated
    index = torch.tensor(chosen, dtype=torch.int64)
    want = x.double()[:, index] @ weight.double()[:, index].t() + bias
    packed = pack_columns(weight)
    got = gathered(packed, x, index, bias, 2)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    oracle = gathered_reference(packed, x, index, bias)
    torch.testing.assert_close(got, oracle, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [4096, 9001])
def test_more_rows_than_a_run(rows):
    weight, x, bias = problem(rows, 37, 3, 0.4, 0)
    want = torch.nn.functional.linear(x.double(), weight.double(), bias.double()).float()
    for threads in (1, 2, 3):
        got = gathered(pack_columns(weight), x, None, bias, threads)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@LAWS
@given(SIZES, SIZES, st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 99))
def test_unpacking_is_exact(rows, columns, dtype, seed):
    weight, _, _ = problem(rows, columns, 1, 0.0, seed, dtype)
    assert torch.equal(unpack_columns(pack_columns(weight)), weight)
    mask = torch.rand(rows, columns) < 0.5
    assert torch.equal(unpack_columns(pack_columns(weight, mask)), weight * mask)


def test_concurrent_callers_agree():
    weight, x, bias = problem(300, 500, 16, 0.5, 0)
    packed = pack_columns(weight)
    want = [gathered(packed, row, None, bias, 1) for row in x]
    with ThreadPoolExecutor(4) as callers:
        got = list(callers.map(lambda row: gathered(packed, row, None, bias, 3), x))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_without_native_kernels_torch_serves(monkeypatch):
    weight, x, bias = problem(7, 9, 2, 0.5, 0)
    monkeypatch.setattr(sys.modules[gathered.__module__], "module", lambda: None)
    got = gathered(pack_columns(weight), x, None, bias)
    torch.testing.assert_close(got, torch.nn.functional.linear(x, weight, bias))


def test_refuses_what_does_not_fit(monkeypatch):
    packed = pack_columns(torch.ones(2, 3))
    with pytest.raises(InvalidArgument, match="not finite"):
        pack_columns(torch.tensor([[float("inf")]]))
    with pytest.raises(InvalidArgument, match="fp32 or bf16"):
        pack_columns(torch.ones(2, 3).double())
    with pytest.raises(InvalidArgument, match="the mask is"):
        pack_columns(torch.ones(2, 3), torch.ones(3, 2))
    with pytest.raises(InvalidArgument, match="takes fp32"):
        gathered(packed, torch.zeros(4))
    with pytest.raises(InvalidArgument, match="the bias"):
        gathered(packed, torch.zeros(3), None, torch.zeros(3))
    with pytest.raises(InvalidArgument, match="the index"):
        gathered(packed, torch.zeros(3), torch.tensor([0], dtype=torch.int32))
    if available():
        for wrong in (-1, 3):
            with pytest.raises(InvalidArgument, match=f"index {wrong} is not one of 3 columns"):
                gathered(packed, torch.zeros(3), torch.tensor([wrong]))
        monkeypatch.setenv("SPARSEWORKS_ISA", "avx9000")
        with pytest.raises(InvalidArgument, match="avx9000"):
            gathered(packed, torch.zeros(3))
