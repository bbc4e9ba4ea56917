"""MaskLLM: the best of all masks of a small layer, the distribution of its draws, and the laws."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument
from sparseworks.weights.semistructured.maskllm import PatternChoice


def train(model, optimizer, job, first, last, loss):
    model.train()
    for step in range(first, last):
        optimizer.zero_grad()
        (loss(step) + job.penalty()).backward()
        optimizer.step()


def begin(model, steps, lr=2e-3, **options):
    job = sw.transform(model, "maskllm", steps=steps, include="*", **options)
    optimizer = torch.optim.AdamW(job.parameter_groups(), lr)
    return optimizer, job.attach(optimizer)


def test_the_learned_mask_is_among_the_best_of_all():
    """One layer with three groups: the error of each of 6^3 masks, by brute force."""
    optimal = 0
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        mixing = torch.randn(12, 12, generator=g)
        x = torch.randn(256, 12, generator=g) @ mixing
        model = nn.Sequential(nn.Linear(12, 1, bias=False))
        nn.init.normal_(model[0].weight, generator=g)
        weight, target = model[0].weight.detach().clone(), model(x).detach()

        def error(mask, x=x, weight=weight, target=target):
            return float((x @ (weight * mask).t() - target).square().mean())

        rows = [torch.tensor([float(i in c) for i in range(4)])
                for c in itertools.combinations(range(4), 2)]  # fmt: skip
        every = sorted(error(torch.cat(three)) for three in itertools.product(rows, repeat=3))
        scale = float(target.square().mean())
        optimizer, job = begin(model, 300, alpha=0.0, strength=0.0, seed=seed)

        def loss(_, model=model, x=x, target=target, scale=scale):
            return (model(x) - target).square().mean() / scale

        train(model, optimizer, job, 0, 300, loss)
        found = error(job.finish()["0.weight"].float())
        rank = sum(e < found - 1e-6 * scale for e in every)
        assert rank < 8
        optimal += rank == 0
    assert optimal >= 3


def test_draws_follow_the_softmax_of_the_scaled_logits():
    model = nn.Sequential(nn.Linear(4, 20_000, bias=False))
    job = sw.transform(model, "maskllm", steps=10, include="*", alpha=0.0)
    part = job.part("0.weight", PatternChoice)
    row = torch.tensor([0.02, -0.01, 0.0, 0.01, -0.02, 0.005])
    with torch.no_grad():
        part.logits.copy_(row.expand_as(part.logits))
    counts = torch.zeros(6)
    for _ in range(5):
        counts += torch.bincount(part.drawn().argmax(1), minlength=6)
    expected = torch.softmax(part.kappa * row, 0)
    torch.testing.assert_close(counts / counts.sum(), expected, rtol=0, atol=0.01)
    assert not torch.equal(part.drawn(), part.drawn())


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:8"])
def test_weights_rest_and_the_hard_mask_keeps_n_of_m(pattern):
    torch.manual_seed(0)
    n, m = map(int, pattern.split(":"))
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 8))
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    optimizer, job = begin(model, 12, lr=0.1, pattern=pattern)
    x = torch.randn(6, 8, 4, 4)
    train(model, optimizer, job, 0, 12, lambda _: model(x).square().mean())
    used = model.eval()(x).detach()
    record = job.finish()
    for name in ("0.weight", "3.weight"):
        mask = record[name]
        groups = mask.movedim(1, -1).reshape(-1, m) if mask.ndim == 4 else mask.view(-1, m)
        assert bool((groups.sum(1) == n).all())
        assert torch.equal(model.get_parameter(name).detach(), before[name] * mask)
    for name in ("0.bias", "1.weight", "3.bias"):
        assert torch.equal(model.get_parameter(name).detach(), before[name])
    torch.testing.assert_close(model.eval()(x), used)  # evaluation saw the hard mask all along
    assert all(p.requires_grad for p in model.parameters())
    assert sw.masks(model).violations(model) == {}


def test_a_prior_decides_where_nothing_is_learned():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16))
    prior = {"0.weight": torch.rand(16, 4, 4).argsort(2).lt(2).view(16, 16)}
    for given, expected in ((None, "magnitude"), (prior, "given")):
        job = sw.transform(copy.deepcopy(model), "maskllm", steps=5, include="*", prior=given,
                           alpha=50.0)  # fmt: skip
        mask = job.masks["0.weight"]
        if expected == "given":
            assert torch.equal(mask, prior["0.weight"])
        else:
            assert torch.equal(mask, sw.NM(2, 4).select(model[0].weight.detach().abs()))
    with pytest.raises(InvalidArgument, match=r"no mask of the shape of 0\.weight"):
        sw.transform(model, "maskllm", steps=5, include="*", prior={})


def test_the_penalty_is_its_equation():
    model = nn.Sequential(nn.Linear(8, 4, bias=False))
    optimizer, job = begin(model, 10, strength=0.5)
    model.train()
    x = torch.randn(3, 8)
    model(x)
    part = job.part("0.weight", PatternChoice)
    used = part.soft
    torch.testing.assert_close(job.penalty(), -0.5 * used.square().sum())
    (model(x).sum() + job.penalty()).backward()
    optimizer.step()
    assert float(job.penalty()) == 0.0
    model(x)
    torch.testing.assert_close(job.penalty(), -0.5 * 0.9 * part.soft.square().sum())


def test_resuming_is_exact():
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
        return model, *begin(model, 10, lr=0.05)

    def loss(model):
        return lambda step: model(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
                                  ).square().mean()  # fmt: skip

    model, optimizer, job = make()
    train(model, optimizer, job, 0, 4, loss(model))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), job.state_dict()))
    train(model, optimizer, job, 4, 10, loss(model))
    again, other, resumed = make()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    train(again, other, resumed, 4, 10, loss(again))
    assert torch.equal(job.part("0.weight").logits, resumed.part("0.weight").logits)
    job.finish(), resumed.finish()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"steps": None}, "give `steps`"),
        ({"pattern": "8:16"}, "at most 256 patterns"),
        ({"pattern": "unstructured", "sparsity": 0.5}, "must be N:M"),
        ({"tau_last": 0.0}, "positive"),
    ],
)
def test_misuse_changes_nothing(options, message):
    model = nn.Sequential(nn.Linear(32, 4))
    with pytest.raises(InvalidArgument, match=message):
        sw.transform(model, "maskllm", include="*", **{"steps": 5, **options})
    assert [n for n, _ in model.named_parameters()] == ["0.weight", "0.bias"]
    assert all(p.requires_grad for p in model.parameters())
