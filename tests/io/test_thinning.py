"""Tensors without their zeros: every bit comes back, and none takes more than it did."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseworks.core.masks import pack_bits
from sparseworks.io.thinning import thickened, thinned

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.int32, torch.bool]


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 40), max_size=3),
       st.sampled_from([0.0, 0.5, 0.97, 1.0]), st.integers(0, 99))  # fmt: skip
def test_tensors_come_back_bit_for_bit(dtype, shape, zeros, seed):
    draw = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, generator=draw).mul_(9)
    numbers[torch.rand(shape, generator=draw) < zeros] = -0.0 if seed % 3 == 0 else 0.0
    tensor = numbers.to(dtype)
    before = tensor.clone()
    parts, shapes = thinned({"a": tensor, "b": torch.ones(3)})
    assert sum(t.nbytes for t in parts.values()) <= tensor.nbytes + 12
    stored = int((tensor.reshape(-1).view(torch.uint8).view(-1, dtype.itemsize) != 0).any(1).sum())
    least = stored * dtype.itemsize + tensor.numel() // 8 + 128
    assert (least < tensor.nbytes) == ("a" in shapes)  # fewer bytes, with those of the header
    back = thickened(parts, shapes)
    assert set(back) == {"a", "b"} and back["a"].shape == before.shape
    assert torch.equal(back["a"].view(-1).view(torch.uint8), before.view(-1).view(torch.uint8))
    assert back["a"].dtype == dtype


@pytest.mark.parametrize("shape", [[4], [5], [-2, -4], [8, 2]])
def test_parts_that_do_not_belong_together_are_refused(shape):
    parts = {"a::values": torch.ones(3), "a::bitmask": pack_bits(torch.arange(8) % 4 == 0)}
    with pytest.raises(ValueError, match=r"a: its values|takes"):
        thickened(parts, {"a": shape})
