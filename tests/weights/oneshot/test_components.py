"""A pipeline whose parts bear different sparsities: each gets its own, and quality is kept."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import sparseworks as sw
from sparseworks.core.errors import DataError, InvalidArgument
from sparseworks.core.masks import masks
from sparseworks.weights.oneshot.components import Components, find_cliff


class Pipe(nn.Module):
    """A redundant reader (most weights tiny) and a writer that needs all of its weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reader, self.writer = nn.Linear(10, 10), nn.Linear(10, 20)
        with torch.no_grad():
            self.reader.weight.mul_(1e-4).fill_diagonal_(1.0)
            self.writer.weight.copy_(torch.sign(torch.randn(20, 10)))

    def forward(self, x: Tensor) -> Tensor:
        return self.writer(self.reader(x))


X = torch.randn(64, 10, generator=torch.Generator().manual_seed(1))
PARTS = {"reader": "reader", "writer": "writer"}


def quality_to(dense: nn.Module):  # type: ignore[no-untyped-def]
    expected = dense(X).detach()
    return lambda m: -float((m(X).detach() - expected).square().mean())


def test_the_cliff_is_the_last_point_before_the_fall() -> None:
    s = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert find_cliff(s, [1.0, 0.99, 0.98, 0.97, 0.5, 0.4], 0.0) == 3  # 47 times the usual slope
    assert find_cliff(s, [1.0, 0.99, 0.98, 0.97, 0.96, 0.95], 0.965) == 3  # below what is wanted
    assert find_cliff(s, [1.0, 0.99, 0.98, 0.97, 0.96, 0.95], 0.0) == 5  # none
    assert find_cliff(s, [1.0, 0.99, 0.98, 0.97, 1.5, 1.5], 0.0) == 5  # rising is no fall
    assert find_cliff(s, [1.0, 1.0, 1.0, 0.99, 0.98, 0.9], 0.0) == 5  # it only stirs
    assert find_cliff(s, [1.0, 0.2, 0.1, 0.1, 0.1, 0.1], 0.5) == 0


def test_each_component_gets_what_it_bears() -> None:
    model = Pipe()
    found = Components(step=0.1, most=0.9).search(model, PARTS, quality_to(Pipe()), least=-1e-3)
    assert found.sparsity["reader"] == pytest.approx(0.9)
    assert found.sparsity["writer"] == 0.0
    assert found.overall == pytest.approx(0.9 * 100 / 300)
    assert int((model.reader.weight == 0).sum()) == 90 and bool((model.writer.weight != 0).all())
    record = masks(model)
    assert record is not None and int((~record["reader.weight"]).sum()) == 90
    assert quality_to(Pipe())(model) == pytest.approx(found.quality) and found.quality >= -1e-3


def test_the_choice_is_the_best_of_the_grid_below_the_cliffs() -> None:
    model, dense = Pipe(), Pipe()
    torch.manual_seed(3)
    for part in (model, dense):
        with torch.no_grad():
            part.writer.weight.copy_(torch.linspace(0, 1, 200).view(20, 10))
    quality = quality_to(dense)
    method = Components(step=0.15, most=0.9, below=3)
    found = method.search(copy.deepcopy(model), PARTS, quality, least=-0.02)
    best = 0.0
    steps = (0, 1, 2, 3, None)  # below the cliff; None: dense
    for a, b in itertools.product(steps, steps):
        pair = {
            "reader": 0.0 if a is None else found.curves["reader"].cliff - a * 0.15,
            "writer": 0.0 if b is None else found.curves["writer"].cliff - b * 0.15,
        }
        if min(pair.values()) < -1e-9:
            continue
        trial = copy.deepcopy(model)
        method._prune(trial, PARTS, {n: max(0.0, s) for n, s in pair.items()}, None)
        if quality(trial) >= -0.02:
            best = max(best, (100 * pair["reader"] + 200 * pair["writer"]) / 300)
    assert found.overall == pytest.approx(best) and best > 0.3


def test_parts_that_do_not_go_together_are_pruned_alone() -> None:
    """Either part may go; both together may not. The larger one goes."""
    model = Pipe()

    def quality(m: nn.Module) -> float:
        gone = [bool((p.weight == 0).any()) for p in (m.reader, m.writer)]  # type: ignore[union-attr]
        return 0.0 if all(gone) else 1.0

    found = Components(step=0.3, most=0.9).search(model, PARTS, quality, least=0.5)
    assert found.sparsity == {"reader": 0.0, "writer": pytest.approx(0.9)}
    assert found.quality == 1.0 and found.overall == pytest.approx(0.9 * 200 / 300)


def test_bad_calls_are_refused_and_change_nothing() -> None:
    model = Pipe()
    state = copy.deepcopy(model.state_dict())
    quality = quality_to(model)
    with pytest.raises(InvalidArgument, match="two or more"):
        Components().search(model, {"all": "*"}, quality, least=-1.0)
    with pytest.raises(InvalidArgument, match="belongs to"):
        Components().search(model, {"a": "reader", "b": ("reader", "writer")}, quality, least=-1.0)
    with pytest.raises(InvalidArgument, match="step="):
        Components(step=0.0).search(model, PARTS, quality, least=-1.0)
    with pytest.raises(DataError, match="below least"):
        Components().search(model, PARTS, quality, least=1.0)
    assert masks(model) is None
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())


def test_prune_searches_and_prunes_to_what_was_found() -> None:
    model, twin = Pipe(), Pipe()
    options = {"parts": PARTS, "quality": quality_to(Pipe()), "least": -1e-3, "step": 0.1}
    done = sw.prune(model, "components", data=[torch.zeros(1, 10)], most=0.9, **options)
    found = Components(step=0.1, most=0.9).search(twin, PARTS, quality_to(Pipe()), least=-1e-3)
    assert done.method == "components" and done.options["components"] == found.sparsity
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))
    with pytest.raises(InvalidArgument, match=r"by itself.*sparsity="):
        sw.prune(Pipe(), "components", sparsity=0.5, data=[torch.zeros(1, 10)])
    with pytest.raises(InvalidArgument, match="no component bears"):
        sw.prune(Pipe(), "components", data=[torch.zeros(1, 10)], **{**options, "least": -1e-15})
