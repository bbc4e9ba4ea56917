"""Sparse soups: the average of copies that share their masks, against plain formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.weights.tickets.soups import average

STEPS = 8
G = torch.Generator().manual_seed(0)
X, Y = torch.randn(96, 10, generator=G), torch.randint(0, 3, (96,), generator=G)
TRAIN = [X[:32], X[32:64]]


def net(seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def fit(model, *, start, seed, first_step, lr=0.1):
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    start(model, optimizer, STEPS)
    g = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(STEPS):
        index = torch.randperm(64, generator=g)[:16]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X[index]), Y[index]).backward()
        optimizer.step()


def score(model):
    return -nn.functional.cross_entropy(model(X[64:]), Y[64:]).item()


def soup(model=None, **options):
    model = net() if model is None else model
    given = {"sparsity": 0.8, "include": "*", "data": TRAIN, **options}
    return model, sw.experiment(fit, model, "soup", **given)


def test_every_soup_is_the_mean_of_its_copies_with_statistics_of_the_data():
    model, done = soup(phases=2, copies=3)
    assert list(done.finished) == [
        *(f"phase 1, copy {j}" for j in (1, 2, 3)), "phase 1",
        *(f"phase 2, copy {j}" for j in (1, 2, 3)), "phase 2",
    ]  # fmt: skip
    for phase in (1, 2):
        mixed = done.finished[f"phase {phase}"].into(net())
        copies = [done.finished[f"phase {phase}, copy {j}"].into(net()) for j in (1, 2, 3)]
        for name, value in mixed.named_parameters():
            parts = [dict(c.named_parameters())[name].detach() for c in copies]
            torch.testing.assert_close(value.detach(), torch.stack(parts).mean(0))
        hidden = mixed[0](X[:64]).detach()
        torch.testing.assert_close(mixed[1].running_mean, hidden.mean(0), rtol=1e-4, atol=1e-5)
        assert not torch.equal(copies[0][0].weight, copies[1][0].weight)
        for copied in copies:
            assert all(torch.equal(sw.masks(copied)[n], m) for n, m in sw.masks(mixed).items())
    for name, value in model.state_dict().items():
        assert torch.equal(value, mixed.state_dict()[name])


def test_phases_drop_the_same_share_and_nest():
    model, done = soup(phases=3, copies=2)
    before = None
    for phase in (1, 2, 3):
        mixed = done.finished[f"phase {phase}"].into(net())
        record = sw.masks(mixed)
        zeros = sum(int((~m).sum()) for m in record.values())
        assert zeros == math.floor((1 - 0.2 ** (phase / 3)) * 208 + 1e-9)
        assert record.violations(mixed) == {}
        if before is not None:
            assert all(bool((record[n] <= before[n]).all()) for n in record)
        before = record
    assert before.sparsity() == pytest.approx(0.8, abs=1 / 208)
    assert sw.masks(model).violations(model) == {}


def test_the_next_phase_prunes_and_starts_from_the_soup():
    _, done = soup(phases=2, copies=2)
    mixed, after = (done.finished[n].into(net()) for n in ("phase 1", "phase 2"))
    assert done.finished["phase 2, copy 1"].description["start"] == done.finished["phase 1"].digest
    old, new = sw.masks(mixed), sw.masks(after)
    dropped = torch.cat([mixed[i].weight.abs()[(old[n] & ~new[n])] for n, i in PARTS])
    kept = torch.cat([mixed[i].weight.abs()[new[n]] for n, i in PARTS])
    assert dropped.numel() and dropped.max() <= kept.min()


PARTS = (("0.weight", 0), ("3.weight", 3))


def test_one_copy_is_iterative_magnitude_pruning():
    _, done = soup(phases=2, copies=1)
    assert list(done.finished) == ["phase 1, copy 1", "phase 2, copy 1"]


def test_a_greedy_soup_takes_what_does_not_lower_the_score():
    _, done = soup(phases=1, copies=4, merge="greedy", evaluate=score, vary="lr",
                   values=(0.1, 0.05, 3.0, 0.2))  # fmt: skip
    copies = [done.finished[f"phase 1, copy {j}"].into(net()) for j in (1, 2, 3, 4)]

    def mixed(taken):
        made = net()
        average(made, taken)
        made.train()
        made[1].reset_running_stats()
        made[1].momentum = None
        with torch.no_grad():
            for x in TRAIN:
                made(x)
        return score(made.eval())

    ranked = sorted(copies, key=lambda c: -mixed([c]))
    taken = ranked[:1]
    for candidate in ranked[1:]:
        if mixed([*taken, candidate]) >= mixed(taken):
            taken.append(candidate)
    assert done.result.figures["copies"] == len(taken) < 4
    assert done.result.figures["score"] == pytest.approx(mixed(taken), rel=1e-5)


def test_it_starts_from_the_masks_that_the_model_has():
    model = net()
    sw.prune(model, "magnitude", sparsity=0.5, include="*")
    before = sw.masks(model)
    soup(model, phases=1, copies=2)
    assert all(bool((sw.masks(model)[n] <= before[n]).all()) for n in before)


def test_models_of_different_masks_are_not_averaged():
    a, b = net(), net(2)
    for model in (a, b):
        sw.prune(model, "magnitude", sparsity=0.5, include="*")
    made = net()
    with pytest.raises(ModelError, match="less sparse"):
        average(made, [a, b])
    assert torch.equal(made[0].weight, net()[0].weight)


def test_bad_calls_are_refused_before_any_training():
    for options in (
        {"phases": 0}, {"copies": 0}, {"merge": "best"}, {"vary": "lr"},
        {"vary": "lr", "values": (0.1,)}, {"values": (1, 2, 3)}, {"merge": "greedy"},
        {"vary": "start", "values": (1, 2, 3)}, {"data": None}, {"sparsity": None},
    ):  # fmt: skip
        with pytest.raises(InvalidArgument, match="soup"):
            soup(**options)
