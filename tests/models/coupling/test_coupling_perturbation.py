"""The law of coupling: to cut a group is to zero it, for any architecture."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from architectures import KINDS, Network, Plan, plans
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparseworks.models.coupling import Coupling, trace
from sparseworks.weights.structured.cutting import cut, zero

EXAMPLE = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def some_kept(coupling: Coupling, seed: int, exact: bool = True) -> np.ndarray:
    """About half of every family, at least one group."""
    rng = np.random.default_rng(seed)
    keep = coupling.keep_all()
    for family in coupling.families:
        if family.exact or not exact:
            gone = rng.permutation(family.roots)[: rng.integers(0, len(family))]
            keep[gone] = False
    return keep


def check(plan: Plan) -> None:
    model = Network(plan)
    coupling = trace(model, EXAMPLE)
    keep = some_kept(coupling, plan.seed)
    zeroed = copy.deepcopy(model)
    zero(zeroed, coupling, keep)
    expected = coupling.parameters(keep)
    flops = coupling.flops(keep)
    cut(model, coupling, keep)
    with torch.no_grad():
        torch.testing.assert_close(model(EXAMPLE), zeroed(EXAMPLE), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) == expected
    again = trace(model, EXAMPLE)
    assert again.flops() == pytest.approx(flops, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", ["pool", "flatten", "attention"])
def test_cutting_is_zeroing_for_every_block(kind: str, head: str) -> None:
    check(Plan(8, (kind, "residual", kind), head, 3))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(plans())
def test_cutting_is_zeroing_for_random_networks(plan: Plan) -> None:
    check(plan)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(plans(), st.integers(0, 99))
def test_one_group_alone_can_be_cut(plan: Plan, pick: int) -> None:
    model = Network(plan)
    coupling = trace(model, EXAMPLE)
    wide = [f for f in coupling.families if len(f) > 1 and f.exact]
    family = wide[pick % len(wide)]
    root = int(family.roots[pick % len(family)])
    keep = coupling.keep_all()
    keep[root] = False
    gone = {(s.name, s.axis): len(s.indices) for s in coupling.group(root, family).slices}
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    cut(model, coupling, keep)
    model(EXAMPLE)
    for name, tensor in model.state_dict().items():
        if name in {n for n, _ in coupling.axes}:
            expected = [n - gone.get((name, a), 0) for a, n in enumerate(shapes[name])]
            assert list(tensor.shape) == expected


def test_a_failed_cut_puts_everything_back() -> None:
    model = Network(Plan(8, ("depthwise", "groupnorm"), "pool", 0))
    coupling = trace(model, EXAMPLE)
    keep = some_kept(coupling, 1)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with torch.no_grad():
        output = model(EXAMPLE)
    _, backup = cut(model, coupling, keep)
    backup.restore()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    with torch.no_grad():
        assert torch.equal(model(EXAMPLE), output)


def test_groups_print_before_anything_is_cut() -> None:
    model = Network(Plan(8, ("residual",), "pool", 0))
    coupling = trace(model, EXAMPLE)
    text = str(coupling)
    assert "blocks.0.conv.weight axis 0: 1 each" in text and "MFLOP" in text
    group = next(coupling.groups())
    assert str(group).startswith(f"group {group.root}") and "stem.weight" in str(group)
