"""The N:M product against float64 torch, on every path this processor has."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from sparseworks.core.errors import InvalidArgument, PatternError
from sparseworks.kernels import (
    available,
    epilogue,
    instruction_set,
    nm_product,
    nm_product_reference,
    pack_nm,
    unpack_nm,
)

LAWS = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SIZES = st.sampled_from([1, 2, 3, 7, 15, 16, 17, 33, 48, 61, 64, 127, 200])
TOKENS = st.sampled_from([1, 2, 3, 5, 7, 8, 11, 12, 13, 24, 53])
PATTERNS = st.sampled_from([(1, 2), (2, 4), (1, 4), (2, 8), (1, 8), (3, 8), (4, 16), (4, 4)])
ISAS = ["base", "avx2", "avx512f", "avx512"]
KINDS = [torch.float32, torch.bfloat16]


def matrix(rows, columns, pattern, dtype, seed, sparsity=0.2):
    """Random N:M, some groups with less than N, one row empty."""
    n, m = pattern
    made = torch.Generator().manual_seed(seed)
    groups = -(-columns // m)
    score = torch.rand(rows, groups, m, generator=made)
    mask = torch.zeros(score.shape, dtype=torch.bool)
    mask.scatter_(2, score.topk(n, 2).indices, True)
    mask &= torch.rand(score.shape, generator=made) >= sparsity
    mask[rows // 2] = False
    weight = torch.randn(rows, columns, generator=made).to(dtype)
    return weight * mask.view(rows, -1)[:, :columns]


def use(isa, monkeypatch):
    if not available():
        pytest.skip("no native kernels here")
    monkeypatch.setenv("SPARSEWORKS_ISA", isa)
    try:
        instruction_set()
    except InvalidArgument as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("isa", ISAS)
@LAWS
@given(SIZES, SIZES, TOKENS, PATTERNS, st.sampled_from([0.0, 0.2, 1.0]), st.sampled_from(KINDS),
       st.integers(1, 4), st.booleans(), st.integers(0, 999))  # fmt: skip
def test_equals_float64(
    isa, dtype, monkeypatch, rows, columns, tokens, pattern, sparsity, kind, threads, added, seed
):
    use(isa, monkeypatch)
    made = torch.Generator().manual_seed(seed + 1)
    weight = matrix(rows, columns, pattern, dtype, seed, sparsity)
    x = torch.randn(tokens, columns, generator=made).to(kind)
    bias = torch.randn(rows, generator=made) if added else None
    residual = torch.randn(tokens, rows, generator=made).to(kind) if added else None
    packed = pack_nm(weight, None, pattern, dtype)
    got = nm_product(packed, x, bias, "none", residual, threads=threads)
    assert got.dtype == kind
    taken = x.to(dtype).double()
    want, size = taken @ weight.double().t(), taken.abs() @ weight.double().abs().t() + 1
    if added:
        want = want + bias.double() + residual.double()
        size = size + bias.double().abs() + residual.double().abs()
    error = 1e-5 * size + (want.abs() / 256 if kind == torch.bfloat16 else 0)
    assert bool(((got.double() - want).abs() <= error).all())
    assert torch.equal(got, nm_product(packed, x, bias, "none", residual, threads=1))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", KINDS)
def test_a_token_does_not_depend_on_its_batch(isa, dtype, monkeypatch):
    use(isa, monkeypatch)
    x, packed = torch.randn(31, 100), pack_nm(matrix(90, 100, (2, 4), dtype, 0), dtype=dtype)
    alone = torch.cat([nm_product(packed, row[None], threads=1) for row in x])
    assert torch.equal(nm_product(packed, x, threads=2), alone)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_stores_activations(dtype, activation):
    weight, x = matrix(70, 90, (2, 8), dtype, 0), torch.randn(29, 90)
    bias, residual = torch.randn(70), torch.randn(29, 70)
    linear = functional.linear(x.to(dtype).double(), weight.double(), bias.double()) + residual
    want = getattr(functional, activation)(linear).float()
    packed = pack_nm(weight, None, (2, 8), dtype)
    for product in (nm_product, nm_product_reference):
        got = product(packed, x, bias, activation, residual)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_more_tokens_than_the_cache_takes():
    weight, x = matrix(64, 3000, (2, 4), torch.float32, 0), torch.randn(100, 3000)
    want = functional.linear(x.double(), weight.double()).float()
    for threads in (1, 3):
        got = nm_product(pack_nm(weight), x, threads=threads)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


@LAWS
@given(SIZES, SIZES, PATTERNS, st.sampled_from(KINDS), st.integers(0, 999))
def test_packing_is_exact(rows, columns, pattern, dtype, seed):
    weight = matrix(rows, columns, pattern, dtype, seed)
    assert torch.equal(unpack_nm(pack_nm(weight, None, pattern, dtype)), weight)
    full = torch.randn(rows, columns).to(dtype)
    packed = pack_nm(full, weight != 0, pattern, dtype)
    assert torch.equal(unpack_nm(packed), full * (weight != 0))


def test_takes_the_bytes_it_should():
    packed = pack_nm(matrix(64, 64, (2, 4), torch.float32, 0))
    assert packed.value.numel() == 64 * 32
    assert packed.position.numel() * 32 == 2 * 64 * 32  # two bits a value
    short = pack_nm(matrix(64, 64, (2, 8), torch.bfloat16, 0), None, (2, 8), torch.bfloat16)
    assert short.value.numel() == 64 * 16
    assert short.position.numel() * 32 == 4 * 64 * 16


@pytest.mark.parametrize("isa", ISAS)
def test_special_numbers(isa, monkeypatch):
    use(isa, monkeypatch)
    for dtype in KINDS:
        packed = pack_nm(torch.eye(16), dtype=dtype)
        x = torch.ones(2, 16)
        x[0, 0], x[1, 1] = float("inf"), float("nan")
        got = nm_product(packed, x)
        assert torch.isinf(got[0, 0])
        assert torch.isnan(got[1, 1])


def test_concurrent_callers_agree():
    packed = pack_nm(matrix(200, 300, (2, 4), torch.float32, 0))
    inputs = [torch.randn(20, 300) for _ in range(16)]
    want = [nm_product(packed, x, threads=1) for x in inputs]
    with ThreadPoolExecutor(4) as callers:
        got = list(callers.map(lambda x: nm_product(packed, x, threads=3), inputs))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_leading_axes_and_no_tokens():
    weight, x = matrix(40, 52, (1, 4), torch.float32, 0), torch.randn(2, 3, 52)
    packed = pack_nm(weight, pattern=(1, 4))
    want = functional.linear(x, weight)
    torch.testing.assert_close(nm_product(packed, x), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(nm_product(packed, x[0, 0]), want[0, 0], rtol=1e-4, atol=1e-4)
    assert nm_product(packed, torch.zeros(0, 52)).shape == (0, 40)


def test_without_native_kernels_torch_serves(monkeypatch):
    packed, x = pack_nm(matrix(20, 30, (2, 4), torch.float32, 0)), torch.randn(4, 30)
    want = nm_product(packed, x, None, "silu")
    monkeypatch.setattr(epilogue, "module", lambda: None)
    torch.testing.assert_close(nm_product(packed, x, None, "silu"), want, rtol=1e-4, atol=1e-4)


def test_refuses_what_does_not_fit(monkeypatch):
    packed, x = pack_nm(torch.eye(4)), torch.zeros(1, 4)
    with pytest.raises(PatternError, match=r"row 1 keeps 3 of columns 4 \.\. 7"):
        pack_nm(torch.tensor([[0.0] * 8, [0, 0, 0, 0, 1, 0, 1, 1]]))
    for pattern in ((0, 4), (5, 4), (2, 3), (2, 32)):
        with pytest.raises(PatternError, match="N:M needs"):
            pack_nm(torch.eye(4), pattern=pattern)
    with pytest.raises(InvalidArgument, match="not finite in bfloat16"):
        pack_nm(torch.tensor([[3.4e38]]), dtype=torch.bfloat16)
    with pytest.raises(InvalidArgument, match="takes a matrix"):
        pack_nm(torch.ones(3))
    with pytest.raises(InvalidArgument, match="the mask is"):
        pack_nm(torch.eye(4), torch.ones(4, 2))
    with pytest.raises(InvalidArgument, match="values are fp32 or bf16"):
        pack_nm(torch.eye(4), dtype=torch.float16)
    with pytest.raises(InvalidArgument, match="fp32 or bf16"):
        nm_product(packed, torch.zeros(1, 5))
    with pytest.raises(InvalidArgument, match="the bias is"):
        nm_product(packed, x, torch.zeros(3))
    with pytest.raises(InvalidArgument, match="is not one of"):
        nm_product(packed, x, activation="swish")
    if available():
        monkeypatch.setenv("SPARSEWORKS_ISA", "avx9000")
        with pytest.raises(InvalidArgument, match="avx9000"):
            nm_product(packed, x)
