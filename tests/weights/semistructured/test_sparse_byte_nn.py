"""One call permutes and prunes; what fails is undone; the order is fixed from then on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.masks import masks
from sparseworks.models.views import find_prunable
from sparseworks.weights.semistructured.rearranging import rearrange

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in ((3, 16), (16, 32), (32, 22)):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(22, 4))
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
        if isinstance(module, nn.Conv2d):
            module.weight.data.mul_(torch.rand(len(module.weight), 1, 1, 1) + 0.1)
    return model.eval()


def retained(model: nn.Module) -> float:
    return sum(float(v.matrix().abs().sum()) for v in find_prunable(model))


@pytest.mark.parametrize("pattern, size", [("shared4", 4), ("shared8-balanced", 8)])
def test_equals_magnitude_on_the_rearranged_model(pattern, size):
    model = network()
    apart, plain = copy.deepcopy(model), copy.deepcopy(model)
    result = sw.prune(model, "sparse-byte-nn", sparsity=0.5, pattern=pattern, data=[X])
    rearrange(apart, X, sparsity=0.5, pattern=pattern)
    sw.prune(apart, "magnitude", sparsity=0.5, pattern=pattern)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, apart.state_dict()[name])
    sw.prune(plain, "magnitude", sparsity=0.5, pattern=pattern)
    assert retained(model) > 1.01 * retained(plain)
    assert {t.name for t in result.tensors} == {"0.weight", "3.weight", "6.weight"}
    for view in find_prunable(model):
        kept = view.matrix() != 0
        for first in range(0, len(kept), size):
            group = kept[first : first + size]
            assert bool((group == group[0]).all())


def test_the_short_last_group_and_the_number_of_units():
    model = network()
    sw.prune(model, "sparse-byte-nn", sparsity=0.5, data=[X], include=["6"])
    kept = find_prunable(model, include=["6"])[0].matrix() != 0
    groups = [kept[i : i + 4] for i in range(0, 22, 4)]
    assert len(groups[-1]) == 2
    assert sum(int(g[0].sum()) for g in groups) == 6 * 288 // 2


def test_the_squared_score_and_a_global_budget():
    model = network()
    sw.prune(model, "sparse-byte-nn", sparsity=0.6, data=[X], power=2.0, budget="global")
    record = masks(model)
    assert record is not None
    assert record.sparsity() == pytest.approx(0.6, abs=0.03)
    assert len({round(record.entry(n).sparsity, 3) for n in record}) > 1


def test_a_failed_call_puts_the_order_back():
    model = network()
    before = {n: t.clone() for n, t in model.state_dict().items()}

    def stop(done: int, total: int, what: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sw.prune(model, "sparse-byte-nn", sparsity=0.5, data=[X], progress=stop)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert masks(model) is None


def test_a_second_call_keeps_the_order_and_the_zeros():
    model = network()
    sw.prune(model, "sparse-byte-nn", sparsity=0.5, data=[X])
    first = {v.name: v.matrix().clone() for v in find_prunable(model)}
    result = sw.prune(model, "sparse-byte-nn", sparsity=0.75, data=[X])
    assert any("it stays" in w for w in result.warnings)
    for view in find_prunable(model):
        left = view.matrix() != 0
        assert torch.equal(view.matrix()[left], first[view.name][left])


def test_a_model_that_cannot_be_followed_is_pruned_in_its_own_order():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.a(x))
            out: Tensor = self.b(y if float(y.sum()) > 0 else -y)
            return out

    model = Branching()
    twin = copy.deepcopy(model)
    result = sw.prune(model, "sparse-byte-nn", sparsity=0.5, data=[torch.randn(2, 6)])
    sw.prune(twin, "magnitude", sparsity=0.5, pattern="shared4")
    assert any("stay in their order" in w for w in result.warnings)
    assert torch.equal(model.a.weight, twin.a.weight)


def test_gradual_training_keeps_the_groups():
    model = network()
    sw.rearrange(model, X, sparsity=0.5, pattern="shared4")
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    run = sw.sparsify(
        model, optimizer, "gradual", steps=12, sparsity=0.5, pattern="shared4", every=3
    )
    for _ in range(12):
        optimizer.zero_grad()
        F.cross_entropy(model(X), torch.tensor([0, 1])).backward()
        optimizer.step()
    record = run.finish()
    assert record.sparsity() == pytest.approx(0.5, abs=0.03)
    for view in find_prunable(model):
        kept = view.matrix(record[view.name])
        for first in range(0, len(kept), 4):
            assert bool((kept[first : first + 4] == kept[first]).all())


def test_refused():
    model = network()
    before = model[0].weight.clone()
    with pytest.raises(InvalidArgument, match="no groups of outputs"):
        sw.prune(model, "sparse-byte-nn", sparsity=0.5, pattern="unstructured", data=[X])
    with pytest.raises(InvalidArgument, match="calibration batches"):
        sw.prune(model, "sparse-byte-nn", sparsity=0.5)
    with pytest.raises(InvalidArgument, match="power=0"):
        sw.prune(model, "sparse-byte-nn", sparsity=0.5, power=0, data=[X])
    assert torch.equal(model[0].weight, before)
