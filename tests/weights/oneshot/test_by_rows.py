"""Working on some rows at a time gives what working on all of them gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.evidence import InputNorm
from sparseworks.core.patterns import NM, Unstructured
from sparseworks.models.views import View
from sparseworks.weights.oneshot import base
from sparseworks.weights.oneshot.base import Target
from sparseworks.weights.oneshot.jobs import diagonal_error, put
from sparseworks.weights.oneshot.magnitude import Magnitude
from sparseworks.weights.oneshot.wanda import Wanda


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """Three rows at a time, whatever their length."""
    monkeypatch.setattr(
        base, "in_cache", lambda m: ((i, min(i + 3, len(m))) for i in range(0, len(m), 3))
    )
    monkeypatch.setattr("sparseworks.weights.oneshot.jobs.in_cache", base.in_cache)


def problem(rows=11, columns=16, ties=True):
    g = torch.Generator().manual_seed(0)
    layer = nn.Linear(columns, rows)
    view = View("weight", layer, "weight", "linear")
    weight = torch.randn(rows, columns, generator=g)
    if ties:
        weight = weight.mul(2).round() / 2
    evidence = InputNorm(1, columns)
    evidence.update(torch.randn(40, columns, generator=g), 0)
    evidence.samples = 4
    return view, weight, evidence


@pytest.mark.parametrize("method", [Wanda(), Wanda(rows="alpha"), Magnitude(), Magnitude(power=2)])
@pytest.mark.parametrize("pattern", [Unstructured("row"), NM(2, 4), Unstructured()])
@pytest.mark.parametrize("masked", [False, True])
def test_solutions_are_equal(method, pattern, masked, monkeypatch):
    view, weight, evidence = problem()
    allowed = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.1
    keep = pattern.keep(weight.shape, 0.5)
    allowed |= ~pattern.select(torch.zeros_like(weight), keep)  # enough is left in every run
    target = Target(view, pattern, keep, allowed if masked else None)
    found = method.solve(target, weight, evidence)
    monkeypatch.setattr(type(method), "by_rows", lambda self: False)
    whole = method.solve(target, weight, evidence)
    assert torch.equal(found.mask, whole.mask) and torch.equal(found.weight, whole.weight)


def test_the_error_speaks_of_all_rows():
    view, weight, evidence = problem()
    allowed = torch.ones(weight.shape, dtype=torch.bool)
    allowed[7, :12] = False
    target = Target(view, Unstructured("row"), 11 * 8, allowed)
    with pytest.raises(InvalidArgument, match="row 7 has fewer than 8"):
        Wanda().solve(target, weight, evidence)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("turned", [False, True])
def test_the_diagonal_error_is_its_formula(groups, turned):
    g = torch.Generator().manual_seed(2)
    dense = torch.randn(12, 8, generator=g)
    if turned:
        dense = torch.randn(8, 12, generator=g).t()
    new = torch.where(torch.rand(12, 8, generator=g) > 0.5, dense, 0.1)
    evidence = InputNorm(groups, 8)
    for group in range(groups):
        evidence.update(torch.randn(9, 8, generator=g), group)
    evidence.samples = 2
    view = View("w", nn.Linear(8, 12), "weight", "linear", groups)
    norm = evidence.norm.double().repeat_interleave(12 // groups, 0)
    exact = (((dense - new).double() * norm).square().sum()) / (
        dense.double() * norm
    ).square().sum()
    assert diagonal_error(view, dense, new, evidence) == pytest.approx(float(exact), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_dropped_is_written_as_plus_zero(dtype):
    view, weight, _ = problem()
    view.module.to(dtype)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    put(view, torch.where(mask, weight, -0.0), mask)
    now = view.parameter.detach()
    assert torch.equal(now, torch.where(mask, weight, 0.0).to(dtype))
    assert not torch.signbit(now[~mask]).any()
