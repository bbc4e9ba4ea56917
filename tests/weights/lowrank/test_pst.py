"""PST against its closed forms, a full sort, and magnitude pruning with LoRA."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument
from sparseworks.weights.lowrank.pst import LowRankImportance


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh(),
                         nn.Linear(16, 5)).double()  # fmt: skip


def begun(net, **options):
    return sw.transform(net, "pst", rank=2, score_rank=3,
                        **{"sparsity": 0.8, "steps": 10, **options})  # fmt: skip


def shaken(job):
    """All factors away from 0, and a mask of them."""
    for p in job.added.values():
        nn.init.normal_(p, std=0.3)
    for name, view in job.views.items():
        job.part(name, LowRankImportance).choose(view.parameter, 0.6)


@pytest.mark.parametrize("attached", [True, False])
def test_gradients_are_the_closed_forms(attached):
    net = model()
    job = begun(net, beta=0.7, low_rank=0.4, structured=0.3, through=attached)
    shaken(job)
    view, part = job.views["2.weight"], job.part("2.weight", LowRankImportance)
    x = torch.randn(9, 20, dtype=torch.float64)
    dy = torch.randn(9, 16, dtype=torch.float64)
    net[2](x).backward(dy)
    with torch.no_grad():
        updated = view.parameter + 0.7 * part.up @ part.down
        gradient = dy.t() @ x
        q = gradient * updated
        rest = updated.abs() if attached else torch.zeros_like(updated)
        to_weight = gradient * (part.mask + rest)
        wanted = {
            "score_up": 0.4 * q @ part.score_down.t(), "score_down": 0.4 * part.score_up.t() @ q,
            "rows": 0.3 * q.sum(1), "columns": 0.3 * q.sum(0),
            "up": 0.7 * to_weight @ part.down.t(), "down": 0.7 * part.up.t() @ to_weight,
        }  # fmt: skip
        torch.testing.assert_close(net[2](x), x @ (updated * part.mask).t() + net[2].bias)
    for name, value in wanted.items():
        torch.testing.assert_close(getattr(part, name).grad, value)
    assert view.parameter.grad is None and net[2].bias.grad is None


@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.9])
def test_the_mask_is_that_of_a_full_sort(sparsity):
    job = begun(model())
    shaken(job)
    part, weight = job.part("0.weight", LowRankImportance), job.views["0.weight"].parameter
    part.choose(weight, sparsity)
    updated = weight + part.up @ part.down
    scores = updated.abs() + part.score_up @ part.score_down + part.rows[:, None] + part.columns
    order = scores.float().flatten().argsort(stable=True)
    wanted = torch.ones(240, dtype=torch.bool)
    wanted[order[: int(sparsity * 240 + 1e-9)]] = False
    assert torch.equal(part.mask.flatten(), wanted)


def test_the_schedule():
    job = begun(model(), steps=100)
    seen = []
    for step in (0, 10, 40, 70, 100):
        job.step = step
        seen.append(job.method.sparsity_at(job))
    assert seen == pytest.approx([0, 0, 0.8 * (1 - 0.5**3), 0.8, 0.8])


def train(net, job, optimizer, steps=10):
    for step in range(steps):
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        (net(x) - 1).square().mean().backward()
        optimizer.step()


def test_only_the_parts_and_the_head_train_and_the_count_is_the_formula():
    net = model()
    before = copy.deepcopy(net.state_dict())
    job = begun(net)
    added = sum(p.numel() for p in job.added.values())
    assert added == sum((2 + 3) * (o + i) + o + i for o, i in ((20, 12), (16, 20)))
    optimizer = torch.optim.AdamW(job.parameter_groups(), 0.01, weight_decay=0.0)
    job.attach(optimizer)
    trained = sum(p.numel() for g in optimizer.param_groups for p in g["params"])
    assert trained == added + 16 * 5 + 5
    train(net, job, optimizer)
    frozen = net[0].parametrizations.weight.original
    assert torch.equal(frozen, before["0.weight"]) and torch.equal(net[0].bias, before["0.bias"])
    assert not torch.equal(net[4].weight, before["4.weight"])
    x = torch.randn(4, 12, dtype=torch.float64)
    with torch.no_grad():
        wanted = net(x)
    record = job.finish()
    assert record.sparsity() == pytest.approx(0.8, abs=0.01) and record.violations(net) == {}
    torch.testing.assert_close(net(x), wanted)
    assert all(p.requires_grad for p in net.parameters())
    alone = model()
    job = begun(alone, head=False)
    assert {n for n, p in alone.named_parameters() if p.requires_grad} == set(job.added)


def test_without_importance_it_is_magnitude_with_lora():
    """a1 = a2 = 0, |W'| detached: the mask of |W + U V| and autograd through it, bit for bit."""
    net = model()
    job = begun(net, low_rank=0.0, structured=0.0, through=False, exclude="2", head=False)
    part = job.part("0.weight", LowRankImportance)
    up, down = (p.detach().clone().requires_grad_() for p in (part.up, part.down))
    weight = job.views["0.weight"].parameter.detach()
    mine = torch.optim.SGD([part.up, part.down], 0.05)
    theirs = torch.optim.SGD([up, down], 0.05)
    job.attach(torch.optim.SGD(job.added.values(), 0.0))
    twin = model()
    for step in range(6):
        job.step = 8
        job.method.update(job)
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        updated = weight + 1.0 * up @ down
        order = updated.detach().abs().float().flatten().argsort(stable=True)
        mask = torch.ones(240, dtype=torch.bool)
        mask[order[:192]] = False
        y = nn.functional.linear(x, updated * mask.view(20, 12), twin[0].bias)
        for out, optimizer in ((net(x), mine), (twin[1:](y), theirs)):
            optimizer.zero_grad()
            out.square().sum().backward()
            optimizer.step()
        assert torch.equal(part.up, up) and torch.equal(part.down, down)


def test_the_export_is_bits_and_goes_to_another_task(tmp_path):
    net = model()
    job = begun(net, exclude="4")
    optimizer = torch.optim.AdamW(job.parameter_groups(), 0.01)
    job.attach(optimizer)
    train(net, job, optimizer)
    record = job.finish()
    packed = record.state_dict()["masks"]["0.weight"]["packed"]
    assert packed.numel() == 240 // 8 and packed.dtype == torch.uint8
    sw.save(net, tmp_path / "model.safetensors")
    other = sw.load(tmp_path / "model.safetensors", model())
    assert torch.equal(sw.masks(other)["0.weight"], record["0.weight"])
    fresh = model()  # another task: the mask goes over, its zeros stay
    sw.attach(fresh, record)
    record.apply(fresh)
    run = sw.sparsify(fresh, torch.optim.SGD(fresh.parameters(), 0.1), "fixed")
    fresh(torch.randn(4, 12, dtype=torch.float64)).sum().backward()
    run.optimizer.step()
    assert record.violations(fresh) == {}


def test_resuming_is_bit_for_bit():
    def start():
        net = model()
        job = begun(net)
        optimizer = torch.optim.AdamW(job.parameter_groups(), 0.01)
        return net, job.attach(optimizer), optimizer

    net, job, optimizer = start()
    train(net, job, optimizer, 5)
    kept = copy.deepcopy((net.state_dict(), optimizer.state_dict(), job.state_dict()))
    train(net, job, optimizer, 5)
    other, again, second = start()
    other.load_state_dict(kept[0])
    second.load_state_dict(kept[1])
    again.load_state_dict(kept[2])
    train(other, again, second, 5)
    for name, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_bad_options():
    for options, match in (
        ({"rank": 0}, "rank"), ({"warmup": 0.8}, "warmup"), ({"steps": None}, "steps"),
        ({"pattern": "2:4", "sparsity": None}, "unstructured"), ({"budget": "erk"}, "erk"),
    ):  # fmt: skip
        net = model()
        with pytest.raises(InvalidArgument, match=match):
            sw.transform(net, "pst", **{"sparsity": 0.5, "steps": 9, **options})
        assert all(p.requires_grad for p in net.parameters()) and type(net[0]) is nn.Linear
