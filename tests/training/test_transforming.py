"""Transforms: what they add trains, resumes exactly, and leaves ordinary modules behind."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.core.registry import MethodInfo
from sparseworks.core.selection import keep_top
from sparseworks.training.gates import SoftMask, StraightThroughMask, straight_through
from sparseworks.training.transforming import Transform


def info(name):
    return MethodInfo(name=name, title="", authors="", year=2026, room="weights", kind="transform")


@dataclass(frozen=True, kw_only=True)
class Hard(Transform):
    """Scores learn beside the weights; the mask is their top-k after every step."""

    info: ClassVar[MethodInfo] = info("hard")
    breaks: bool = False

    def begin(self, job):
        for name, view in job.views.items():
            job.parametrize(name, StraightThroughMask(view.parameter.detach().abs()))
        if self.breaks:
            job.freeze(job.views[name].module, "bias")
            job.replace("2", nn.Identity())
            raise InvalidArgument("no")
        self.update(job)

    def update(self, job):
        for name in job.views:
            scores = job.part(name).scores.detach()
            job.set_mask(name, keep_top(scores, round(scores.numel() * (1 - job.sparsity))))


@dataclass(frozen=True, kw_only=True)
class Soft(Transform):
    """Gates whose mean is penalised; masks only at the end."""

    info: ClassVar[MethodInfo] = info("soft")

    def begin(self, job):
        for name, view in job.views.items():
            job.parametrize(name, SoftMask(torch.ones_like(view.parameter)))

    def penalty(self, job):
        return torch.stack([job.part(n).gate().mean() for n in job.views]).mean()

    def update(self, job):
        for name in job.views:
            job.part(name).cool(1 - job.progress / 2)

    def finish(self, job):
        for name in job.views:
            gate = job.part(name).gate()
            job.set_mask(name, keep_top(gate, round(gate.numel() * (1 - job.sparsity))))


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 8),
        nn.Linear(8, 5),
    )  # fmt: skip


def steps(model, optimizer, job, count, seed=1):
    g = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x, y = torch.randn(8, 3, 6, 6, generator=g), torch.randint(0, 5, (8,), generator=g)
        optimizer.zero_grad()
        (nn.functional.cross_entropy(model(x), y) + job.penalty()).backward()
        optimizer.step()


def begin(method, model=None, **options):
    model = net() if model is None else model
    job = sw.transform(model, method, sparsity=0.7, steps=10, **options)
    optimizer = torch.optim.SGD(job.parameter_groups(lr=0.5), lr=0.1, momentum=0.9)
    return model, optimizer, job.attach(optimizer)


METHODS = [Hard(), Soft()]


def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other():
    soft = torch.randn(50, requires_grad=True)
    hard = torch.rand(50) < 0.5
    weights = torch.randn(50)
    out = straight_through(hard, soft)
    assert torch.equal(out.detach(), hard.float())
    (out * weights).sum().backward()
    assert torch.equal(soft.grad, weights)


def test_gradients_of_the_masked_layer():
    layer = nn.Linear(6, 4, bias=False)
    part = StraightThroughMask(torch.rand(4, 6), torch.rand(4, 6) < 0.5)
    parametrize.register_parametrization(layer, "weight", part)
    raw = layer.parametrizations.weight.original
    x = torch.randn(9, 6)
    layer(x).square().sum().backward()
    z = (raw * part.mask).detach().requires_grad_()
    (x @ z.t()).square().sum().backward()
    torch.testing.assert_close(raw.grad, z.grad * part.mask)
    torch.testing.assert_close(part.scores.grad, z.grad * raw.detach())
    assert bool((part.scores.grad[~part.mask] != 0).any())


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.info.name)
def test_finish_leaves_ordinary_modules_with_exact_zeros(method):
    plain = net()
    model, optimizer, job = begin(method)
    assert job.added and set(job.added) == {
        n for n, _ in model.named_parameters() if n.endswith("scores")
    }
    steps(model, optimizer, job, 4)
    assert job.step == 4
    before = model.eval()(torch.ones(2, 3, 6, 6)).detach()
    record = job.finish()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert not any(parametrize.is_parametrized(m) for m in model.modules())
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert sw.masks(model).violations(model) == {} and set(record) == set(job.views)
    for name in record:
        kept = int(record[name].sum())
        assert kept == round(record[name].numel() * 0.3)
        assert kept >= int(torch.count_nonzero(model.get_parameter(name)))
    if method.info.name == "hard":
        torch.testing.assert_close(model(torch.ones(2, 3, 6, 6)), before, rtol=0, atol=0)
    step = job.step
    steps(model, optimizer, job, 1)
    assert job.step == step and float(job.penalty()) == 0.0
    assert torch.equal(job.finish()["0.weight"], record["0.weight"])


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.info.name)
def test_resuming_is_exact(method):
    model, optimizer, job = begin(method)
    steps(model, optimizer, job, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), job.state_dict()))
    steps(model, optimizer, job, 3, seed=7)
    other, again, resumed = begin(method, net(seed=5))
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    steps(other, again, resumed, 3, seed=7)
    assert resumed.step == job.step == 6
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    job.finish(), resumed.finish()
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_scores_do_not_decay_and_frozen_weights_stay_out_of_the_groups():
    model = net()
    job = sw.transform(model, Hard(), sparsity=0.5)
    job.freeze(model[5], "bias")
    first, second = job.parameter_groups(lr=0.3)
    assert {id(p) for p in second["params"]} == {id(p) for p in job.added.values()}
    assert second["weight_decay"] == 0.0 and second["lr"] == 0.3
    assert all(p is not model[5].bias for p in first["params"])
    assert len(first["params"]) + len(second["params"]) == len(list(model.parameters())) - 1
    job.finish()
    assert model[5].bias.requires_grad


def test_a_failing_method_leaves_the_model_as_it_was():
    model, plain = net(), net()
    with pytest.raises(InvalidArgument, match="no"):
        sw.transform(model, Hard(breaks=True), sparsity=0.5)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(),
                                                 plain.state_dict().values()))  # fmt: skip
    assert all(p.requires_grad for p in model.parameters())
    assert [type(m) for m in model] == [type(m) for m in plain]


def test_misuse_is_refused_before_anything_changes():
    model = net()
    for bad, message in [
        ({"method": "magnitude", "sparsity": 0.5}, "is one-shot, not transform"),
        ({"method": Hard()}, "needs `sparsity`"),
        ({"method": Hard(), "sparsity": 1.5}, "not in"),
        ({"method": Hard(), "sparsity": 0.5, "steps": 0}, "at least 1"),
        ({"method": Hard(), "sparsity": 0.5, "pattern": "2:4"}, "multiple of 4"),
        ({"method": Hard(), "sparsity": 0.5, "include": "nothing"}, "matches no weight"),
    ]:
        with pytest.raises(InvalidArgument, match=message):
            sw.transform(model, **bad)
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    tied[2].weight = tied[0].weight
    with pytest.raises(ModelError, match="tied"):
        sw.transform(tied, Hard(), sparsity=0.5)
    broken = net()
    with torch.no_grad():
        broken[0].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"0\.weight holds NaN"):
        sw.transform(broken, Hard(), sparsity=0.5)
    for clean in (model, tied):
        assert not any(parametrize.is_parametrized(m) for m in clean.modules())
    late = torch.optim.SGD(model.parameters(), 0.1)
    job = sw.transform(model, Hard(), sparsity=0.5)
    with pytest.raises(InvalidArgument, match="after `transform`"):
        job.attach(late)
    job.attach(torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(InvalidArgument, match="already attached"):
        job.attach(torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(InvalidArgument, match="give `steps`"):
        _ = job.progress


def test_states_of_other_jobs_are_refused():
    _, _, job = begin(Hard())
    for change in ({"method": "soft"}, {"sparsity": 0.5}, {"steps": 11}, {"options": {}}):
        with pytest.raises(InvalidArgument, match=next(iter(change))):
            job.load_state_dict({**job.state_dict(), **change})
    _, _, part = begin(Hard(), include="0")
    with pytest.raises(InvalidArgument, match="same tensors"):
        job.load_state_dict(part.state_dict())


def test_bad_parts_are_refused():
    with pytest.raises(InvalidArgument, match="finite"):
        StraightThroughMask(torch.tensor([1.0, float("inf")]))
    with pytest.raises(InvalidArgument, match="temperature"):
        SoftMask(torch.zeros(2), temperature=0.0)
