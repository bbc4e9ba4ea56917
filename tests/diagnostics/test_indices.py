"""The spread of a model's weights counts what its record keeps, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.diagnostics.metrics import get_metric


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 14), nn.ReLU(), nn.Linear(14, 11), nn.ReLU(),
                         nn.Linear(11, 3))  # fmt: skip


def plain(values, name):
    size = sorted(abs(float(v)) for v in values)
    d = len(size)
    if name == "gini":
        return sum((2 * i - d - 1) * x for i, x in enumerate(size, 1)) / (d * sum(size))
    return 1 - sum(x**0.5 for x in size) ** 2 / d / sum(size)


@pytest.mark.parametrize("name", ["pq-index", "gini"])
def test_of_dense_and_sparse_models(name):
    model = net()
    metric = get_metric(name, model=model)
    layers = [model[0].weight.data, model[2].weight.data]  # the head is not pruned
    assert metric(model) == pytest.approx(plain(torch.cat([w.flatten() for w in layers]), name))
    sw.prune(model, "magnitude", sparsity=0.6)
    left = torch.cat([w[w != 0] for w in layers])
    assert metric(model) == pytest.approx(plain(left, name))
    with torch.no_grad():  # a regrown weight is 0 and counts; a masked one does not
        mask = sw.masks(model)["0.weight"]
        row, column = mask.nonzero()[0].tolist()
        model[0].weight[row, column] = 0.0
    kept = torch.cat([w[sw.masks(model)[n]] for w, n in zip(layers, ("0.weight", "2.weight"))])
    assert metric(model) == pytest.approx(plain(kept, name))
