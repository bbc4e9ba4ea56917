"""keep_only against masked_fill, element by element."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseworks.core.errors import InvalidArgument
from sparseworks.kernels import instruction_set
from sparseworks.kernels.zeroing import keep_only, keep_only_reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex128,
          torch.int8, torch.int64, torch.bool]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=4),
    dtype=st.sampled_from(DTYPES),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_it_is_masked_fill(shape, dtype, density, seed):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=g) < density
    tensor = (100 * torch.randn(shape, generator=g)).to(dtype)
    wanted = tensor.masked_fill(~mask, 0)
    keep_only(mask, tensor)
    assert torch.equal(tensor, wanted)


def test_infinities_nan_and_signs_go():
    odd = torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0, -3.0])
    kept = odd.clone()
    keep_only(torch.ones(5, dtype=torch.bool), kept)
    assert torch.equal(kept.view(torch.int32), odd.view(torch.int32))
    keep_only(torch.zeros(5, dtype=torch.bool), odd)
    assert odd.view(torch.int32).tolist() == [0] * 5


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced"])
def test_any_layout_and_several_tensors_at_once(layout):
    mask = torch.rand(4, 6, 3, 3) < 0.5
    made = {
        "channels_last": lambda: torch.randn(4, 6, 3, 3).to(memory_format=torch.channels_last),
        "transposed": lambda: torch.randn(6, 4, 3, 3).transpose(0, 1),
        "sliced": lambda: torch.randn(4, 12, 3, 3)[:, ::2],
    }[layout]
    tensors = [made(), torch.randn(4, 6, 3, 3), made().double(), made()]
    wanted = [t.masked_fill(~mask, 0.0) for t in tensors]
    keep_only(mask, *tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, wanted))


def test_a_leaf_that_trains_counts_the_change():
    weight = torch.nn.Parameter(torch.randn(3, 3))
    version = weight._version
    with torch.no_grad():
        keep_only(torch.eye(3, dtype=torch.bool), weight)
    assert weight._version > version and int(torch.count_nonzero(weight)) == 3


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512f"])
@pytest.mark.parametrize("size", [0, 1, 63, 1000, (1 << 20) + 77])
def test_every_path_is_the_reference(isa: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEWORKS_ISA", isa)
    try:
        instruction_set()
    except InvalidArgument as error:
        pytest.skip(str(error))
    mask = torch.rand(size) < 0.5
    tensors = [torch.randn(size).to(d) for d in (torch.bfloat16, torch.float32, torch.float64)]
    tensors.append(torch.ones(size, dtype=torch.int8))
    wanted = [t.clone() for t in tensors]
    keep_only_reference(mask, *wanted)
    keep_only(mask, *tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, wanted))


def test_another_shape_is_refused() -> None:
    with pytest.raises(RuntimeError):
        keep_only(torch.ones(2, 3, dtype=torch.bool), torch.ones(3, 2))
