"""Laws of slimming: budgets are met, nothing changes on failure, folding is exact where it says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import sparseworks as sw
from sparseworks.core.errors import DataError, InvalidArgument
from sparseworks.core.masks import Masks, attach, masks
from sparseworks.models.coupling import trace
from sparseworks.models.zoo import CifarResNet
from sparseworks.weights.structured import export_onnx, latency, onnx_latency
from sparseworks.weights.structured.recovery import finetune, reestimate
from sparseworks.weights.structured.scores import GroupNorm

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
DATA = [(IMAGES, torch.tensor([0, 1, 2, 3]))]
METHODS = ["group-norm", "group-random", "group-bn", "group-taylor", "group-fisher", "group-energy"]


def small(seed: int = 0) -> CifarResNet:
    torch.manual_seed(seed)
    model = CifarResNet(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 1.0)
            nn.init.normal_(module.bias)
    return model.eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", ["flops", "params"])
def test_every_score_meets_every_budget(method: str, budget: str) -> None:
    model = small()
    result = sw.slim(model, IMAGES, method=method, data=DATA, **{budget: 0.6})
    before, after = result.flops if budget == "flops" else result.parameters
    assert 0.5 * before < after <= 0.6 * before
    assert model(IMAGES).shape == (4, 10)
    assert result.parameters[1] == sum(p.numel() for p in model.parameters())


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.floats(0.2, 0.95), st.sampled_from([1, 2, 4, 8]))
def test_widths_are_multiples_and_keep_their_floor(share: float, multiple: int) -> None:
    model = small()
    try:
        result = sw.slim(model, IMAGES, flops=share, round_to=multiple, floor=0.25, verify=False)
    except InvalidArgument as error:
        assert "cannot fall" in str(error)
        return
    assert result.flops[1] <= share * result.flops[0]
    for width in result.widths:
        assert width.after % multiple == 0 and width.after >= 0.25 * width.before


def test_a_copy_leaves_the_model_as_it_was() -> None:
    model = small()
    before = copy.deepcopy(model.state_dict())
    result = sw.slim(model, IMAGES, flops=0.5, copy=True)
    assert result.model is not model
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_failure_in_a_later_round_undoes_all_rounds() -> None:
    model = small()
    before = copy.deepcopy(model.state_dict())

    def stop(model: nn.Module, done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sw.slim(model, IMAGES, flops=0.5, iterations=3, recover=stop, data=DATA)
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert model.layer1[0].conv1.out_channels == 16


def test_rounds_end_at_the_same_budget() -> None:
    result = sw.slim(small(), IMAGES, flops=0.5, iterations=3)
    assert 0.45 * result.flops[0] < result.flops[1] <= 0.5 * result.flops[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "exactly one"),
        ({"flops": 0.5, "params": 0.5}, "exactly one"),
        ({"flops": 1.5}, "between 0 and 1"),
        ({"flops": 0.5, "floor": 1.0}, "floor"),
        ({"flops": 0.5, "include": "nothing.*"}, "matches no parameter"),
        ({"flops": 0.5, "method": "group-nrm"}, "did you mean"),
        ({"flops": 0.5, "method": "wanda"}, "is one-shot, not structured"),
        ({"flops": 0.5, "method": "group-taylor"}, "give data="),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises((InvalidArgument, DataError), match=words):
        sw.slim(small(), IMAGES, **options)


class ConstantChannels(nn.Module):
    """Scale 0 in batch norm: the channel says relu(beta) and no more."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.b, self.c = nn.Conv2d(8, 6, 3, bias=False), nn.Linear(6, 4)
        self.bn2 = nn.BatchNorm2d(6)
        with torch.no_grad():
            self.bn.bias.uniform_(0.5, 1.0)
            self.bn.weight[4:] = 0

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn2(self.b(F.relu(self.bn(self.a(x))))))
        return self.c(y.mean((2, 3)))


@pytest.mark.parametrize("fold", ["mean", "exact"])
def test_folding_constant_channels_is_exact(fold: str) -> None:
    torch.manual_seed(0)
    model = ConstantChannels().eval()
    expected = model(IMAGES).detach()
    result = sw.slim(
        model, IMAGES, flops=0.55, method="group-bn", include="bn.*", data=[IMAGES], fold=fold
    )
    assert [w.after for w in result.widths] == [4]
    torch.testing.assert_close(model(IMAGES), expected, rtol=1e-4, atol=1e-5)


def test_without_folding_the_same_cut_changes_the_output() -> None:
    torch.manual_seed(0)
    model = ConstantChannels().eval()
    expected = model(IMAGES).detach()
    sw.slim(model, IMAGES, flops=0.55, method="group-bn", include="bn.*", fold="none")
    assert float((model(IMAGES) - expected).abs().max()) > 1e-3


class Echoes(ConstantChannels):
    """Channels 4 to 7 are 0 to 3 at a third of their size, after relu too."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.a.weight[4:] = self.a.weight[:4]
            self.bn.weight[4:] = self.bn.weight[:4] / 3
            self.bn.bias[4:] = self.bn.bias[:4] / 3
            if self.a.bias is not None:
                self.a.bias[4:] = self.a.bias[:4]


def test_channels_that_others_tell_are_folded_into_the_weights() -> None:
    errors = {}
    for fold in ("none", "mean", "linear"):
        torch.manual_seed(0)
        model = Echoes().eval()
        expected = model(IMAGES).detach()
        sw.slim(
            model, IMAGES, flops=0.55, method="group-bn", include="bn.*", data=[IMAGES], fold=fold
        )
        errors[fold] = float((model(IMAGES) - expected).norm() / expected.norm())
    assert errors["linear"] < 1e-3 < 0.1 * errors["mean"] and errors["mean"] < errors["none"]


@pytest.mark.parametrize("fold", ["none", "linear"])
def test_masks_are_cut_with_their_weights(fold: str) -> None:
    model = small()
    sw.prune(model, "magnitude", sparsity=0.5)
    sw.slim(model, IMAGES, flops=0.5, data=[IMAGES], fold=fold)
    record = masks(model)
    assert record is not None
    record.check(model)
    assert not any(record.violations(model).values())


def test_fine_tuning_with_a_teacher_lowers_its_loss() -> None:
    dense = small()
    model = sw.slim(dense, IMAGES, flops=0.5, copy=True).model
    with torch.no_grad():
        before = float(F.mse_loss(model(IMAGES), dense(IMAGES)))
    done = finetune(
        model, lambda e: DATA, epochs=30, steps_per_epoch=1, lr=0.02, teacher=dense, weight=1.0
    )
    reestimate(model, DATA)
    with torch.no_grad():
        assert float(F.mse_loss(model(IMAGES), dense(IMAGES))) < before
    assert done.steps == 30 and not model.training


def test_latency_and_onnx_run(tmp_path: Any) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = sw.slim(small(), IMAGES, flops=0.5).model
    path = export_onnx(model, IMAGES, tmp_path / "m.onnx")
    assert onnx_latency(path, IMAGES, 1) > 0 and latency(model, IMAGES, 1) > 0
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_attaching_masks_of_other_shapes_is_never_done() -> None:
    model = small()
    attach(model, Masks.of({"linear.weight": torch.ones(10, 64, dtype=torch.bool)}))
    with pytest.raises(InvalidArgument):
        sw.slim(model, IMAGES, flops=0.001)
    assert masks(model) is not None and masks(model)["linear.weight"].shape == (10, 64)


def test_the_squared_norm_is_the_sum_of_squares_of_a_group() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    coupling = trace(model, torch.randn(2, 6))
    squares = GroupNorm(root=False).score(model, coupling, None, None)
    norms = GroupNorm().score(model, coupling, None, None)
    labels = coupling.axes["0.weight", 0]
    with torch.no_grad():
        wanted = model[0].weight.square().sum(1) + model[2].weight.square().sum(0)
    torch.testing.assert_close(
        torch.from_numpy(squares)[labels].float(), wanted, rtol=1e-5, atol=1e-6
    )
    assert torch.allclose(torch.from_numpy(norms) ** 2, torch.from_numpy(squares))
