"""`slim` with methods that train: what they take, what is refused, what a failure leaves."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparseworks as sw
from sparseworks.core.errors import DataError, InvalidArgument
from sparseworks.models.coupling import trace
from sparseworks.weights.structured import load_slim, save_slim

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 3
DATA = [(X, Y)] * 4


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 3)).train()


class Epochs:
    """Data that are functions of the epoch."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return 4

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        self.asked.append(number)
        return iter(DATA)


def test_the_result_is_that_of_any_other_cut(tmp_path: Any) -> None:
    model, data = net(), Epochs()
    done = sw.slim(model, X, method="wgsef", data=data, epochs=3, keep=0.5, strength=20.0)
    assert data.asked == [0, 1, 2]
    [width] = done.widths
    assert width.before == 12 and width.after == model[0].out_features == model[3].in_features
    assert done.flops[1] == trace(model, X).flops() and done.flops[0] == 2 * 16 * (6 * 12 + 12 * 3)
    assert done.parameters[1] == sum(p.numel() for p in model.parameters())
    assert {(c.module, c.attribute) for c in done.changes} == {
        ("0", "out_features"), ("3", "in_features"),
    }  # fmt: skip
    assert model.training and model[2].training and all(p.grad is None for p in model.parameters())
    save_slim(done, tmp_path / "small")
    again = load_slim(tmp_path / "small", net())
    assert torch.equal(again(X), model.eval()(X))


def test_the_loss_of_the_call_is_trained_on() -> None:
    asked = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        asked.append(model)
        return F.cross_entropy(model(batch[0]), batch[1])

    model = net()
    sw.slim(model, X, method="wgsef", data=DATA, epochs=2, loss=loss)
    assert asked == [model] * 8


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"epochs": 1}, "give data="),
        ({"data": DATA}, "and epochs="),
        ({"data": DATA, "epochs": 0}, "epochs=0"),
        ({"data": [], "epochs": 1}, "no training batches"),
        ({"data": DATA, "epochs": 1, "flops": 0.5}, "flops= is not for it"),
        ({"data": DATA, "epochs": 1, "iterations": 2}, "iterations= is not for it"),
        ({"data": DATA, "epochs": 1, "floor": 0.2}, "floor= is not for it"),
        ({"data": DATA, "epochs": 1, "keep": 2.0}, "keep="),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(given: Any, words: str) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((InvalidArgument, DataError), match=words):
        sw.slim(model, X, method="wgsef", **given)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_masks_would_not_hold_and_scores_do_not_train() -> None:
    model = net()
    with pytest.raises(InvalidArgument, match="does not train"):
        sw.slim(model, X, flops=0.5, data=DATA, epochs=2)
    sw.prune(model, "magnitude", sparsity=0.5)
    with pytest.raises(InvalidArgument, match="the model has masks"):
        sw.slim(model, X, method="wgsef", data=DATA, epochs=1)


def test_a_training_between_rounds_that_fails_is_undone_whole() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())

    def recover(net: nn.Module, number: int) -> None:
        with torch.no_grad():
            for p in net.parameters():  # also what no cut has touched
                p.add_(1.0)
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        sw.slim(model, X, params=0.5, iterations=2, recover=recover)
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
