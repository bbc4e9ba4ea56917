"""The block-sparse product against float64 torch, on every path this processor has."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from sparseworks.core.errors import InvalidArgument, PatternError
from sparseworks.kernels import (
    available,
    block_product,
    block_product_reference,
    epilogue,
    has_amx,
    instruction_set,
    pack_blocks,
    unpack_blocks,
)

LAWS = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SIZES = st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 61, 64, 127, 200])
TOKENS = st.sampled_from([1, 2, 3, 5, 7, 11, 12, 13, 23, 24, 25, 47, 53])
BLOCKS = st.sampled_from([(16, 16), (16, 32), (32, 16), (32, 32), (48, 32), (64, 64)])
ISAS = ["base", "avx2", "avx512f", "avx512"]
KINDS = [torch.float32, torch.bfloat16]


def matrix(rows, columns, block, sparsity, seed):
    made = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=made).bfloat16()
    grid = torch.rand(-(-rows // block[0]), -(-columns // block[1]), generator=made) >= sparsity
    grid[len(grid) // 2] = False  # an empty row of blocks
    mask = grid.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return weight * mask[:rows, :columns]


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
@given(SIZES, SIZES, TOKENS, BLOCKS, st.sampled_from([-1.0, 0.0, 0.5, 0.9, 1.0]),
       st.integers(1, 4), st.booleans(), st.booleans(), st.integers(0, 999))  # fmt: skip
def test_equals_float64(
    isa, dtype, monkeypatch, rows, columns, tokens, block, sparsity, threads, biased, added, seed
):
    use(isa, monkeypatch)
    made = torch.Generator().manual_seed(seed + 1)
    if sparsity < 0:
        weight = torch.randn(rows, columns, generator=made).bfloat16()
    else:
        weight = matrix(rows, columns, block, sparsity, seed)
    x = torch.randn(tokens, columns, generator=made).to(dtype)
    bias = torch.randn(rows, generator=made) if biased else None
    residual = torch.randn(tokens, rows, generator=made).to(dtype) if added else None
    packed = pack_blocks(weight, block=block)
    got = block_product(packed, x, bias, "none", residual, threads=threads)
    assert got.dtype == dtype
    short = x.bfloat16().double()
    want, size = short @ weight.double().t(), short.abs() @ weight.double().abs().t() + 1
    if biased:
        want, size = want + bias.double(), size + bias.double().abs()
    if added:
        want, size = want + residual.double(), size + residual.double().abs()
    error = 1e-5 * size + (want.abs() / 256 if dtype == torch.bfloat16 else 0)
    assert bool(((got.double() - want).abs() <= error).all())
    assert torch.equal(got, block_product(packed, x, bias, "none", residual, threads=1))


ACTIVATIONS = {
    "none": lambda x: x,
    "relu": functional.relu,
    "relu6": functional.relu6,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "hardswish": functional.hardswish,
    "hardsigmoid": functional.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(isa, activation, monkeypatch):
    use(isa, monkeypatch)
    weight, x = matrix(70, 90, (16, 32), 0.4, 0), 3 * torch.randn(29, 90)
    bias, residual = torch.randn(70), torch.randn(29, 70)
    linear = functional.linear(x.bfloat16().double(), weight.double(), bias.double())
    want = ACTIVATIONS[activation](linear + residual).float()
    packed = pack_blocks(weight)
    got = block_product(packed, x, bias, activation, residual)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    oracle = block_product_reference(packed, x, bias, activation, residual)
    torch.testing.assert_close(oracle, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [100, 1000])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_many_tokens(tokens, threads):
    """More groups of tokens than threads, and fewer; mixed dtypes."""
    weight = matrix(96, 1000, (32, 32), 0.5, 0)
    x = torch.randn(tokens, 1000)
    want = functional.linear(x.bfloat16().double(), weight.double()).float()
    got = block_product(pack_blocks(weight), x.bfloat16(), dtype=torch.float32, threads=threads)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
    got = block_product(pack_blocks(weight), x, dtype=torch.bfloat16, threads=threads)
    torch.testing.assert_close(got.float(), want, rtol=1e-2, atol=1e-2)


@LAWS
@given(SIZES, SIZES, BLOCKS, st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 999))
def test_packing_is_exact(rows, columns, block, sparsity, seed):
    weight = matrix(rows, columns, block, sparsity, seed)
    packed = pack_blocks(weight, block=block)
    assert torch.equal(unpack_blocks(packed), weight)
    mask = torch.rand(rows, columns) < 0.1  # any mask is held, by all blocks that it touches
    assert torch.equal(unpack_blocks(pack_blocks(weight, mask, block)), weight * mask)


def test_only_kept_blocks_are_stored_and_tall_strips_where_possible():
    weight = torch.zeros(64, 128)
    weight[16:32, 32:64] = 1
    packed = pack_blocks(weight, block=(16, 32))
    assert (packed.height, packed.column.tolist()) == (16, [2, 3])
    assert packed.density == 2 / 32
    assert pack_blocks(weight, block=(32, 32)).height == 32
    assert pack_blocks(torch.ones(48, 16)).height == 32
    assert pack_blocks(torch.ones(48, 16)).density == 1


@pytest.mark.parametrize("isa", ISAS)
def test_special_numbers(isa, monkeypatch):
    """Infinity and NaN in x reach the result, and rounding to bf16 does not invent them."""
    use(isa, monkeypatch)
    packed = pack_blocks(torch.eye(16))
    x = torch.zeros(3, 16)
    x[0, 0], x[1, 1], x[2, 2] = float("inf"), float("nan"), 3e38
    got = block_product(packed, x)
    assert torch.isnan(got[1, 1])
    assert torch.isinf(got[0, 0])
    assert got[2, 2] == torch.tensor(3e38).bfloat16().float()
    short = block_product(packed, torch.full((1, 16), 1 + 2**-8 + 2**-9), dtype=torch.bfloat16)
    assert torch.equal(short, torch.full((1, 16), 1 + 2**-7).bfloat16())


def test_concurrent_callers_agree():
    packed = pack_blocks(matrix(200, 300, (16, 32), 0.5, 0))
    inputs = [torch.randn(50, 300) for _ in range(16)]
    want = [block_product(packed, x, threads=1) for x in inputs]
    with ThreadPoolExecutor(4) as callers:
        got = list(callers.map(lambda x: block_product(packed, x, threads=3), inputs))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_amx_is_detected_as_the_system_reports_it():
    found = Path("/proc/cpuinfo")
    if not available() or not found.exists():
        pytest.skip("nothing to compare with")
    assert has_amx() == ("amx_bf16" in found.read_text().split())


def test_leading_axes_and_no_tokens():
    weight = matrix(40, 50, (16, 16), 0.3, 0)
    x = torch.randn(2, 3, 50)
    got = block_product(pack_blocks(weight), x)
    torch.testing.assert_close(
        got, functional.linear(x.bfloat16().float(), weight.float()), rtol=1e-4, atol=1e-4
    )
    assert block_product(pack_blocks(weight), torch.zeros(0, 50)).shape == (0, 40)


def test_without_native_kernels_torch_serves(monkeypatch):
    weight, x = matrix(20, 30, (16, 16), 0.3, 0), torch.randn(4, 30)
    want = block_product(pack_blocks(weight), x, None, "silu")
    monkeypatch.setattr(epilogue, "module", lambda: None)
    got = block_product(pack_blocks(weight), x, None, "silu")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_refuses_what_does_not_fit(monkeypatch):
    packed, x = pack_blocks(torch.ones(2, 3)), torch.zeros(1, 3)
    with pytest.raises(PatternError, match="multiples of 16 x 16"):
        pack_blocks(torch.ones(2, 3), block=(8, 32))
    with pytest.raises(InvalidArgument, match="not finite"):
        pack_blocks(torch.tensor([[3.4e38]]))  # infinite in bf16
    with pytest.raises(InvalidArgument, match="takes a matrix"):
        pack_blocks(torch.ones(2, 3, 4))
    with pytest.raises(InvalidArgument, match="the mask is"):
        pack_blocks(torch.ones(2, 3), torch.ones(3, 2))
    with pytest.raises(InvalidArgument, match="fp32 or bf16"):
        block_product(packed, torch.zeros(1, 4))
    with pytest.raises(InvalidArgument, match="fp32 or bf16"):
        block_product(packed, x.double())
    with pytest.raises(InvalidArgument, match="the residual is"):
        block_product(packed, x, residual=torch.zeros(1, 2).bfloat16())
    with pytest.raises(InvalidArgument, match="the bias is"):
        block_product(packed, x, torch.zeros(3))
    with pytest.raises(InvalidArgument, match="'swish' is not one of"):
        block_product(packed, x, activation="swish")
    if available():
        monkeypatch.setenv("SPARSEWORKS_ISA", "avx9000")
        with pytest.raises(InvalidArgument, match="avx9000"):
            block_product(packed, x)
