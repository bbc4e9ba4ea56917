"""The mask record: bits, checks, and what it does to a model."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.core.masks import Masks, attach, masks, pack_bits, unpack_bits


@given(st.lists(st.integers(0, 9), min_size=0, max_size=3), st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_bits_round_trip_in_the_documented_order(shape, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_bits(mask)
    assert torch.equal(unpack_bits(packed, tuple(shape)), mask)
    for i, value in enumerate(mask.flatten().tolist()):
        assert bool(packed[i // 8] >> (i % 8) & 1) == value


def test_wrong_sizes_are_refused():
    with pytest.raises(InvalidArgument, match="takes 2 bytes"):
        unpack_bits(torch.zeros(1, dtype=torch.uint8), (3, 3))


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


def test_apply_zeroes_and_violations_are_counted():
    net = model()
    mask = torch.eye(4, dtype=torch.bool)
    record = Masks.of({"0.weight": mask})
    assert record.violations(net) == {"0.weight": 12}
    record.apply(net)
    assert record.violations(net) == {} and int((net[0].weight != 0).sum()) == 4
    assert record.sparsity() == record.sparsity("0.weight") == 0.75


def test_the_record_travels_with_a_copy():
    net = model()
    attach(net, Masks.of({"0.weight": torch.eye(4, dtype=torch.bool)}, "test"))
    twin = copy.deepcopy(net)
    assert torch.equal(masks(twin)["0.weight"], torch.eye(4, dtype=torch.bool))
    attach(twin, None)
    assert masks(twin) is None and masks(net) is not None


def test_masks_of_another_model_are_refused():
    with pytest.raises(ModelError, match="does not have"):
        attach(model(), Masks.of({"9.weight": torch.ones(4, 4, dtype=torch.bool)}))
    with pytest.raises(ModelError, match="shape"):
        attach(model(), Masks.of({"0.weight": torch.ones(4, 5, dtype=torch.bool)}))


def test_state_round_trip():
    record = Masks.of({"0.weight": torch.eye(4, dtype=torch.bool)}, "wanda", "2:4")
    again = Masks.from_state_dict(record.state_dict())
    assert again.method == "wanda" and again.entry("0.weight").pattern == "2:4"
    assert torch.equal(again["0.weight"], record["0.weight"])
