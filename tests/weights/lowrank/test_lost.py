"""LOST against its equations, and what its channels are."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.weights.lowrank.factoring import memory_of, merge
from sparseworks.weights.lowrank.lost import residual_norms


def model(width=12):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh(),
                         nn.Linear(16, 5)).double()  # fmt: skip


def test_the_split_of_the_weight_and_the_forward():
    net = model()
    weight, bias = net[0].weight.detach().clone(), net[0].bias.detach().clone()
    sw.transform(net, "lost", rank=4, sparsity=0.75, balance=False)
    layer = net[0]
    u, s, v = torch.linalg.svd(weight)
    low = u[:, :4] @ torch.diag(s[:4]) @ v[:4]
    rest = weight - low
    wanted = rest.norm(dim=0).topk(3).indices.sort().values
    assert layer.channels.tolist() == wanted.tolist()
    torch.testing.assert_close(layer.up @ layer.down, low)
    torch.testing.assert_close(layer.columns, rest[:, wanted])
    torch.testing.assert_close(layer.up.norm(dim=0), layer.down.norm(dim=1))  # an even split
    x = torch.randn(7, 12, dtype=torch.float64)
    path = F.silu(x @ layer.down.t()) @ layer.up.t()
    plain = 0.7 * path + 0.3 * x[:, wanted] @ layer.columns.t() + bias
    torch.testing.assert_close(layer(x), plain)


def test_norms_of_the_residual_by_columns():
    weight = torch.randn(9, 14, dtype=torch.float64)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    for count, last in ((None, 9), (2, 5)):
        part = u[:, 3:last] @ torch.diag(s[3:last]) @ v[3:last]
        torch.testing.assert_close(residual_norms(s, v, 3, count), part.norm(dim=0))


def test_the_start_is_as_large_as_the_dense_layer():
    for activation in ("silu", "identity"):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(),
                            nn.Linear(64, 2))  # fmt: skip
        x = torch.randn(512, 256)
        before = F.linear(x, net[0].weight).std()
        sw.transform(net, "lost", activation=activation, exclude="2")
        after = (net[0](x) - net[0].bias).std()
        assert abs(after / before - 1) < 0.05


def test_channels_of_an_uneven_weight_are_its_large_ones():
    net = model(40)
    with torch.no_grad():
        net[0].weight[:, [3, 17, 31]] *= 8
    sw.transform(net, "lost", rank=1, channels=3 / 40, include="0")
    assert net[0].channels.tolist() == [3, 17, 31]


def test_a_share_of_the_parameters_is_kept_to():
    net = model(40)
    sw.transform(net, "lost", rank=4, share=0.5, include=("0", "2"))
    for layer, size in ((net[0], 800), (net[2], 320)):
        told = layer.memory()
        used = (told.values + told.factors) // 8
        assert used <= size // 2 < used + layer.out_features
    net = model(40)
    with pytest.raises(InvalidArgument, match="leaves no channel"):
        sw.transform(net, "lost", rank=12, share=0.5)
    assert type(net[0]) is nn.Linear


def train(net, job):
    optimizer = torch.optim.AdamW(job.parameter_groups(), 0.01)
    job.attach(optimizer)
    for step in range(6):
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("activation", ["silu", "identity"])
def test_parts_compute_the_same_and_channels_stay_the_only_nonzeros(activation):
    net = model()
    job = sw.transform(net, "lost", rank=4, channels=0.2, activation=activation)
    optimizer = train(net, job)
    numbers = sum(v.numel() for s in optimizer.state.values() for v in s.values() if v.ndim)
    assert numbers == 2 * sum(p.numel() for p in net.parameters())
    told = memory_of(net)
    assert told.total < told.dense
    x = torch.randn(5, 12, dtype=torch.float64)
    wanted, chosen = net(x), net[2].channels.long()
    record = job.finish()
    torch.testing.assert_close(net(x), wanted)
    mask = record["2.sparse.weight"]
    assert mask[:, chosen].all() and mask.sum() == 16 * len(chosen)
    assert record.violations(net) == {}


def test_merging_is_exact_without_and_refused_with_an_activation():
    net = model()
    job = sw.transform(net, "lost", rank=4, activation="identity", after="merged")
    train(net, job)
    x = torch.randn(5, 12, dtype=torch.float64)
    wanted = net(x)
    job.finish()
    assert type(net[0]) is nn.Linear
    torch.testing.assert_close(net(x), wanted)
    net = model()
    sw.transform(net, "lost", rank=4)
    kinds = [type(m) for m in net]
    with pytest.raises(ModelError, match="SiLU"):
        merge(net)
    assert [type(m) for m in net] == kinds


def test_bad_options():
    for options, match in (
        ({"gamma": 1.0}, "gamma"), ({"channels": 0}, "channels"), ({"activation": "x"}, "silu"),
        ({"after": "merged"}, "identity"), ({"share": 2.0}, "share"), ({"rank": 99}, "rank=99"),
        ({"residual_rank": 0}, "residual_rank"),
    ):  # fmt: skip
        net = model()
        with pytest.raises(InvalidArgument, match=match):
            sw.transform(net, "lost", **options)
        assert type(net[0]) is nn.Linear
