"""SAP against a loop written from the paper's formulas, and the laws of a driver."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument
from sparseworks.weights.dynamic.sap import SAP, drop_smallest

STEPS = 15


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(),
                         nn.Linear(16, 4))  # fmt: skip


def batch(seed, step):
    g = torch.Generator().manual_seed(1000 * seed + step)
    x = torch.randn(16, 12, generator=g)
    return x, (x[:, :4] + 0.3 * x[:, 4:8]).argmax(1)


def fit(model, *, start=None, seed=0, first_step=0):
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
    run = start(model, optimizer, STEPS) if start is not None else None
    for step in range(first_step, STEPS):
        x, y = batch(seed, step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    if run is not None:
        run.finish()


def sap_by_hand(rounds, scope, p, q, eta, gamma, beta):
    """The oracle: Python loops over units, norms as the paper writes them, masks by multiplying."""
    initial = net()
    masks = [torch.ones(20, 12), torch.ones(16, 20)]
    sizes = []
    for t in range(rounds + 1):
        model = copy.deepcopy(initial)
        layers = [model[0], model[2]]
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
        with torch.no_grad():
            for layer, m in zip(layers, masks):
                layer.weight *= m
        for step in range(STEPS):
            x, y = batch(0, step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            for layer, m in zip(layers, masks):
                layer.weight.grad *= m
            optimizer.step()
        if t == rounds:
            return model, masks, sizes
        cells = [  # (layer, row, column) of every unit
            [(a, i, j) for a in range(2) for i in range(len(masks[a]))
             for j in range(masks[a].shape[1])]
        ]  # fmt: skip
        if scope == "layer":
            cells = [[c for c in cells[0] if c[0] == a] for a in range(2)]
        elif scope == "neuron":
            cells = [[c for c in cells[0] if c[:2] == (a, i)]
                     for a in range(2) for i in range(len(masks[a]))]  # fmt: skip
        for unit in cells:
            alive = [c for c in unit if masks[c[0]][c[1], c[2]] > 0]
            size = {c: abs(float(layers[c[0]].weight.data[c[1], c[2]])) for c in alive}
            d = len(alive)
            if d == 0:
                continue
            low = sum(s**p for s in size.values()) ** (1 / p)
            high = sum(s**q for s in size.values()) ** (1 / q)
            index = 1 - d ** (1 / q - 1 / p) * low / high
            r = d * (1 + eta) ** (-q / (q - p)) * (1 - index) ** (q * p / (q - p))
            share = min(max(gamma * (1 - math.ceil(r - 1e-9) / d), 0), beta)
            count = math.floor(d * share + 1e-9)
            for c in sorted(alive, key=size.get)[:count]:
                masks[c[0]][c[1], c[2]] = 0
        sizes.append(sum(int(m.sum()) for m in masks))
    raise AssertionError


@pytest.mark.parametrize("scope", ["neuron", "layer", "global"])
@pytest.mark.parametrize("powers", [(0.5, 1.0, 0.0, 1.0, 0.9), (1.0, 2.0, 1e-3, 2.0, 0.3)])
def test_equals_the_loop_by_hand(scope, powers):
    p, q, eta, gamma, beta = powers
    expected, masks, sizes = sap_by_hand(3, scope, *powers)
    model = net()
    done = sw.experiment(
        fit, model, "sap", rounds=3, scope=scope, p=p, q=q, eta=eta, gamma=gamma, beta=beta
    )
    record = sw.masks(model)
    assert set(record) == {"0.weight", "2.weight"}
    for name, mask in zip(("0.weight", "2.weight"), masks):
        assert torch.equal(record[name], mask.bool())
    for a, b in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(a, b)
    total = 20 * 12 + 16 * 20
    kept = [round(total * (1 - r.figures["sparsity"])) for r in done.finished.values()]
    assert kept == [total, *sizes]
    assert kept[-1] < kept[0]
    assert record.violations(model) == {}


def test_masks_never_grow_and_a_huge_gamma_is_the_lottery_ticket_loop():
    model = net()
    done = sw.experiment(fit, model, "sap", rounds=4, gamma=1e12, beta=0.2)
    before, alive = None, 20 * 12 + 16 * 20
    for run in list(done.finished.values())[1:]:
        record = sw.masks(run.into(net()))
        alive -= math.floor(0.2 * alive + 1e-9)
        assert sum(int(m.sum()) for m in record.values()) == alive
        if before is not None:
            assert all(not bool((record[n] & ~before[n]).any()) for n in record)
        before = record


def test_every_round_starts_from_the_initialisation():
    seen = []

    def spying(model, *, start, seed, first_step):
        seen.append(copy.deepcopy(model.state_dict()))
        fit(model, start=start, seed=seed, first_step=first_step)

    sw.experiment(spying, net(), "sap", rounds=2)
    first = net().state_dict()
    assert len(seen) == 3
    for state in seen:
        for name, value in state.items():
            kept = value != 0
            assert torch.equal(value[kept], first[name][kept])
    assert int((seen[2]["0.weight"] == 0).sum()) > int((seen[1]["0.weight"] == 0).sum()) > 0


def test_sparsity_zero_is_plain_training():
    model, plain = net(), net()
    sw.experiment(fit, model, "sap", sparsity=0.0, rounds=3)
    fit(plain)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters()))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_target_is_met_exactly_and_ends_the_rounds(scope):
    model = net()
    done = sw.experiment(fit, model, "sap", sparsity=0.4, rounds=30, scope=scope)
    total = 20 * 12 + 16 * 20
    assert sum(int((~m).sum()) for m in sw.masks(model).values()) == int(0.4 * total)
    assert len(done.finished) < 30


def test_units_too_small_to_give_anything_are_said_to_fall_short():
    model = net()
    with pytest.warns(UserWarning, match="wider scope"):
        done = sw.experiment(fit, model, "sap", sparsity=0.4, rounds=30, scope="neuron")
    assert 0 < sw.masks(model).sparsity() < 0.4
    assert len(done.finished) < 30


def test_the_same_seed_the_same_result_and_kept_runs_are_not_trained_again(tmp_path):
    calls = []

    def counted(model, **given):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        fit(model, **given)

    options = {"rounds": 3, "folder": tmp_path, "about": {"steps": STEPS}}
    with pytest.raises(KeyboardInterrupt):
        sw.experiment(counted, net(), "sap", **options)
    resumed, whole, other = net(), net(), net()
    sw.experiment(counted, resumed, "sap", **options)
    assert len(calls) == 3 + 2  # the two finished runs were found
    sw.experiment(fit, whole, "sap", rounds=3)
    sw.experiment(fit, other, "sap", rounds=3, seed=1)
    for a, b in zip(resumed.parameters(), whole.parameters()):
        assert torch.equal(a, b)
    assert not torch.equal(whole[0].weight, other[0].weight)


def test_equal_weights_give_nothing_up_and_end_the_experiment():
    model = net()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.1)

    def still(model, *, start, seed, first_step):
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        start(model, optimizer, 1)
        optimizer.step()

    done = sw.experiment(still, model, "sap", rounds=5)
    assert list(done.finished) == ["dense"]


def test_drop_smallest_by_brute_force():
    g = torch.Generator().manual_seed(0)
    w = torch.randint(-3, 4, (7, 9), generator=g).float()  # many ties
    kept = torch.rand(7, 9, generator=g) < 0.7
    counts = (kept.sum(1) * torch.rand(7, generator=g)).long()
    found = drop_smallest(w, kept, counts)
    for i in range(7):
        alive = [j for j in range(9) if kept[i, j]]
        gone = sorted(alive, key=lambda j: (abs(float(w[i, j])), -j))[: int(counts[i])]
        assert [j for j in range(9) if found[i, j]] == [j for j in alive if j not in gone]


@pytest.mark.parametrize(
    "options,message",
    [
        ({"p": 1.0}, "0 < p < q"),
        ({"scope": "channel"}, "scope='channel'"),
        ({"rounds": 0}, "rounds=0"),
        ({"beta": 1.0}, "beta=1.0"),
        ({"gamma": 0.0}, "gamma=0.0"),
        ({"eta": -0.1}, "eta=-0.1"),
        ({"pattern": "2:4"}, "single weights"),
        ({"budget": "uniform"}, "choose `scope`"),
    ],
)
def test_misuse_trains_nothing(options, message):
    def never(model, **_):
        raise AssertionError("trained")

    with pytest.raises(InvalidArgument, match=message):
        sw.experiment(never, net(), "sap", **options)


def test_counts_of_units_without_survivors_or_with_zeros():
    method = SAP()
    w = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [5.0, 0.0, 0.0]])
    kept = torch.ones_like(w, dtype=torch.bool)
    kept[0] = False
    assert method.counts(w, kept).tolist() == [0, 0, 0, 2]
