"""The super-network and what is derived from it: the same function where the choice is certain."""

import pytest
import torch
from torch import nn

from sparseworks.core.errors import InvalidArgument
from sparseworks.models.zoo.supernet import (
    OPERATIONS,
    CellNetwork,
    SuperNetwork,
    random_genotype,
)

SIZES = {"cells": 3, "channels": 4, "in_channels": 1, "classes": 5}


@pytest.mark.parametrize("seed", range(4))
def test_a_certain_super_network_equals_its_derived_network(seed):
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    wanted = random_genotype(g, nodes=3)
    net = SuperNetwork(nodes=3, **SIZES)
    edges = [(i, j) for j in range(2, 5) for i in range(j)]
    with torch.no_grad():
        for alpha, part in ((net.alpha_normal, wanted.normal), (net.alpha_reduce, wanted.reduce)):
            alpha.fill_(-60.0)
            chosen = dict(part)
            for row, edge in enumerate(edges):
                alpha[row, OPERATIONS.index(chosen.get(edge, "none"))] = 60.0
    assert net.derive() == wanted
    assert all(len(part) == 6 for part in (wanted.normal, wanted.reduce))
    small = CellNetwork(wanted, **SIZES)
    for name, module in small.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.load_state_dict(net.get_submodule(name).state_dict())
    x = torch.randn(7, 1, 8, 8)
    torch.testing.assert_close(small(x), net(x), rtol=1e-3, atol=1e-4)


def test_an_edge_is_the_softmax_mixture_of_its_operations():
    torch.manual_seed(0)
    net = SuperNetwork(("conv3", "skip", "max_pool"), nodes=1, cells=1, channels=3).eval()
    with torch.no_grad():
        net.alpha_normal.normal_()
    x = torch.randn(2, 3, 6, 6)
    stem = net.stem(x)
    cell = net.cells[0]
    total = 0
    for row, source in enumerate((cell.before(stem), cell.now(stem))):
        weights = net.alpha_normal[row].exp() / net.alpha_normal[row].exp().sum()
        conv, skip, pool = cell.edges[f"{row}_2"].values()
        assert isinstance(skip, nn.Identity)
        total = total + weights[0] * conv(source) + weights[1] * source + weights[2] * pool(source)
    torch.testing.assert_close(net(x), net.head(total.mean((2, 3))))


def test_none_is_never_derived_and_two_strongest_edges_stay():
    net = SuperNetwork(("none", "skip", "conv3"), nodes=2, cells=3)
    with torch.no_grad():
        net.alpha_normal.copy_(torch.tensor(
            [[9.0, 0, 1], [0, 1, 0], [0, 0, 3.0], [0, 2.0, 0], [5.0, 1, 0]]
        ))  # fmt: skip
    found = dict(net.derive().normal)
    assert found == {(0, 2): "conv3", (1, 2): "skip", (0, 3): "conv3", (1, 3): "skip"}
    assert net.derive().share("skip") >= 0.25


def test_bad_operations_are_refused():
    with pytest.raises(InvalidArgument, match="operations"):
        SuperNetwork(("conv9",))
