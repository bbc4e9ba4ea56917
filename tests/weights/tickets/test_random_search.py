"""Random search: node masks are smaller networks, the best of the draws wins, controls are fair."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.models.views import find_prunable
from sparseworks.weights.tickets.nodes import NodeSampler
from sparseworks.weights.tickets.random_search import random_search

SIZES = (6, 12, 10, 4)


def mlp(sizes=SIZES):
    torch.manual_seed(0)
    layers = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def batches(count=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(16, 6, generator=g), torch.randint(0, 4, (16,), generator=g))
        for _ in range(count)
    ]


def fit(model, *, start, seed, first_step):
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    start(model, optimizer, 6)
    for x, y in batches(6, seed):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def accuracy(model):
    x, y = batches(1, 9)[0]
    return float((model(x).argmax(1) == y).float().mean())


def smaller(model, record):
    """The network without the masked nodes, cut by plain indexing."""
    linears = [m for m in model if isinstance(m, nn.Linear)]
    masks = [record[f"{2 * i}.weight"] for i in range(len(linears))]
    stay = [torch.arange(linears[0].in_features)]
    stay += [torch.nonzero(m.any(dim=1)).flatten() for m in masks[:-1]]
    stay.append(torch.arange(linears[-1].out_features))
    small = mlp([len(s) for s in stay])
    with torch.no_grad():
        for old, new, rows, columns in zip(
            linears, [m for m in small if isinstance(m, nn.Linear)], stay[1:], stay
        ):
            new.weight.copy_(old.weight[rows][:, columns])
            new.bias.copy_(old.bias[rows])
    return small


@given(st.integers(0, 99).map(lambda p: p / 100), st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_a_node_mask_is_a_smaller_network(sparsity, number):
    model = mlp()
    sampler = NodeSampler(model, list(find_prunable(model)), batches()[0], sparsity)
    record = sampler.draw(0, number)
    x = batches(1, 5)[0][0]
    for i, width in enumerate(SIZES[1:-1]):
        kept = max(1, round((1 - sparsity) * width))
        made, read = record[f"{2 * i}.weight"], record[f"{2 * i + 2}.weight"]
        assert int(made.any(dim=1).sum()) == kept
        assert torch.equal(made.any(dim=1), read.any(dim=0))
    assert bool(record["0.weight"].any(dim=0).all())  # inputs stay
    assert bool(record["4.weight"].any(dim=1).all())  # logits stay
    small = smaller(model, record)
    record.apply(model)
    torch.testing.assert_close(model(x), small(x))


def test_every_node_is_drawn_equally_often():
    model = mlp()
    sampler = NodeSampler(model, list(find_prunable(model)), batches()[0], 0.5)
    drawn = sum(sampler.draw(3, i)["0.weight"].any(dim=1).double() for i in range(400))
    assert torch.all((drawn - 200).abs() < 5 * (400 * 0.25) ** 0.5)


def test_masked_nodes_stay_dead_through_training():
    model = mlp()
    sampler = NodeSampler(model, list(find_prunable(model)), batches()[0], 0.5)
    record = sampler.draw(0, 0)
    done = sw.experiment(
        fit, model, "random-search", sparsity=0.5, data=batches(), candidates=1, include="*"
    )
    assert done.result.name == "winner"
    assert {n: m.tolist() for n, m in sw.masks(model).items()} == {
        n: m.tolist() for n, m in record.items()
    }
    assert sw.masks(model).violations(model) == {}
    x = batches(1, 5)[0][0]
    torch.testing.assert_close(model(x), smaller(model, record)(x))


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_the_search_keeps_the_first_of_the_lowest(scores):
    found = random_search(lambda i: i, lambda i: scores[i], len(scores))
    assert found.best == found.index == scores.index(min(scores))
    assert found.scores == tuple(scores)


@pytest.mark.parametrize("unit", ["nodes", "weights"])
def test_the_winner_has_the_lowest_initial_loss(unit):
    model = mlp()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    data = batches()

    @torch.no_grad()
    def loss(record):
        model.load_state_dict(before)
        record.apply(model)
        return sum(float(F.cross_entropy(model(x), y)) for x, y in data) / len(data)

    done = sw.experiment(
        fit, model, "random-search", sparsity=0.5, data=data, candidates=12, controls=2, unit=unit,
        evaluate=accuracy,
    )  # fmt: skip
    assert list(done.finished) == ["winner", "random 1", "random 2", "dense"]
    fresh = mlp()
    records = {n: sw.masks(r.into(fresh)) for n, r in done.finished.items() if n != "dense"}
    least = loss(records["winner"])
    assert done.figures["winner's score"] == pytest.approx(least, abs=1e-5)
    assert done.figures["mean score"] > least
    if unit == "nodes":
        sampler = NodeSampler(mlp(), list(find_prunable(mlp())), data[0], 0.5)
        drawn = [loss(sampler.draw(0, i)) for i in range(12)]
        assert least == pytest.approx(min(drawn), abs=1e-5)
        assert done.figures["mean score"] == pytest.approx(sum(drawn) / 12, abs=1e-5)
    else:
        assert all(r.sparsity() == 0.5 for r in records.values())
    scores = [done.finished[n].figures["score"] for n in ("winner", "random 1", "random 2")]
    assert done.figures["winner - random"] == pytest.approx(scores[0] - (scores[1] + scores[2]) / 2)


def test_other_scores_and_batch_norm():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 3)
    )
    g = torch.Generator().manual_seed(0)
    data = [(torch.randn(8, 1, 4, 4, generator=g), torch.randint(0, 3, (8,), generator=g))]

    def train(net, *, start, seed, first_step):
        optimizer = torch.optim.SGD(net.parameters(), 0.05)
        start(net, optimizer, 1)
        F.cross_entropy(net(data[0][0]), data[0][1]).backward()
        optimizer.step()

    for by in ("error", "flatness"):
        done = sw.experiment(
            train, model, "random-search", sparsity=0.5, data=data, candidates=5, by=by
        )
        assert done.figures["winner's score"] <= done.figures["mean score"]
        assert 0 <= done.figures["winner's accuracy before training"] <= 100


def test_misuse_is_refused():
    for options in ({"candidates": 0}, {"controls": -1}, {"unit": "heads"}, {"by": "luck"}):
        with pytest.raises(InvalidArgument, match="random-search"):
            sw.methods.RandomSearch(**options)
    with pytest.raises(InvalidArgument, match="needs `sparsity`"):
        sw.experiment(fit, mlp(), "random-search", sparsity=0.5)
    with pytest.raises(InvalidArgument, match="NaN"):
        random_search(lambda i: i, lambda i: float("nan"), 2)
    with pytest.raises(ModelError, match="no hidden nodes"):
        linear = nn.Sequential(nn.Linear(6, 4))
        NodeSampler(linear, list(find_prunable(linear, "*")), batches()[0], 0.5)
