"""The batch-1 product against float64 torch, on every path this processor has."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparseworks.core.errors import InvalidArgument, PatternError
from sparseworks.kernels import available, pack_index, pack_integer, pack_mask, spmv, unpack

LAWS = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def matrix(rows: int, columns: int, sparsity: float, seed: int) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=made).bfloat16()
    weight[torch.rand(rows, columns, generator=made) < sparsity] = 0
    weight[rows // 2] = 0  # an empty row
    return weight


PACKERS = {"masked": pack_mask, "indexed": pack_index, "integer": pack_integer}


@pytest.mark.parametrize("layout", PACKERS)
@pytest.mark.parametrize("isa", ["base", "avx2", "avx512f", "avx512vbmi2", "avx512"])
@LAWS
@given(
    rows=st.sampled_from([1, 2, 7, 61, 200]),
    columns=st.sampled_from([1, 31, 32, 33, 64, 97, 128, 129, 1021]),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    threads=st.integers(1, 4),
    seed=st.integers(0, 99),
    biased=st.booleans(),
)
def test_equals_float64(isa, layout, monkeypatch, rows, columns, sparsity, threads, seed, biased):
    if not available():
        pytest.skip("no native kernels here")
    weight = matrix(rows, columns, sparsity, seed)
    x = torch.randn(columns, generator=torch.Generator().manual_seed(seed + 1))
    bias = torch.linspace(-1, 1, rows) if biased else None
    packed = PACKERS[layout](weight)
    held = unpack(packed).double()  # what rounding to integers left
    if layout != "integer":
        assert torch.equal(held, weight.double())
    monkeypatch.setenv("SPARSEWORKS_ISA", isa)
    try:
        got = spmv(packed, x, bias, threads)
    except InvalidArgument as error:
        pytest.skip(str(error))
    want = held @ x.double() + (0 if bias is None else bias.double())
    size = held.abs() @ x.double().abs() + 1
    if layout == "integer":  # x keeps 15 bits of its largest entry
        size = size + held.abs().sum(1) * float(x.abs().max())
    assert bool(((got - want).abs() <= 2e-5 * size).all())


@LAWS
@given(st.integers(1, 40), st.integers(1, 100), st.floats(0, 1), st.integers(0, 99))
def test_unpacking_is_exact(rows, columns, sparsity, seed):
    weight = matrix(rows, columns, sparsity, seed)
    for pack in (pack_mask, pack_index):
        assert torch.equal(unpack(pack(weight)), weight)
        assert torch.equal(unpack(pack(weight, torch.ones_like(weight).bool())), weight)
    rounded = unpack(pack_integer(weight))
    top = torch.nn.functional.pad(weight.float().abs(), (0, -columns % 128))
    step = top.view(rows, -1, 128).amax(2).repeat_interleave(128, 1)[:, :columns] / 127
    assert bool(((rounded - weight.float()).abs() <= 0.5 * step + 1e-7).all())


@pytest.mark.parametrize("layout", PACKERS)
def test_concurrent_callers_agree(layout):
    packed = PACKERS[layout](matrix(300, 500, 0.7, 0))
    inputs = [torch.randn(500, generator=torch.Generator().manual_seed(i)) for i in range(16)]
    want = [spmv(packed, x, threads=1) for x in inputs]
    with ThreadPoolExecutor(4) as callers:
        got = list(callers.map(lambda x: spmv(packed, x, threads=3), inputs))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_refuses_what_does_not_fit():
    with pytest.raises(InvalidArgument, match="not finite"):
        pack_mask(torch.tensor([[float("nan")]]))
    with pytest.raises(InvalidArgument, match="a matrix is packed"):
        pack_mask(torch.zeros(3))
    with pytest.raises(InvalidArgument, match="the mask is"):
        pack_mask(torch.zeros(2, 3), torch.ones(3, 2))
    with pytest.raises(InvalidArgument, match="spmv: x is"):
        spmv(pack_mask(torch.ones(2, 3)), torch.zeros(4))
    with pytest.raises(PatternError, match="16-bit"):
        pack_index(torch.zeros(1, (1 << 16) + 1))
