"""The cost of a training: against counting every step by itself, and against RigL's formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.core.masks import masks
from sparseworks.data.epochs import ImageEpochs
from sparseworks.data.images import digits
from sparseworks.diagnostics.costs import training_facts, training_macs
from sparseworks.models.costs import Cost
from sparseworks.training.hooked import Run
from sparseworks.training.loop import Training
from sparseworks.training.planning import Plan, Sparse


def trained(method, sparsity=0.8, epochs=3, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10))
    sparse = None if method == "dense" else Sparse(method, sparsity, {"include": "*", **settings})
    plan = Plan(epochs=epochs, batch_size=64, augment=False)
    training = Training(model, plan, ImageEpochs(digits(), 64, augment=False), sparse=sparse)
    counted = 0.0
    full = 64 * 40 + 40 * 10

    def density():
        run = training.run
        return full if run is None else sum(int(m.sum()) for m in run.masks.values())

    before = density()
    while training.step < training.steps:
        run = training.run
        wants = isinstance(run, Run) and run.method.wants_dense_gradients(run)
        training.fit(until=training.step + 1)
        counted += 64 * (2 * before + (full if wants else before))
        before = density()
    if training.run is not None:
        training.run.finish()
    return training, counted, full


@pytest.mark.parametrize(
    ("method", "settings"),
    [("dense", {}), ("static", {}), ("rigl", {"every": 6}), ("set", {"every": 6}),
     ("gradual", {"every": 5})],
)  # fmt: skip
def test_the_cost_is_that_of_every_step_counted(method, settings):
    training, counted, full = trained(method, **settings)
    facts = training_facts(training)
    assert facts["training_macs"] == pytest.approx(counted, rel=0.01)
    assert facts["dense_inference_macs"] == full
    assert facts["counted"] == "by masks"
    kept = full if training.run is None else masks(training.model)
    if training.run is not None:
        kept = sum(int(kept[n].sum()) for n in kept)
        assert facts["zeros"] >= facts["sparsity"] == pytest.approx(0.8, abs=0.01)
    assert facts["inference_macs"] == pytest.approx(kept)
    assert facts["nonzeros"] == sum(int((p != 0).sum()) for p in training.model.parameters())
    assert facts["peak_density"] == pytest.approx(
        1.0 if method in ("dense", "gradual") else 0.2, abs=0.02
    )
    assert facts["samples"] == training.steps * 64 and facts["epochs"] == 3
    assert facts["seconds"] > 0


def test_rigl_costs_what_its_paper_says():
    """(3 f_s dT + 2 f_s + f_d) / (dT + 1) a step, with the gradient every dT + 1 steps."""
    cost = Cost({"w": 1000, "v": 500}, other=20)
    densities = {"w": 0.1, "v": 0.4}
    sparse, dense = 100 + 200 + 20, 1520
    interval, rounds = 9, 7
    steps = rounds * (interval + 1)
    found = training_macs(cost, [(steps, densities)], samples=1, dense_steps=rounds)
    average = (3 * sparse * interval + 2 * sparse + dense) / (interval + 1)
    assert found / steps == pytest.approx(average)


def test_dense_gradient_steps_are_counted_and_survive_a_checkpoint():
    training, _, _ = trained("rigl", epochs=2, every=6)
    run = training.run
    last = int(0.75 * training.steps)
    due = sum(1 for step in range(1, training.steps + 1) if step % 6 == 0 and step <= last)
    assert run.dense_steps == due > 0
    assert run.state_dict()["dense_steps"] == due
    assert trained("static", epochs=1)[0].run.dense_steps == 0


def test_a_moving_transform_counts_as_dense():
    training, _, full = trained("scl", epochs=1)
    facts = training_facts(training)
    assert facts["counted"] == "as dense" and facts["peak_density"] == 1.0
    assert facts["training_macs"] == 3 * full * facts["samples"]


def test_what_is_left_dense_is_named():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4), nn.Linear(4, 3))
    sw.prune(model, "magnitude", sparsity=0.5, exclude="0.*")
    from sparseworks.diagnostics.costs import model_facts

    _, facts = model_facts(model, torch.randn(1, 6))
    assert facts["left_dense"] == ["0.weight", "3.weight"]
    assert facts["sparsity"] == facts["zeros"] == 0.5
    assert facts["parameters"] - facts["nonzeros"] >= 10
    assert facts["inference_macs"] == 30 + 10 + 12
