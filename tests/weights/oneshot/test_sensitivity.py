"""Budgets by sensitivity: each by its formula on a small model, and as `prune` uses them."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.models.calibration import Calibration
from sparseworks.models.calls import call
from sparseworks.models.changes import block_changes
from sparseworks.models.views import find_prunable
from sparseworks.weights.oneshot.alphapruning import HeavyTails, hill_alpha
from sparseworks.weights.oneshot.coarse import CoarseToFine
from sparseworks.weights.oneshot.ecoflap import ZerothOrder
from sparseworks.weights.oneshot.owl import OutlierRatios
from sparseworks.weights.oneshot.sensitivity import Measured, block_of, measured_budget

sys.path.insert(0, str(Path(__file__).parents[2] / "models"))
from families import make

NAMES = ["owl", "alpha", "ecoflap", "cfsp"]
METHODS = {"owl": "owl", "alpha": "alpha-pruning", "ecoflap": "ecoflap", "cfsp": None}


def on(model, batches):
    return Measured(model, batches, None, Calibration(batches))


def blocks_of(model):
    found = {}
    for view in find_prunable(model):
        found.setdefault(block_of(view), []).append(view)
    return found


def grown(model):
    """The blocks of a random model are alike: make the second one's weights uneven."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".1." in name and p.ndim == 2:
                p.mul_(torch.rand(p.shape).pow(-0.7))
    return model


def by_block(result):
    found = {}
    for t in result.tensors:
        kept, total = found.get(t.name.split(".")[2], (0, 0))
        found[t.name.split(".")[2]] = kept + t.kept, total + t.total
    return {b: kept / total for b, (kept, total) in found.items()}


@pytest.mark.parametrize("method", ["wanda", "magnitude", "sparsegpt"])
@pytest.mark.parametrize("name", NAMES)
def test_every_budget_under_every_method_is_exact_and_leaves_weights_alone(name, method):
    model, batches = make("llama")
    dense = {n: p.detach().clone() for n, p in grown(model).named_parameters()}
    result = sw.prune(
        model, method, sparsity=0.6, pattern="unstructured", data=batches, budget=name
    )
    total = sum(t.total for t in result.tensors)
    assert sum(t.kept for t in result.tensors) == total - math.floor(0.6 * total + 1e-9)
    density = by_block(result)
    assert len({round(d, 3) for d in density.values()}) > 1
    if method != "sparsegpt":
        for n, mask in result.masks.items():
            assert torch.equal(model.get_parameter(n).detach(), dense[n] * mask)
    assert result.options["budget"] == name


@pytest.mark.parametrize("name", ["owl", "alpha", "ecoflap"])
def test_the_registered_method_is_wanda_with_the_budget(name):
    results = []
    for method, budget in ((METHODS[name], None), ("wanda", name)):
        model, batches = make("llama")
        results.append(sw.prune(grown_seeded(model), method, sparsity=0.5, data=batches,
                                budget=budget))  # fmt: skip
    assert all(torch.equal(results[0].masks[n], results[1].masks[n]) for n in results[0].masks)


def grown_seeded(model):
    torch.manual_seed(5)
    return grown(model)


def test_owl_is_its_formula():
    model, batches = make("llama")
    grown(model)
    rule = OutlierRatios(outliers=3.0, spread=0.1)
    ratio = rule.measure(on(model, batches), blocks_of(model))
    inputs = {}
    handles = [
        m.register_forward_pre_hook(lambda m, a, n=n: inputs.setdefault(n, []).append(a[0]))
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear)
    ]
    with torch.no_grad():
        for batch in batches:
            call(model, batch)
    for handle in handles:
        handle.remove()
    for block, views in blocks_of(model).items():
        scores = []
        for view in views:
            x = torch.cat([i.flatten(0, 1) for i in inputs[view.module_name]])
            scores.append((view.parameter.abs() * x.norm(dim=0)).flatten())
        # norms over samples differ per matrix by nothing: all saw the same samples
        scores = torch.cat(scores)
        assert ratio[block] == pytest.approx(float((scores > 3 * scores.mean()).float().mean()))
    sizes = dict.fromkeys(ratio, 1000)
    keep = rule.keep(ratio, sizes, 0.6)
    low, high = min(ratio.values()), max(ratio.values())
    scaled = {b: 0.2 * (r - low) / (high - low) for b, r in ratio.items()}
    mean = sum(scaled.values()) / len(scaled)
    for block in ratio:
        assert keep[block] / 1000 == pytest.approx(scaled[block] - mean + 0.4, abs=1e-6)


def test_alpha_is_hills_estimator():
    torch.manual_seed(0)
    pareto = torch.rand(200_000, dtype=torch.float64).pow(-1 / 2.5)  # density ~ x^-3.5
    assert hill_alpha(pareto, 0.1) == pytest.approx(3.5, rel=0.02)
    values = [1.0, 2.0, 3.0, 5.0, 8.0, 13.0]
    expected = 1 + 3 / sum(math.log(v / 3.0) for v in (5.0, 8.0, 13.0))
    assert hill_alpha(torch.tensor(values)) == pytest.approx(expected)
    assert hill_alpha(torch.ones(8)) == hill_alpha(torch.zeros(4)) == math.inf
    rule = HeavyTails(tau=0.3)
    sizes = {"a": 1000, "b": 1000, "c": 2000}
    keep = rule.keep({"a": -2.0, "b": -4.0, "c": -3.0}, sizes, 0.5)
    sparsity = {g: 1 - keep[g] / sizes[g] for g in sizes}
    assert sparsity == pytest.approx({"a": 0.35, "b": 0.65, "c": 0.5})


def test_the_zeroth_order_score_is_a_derivative_along_the_noise():
    from sparseworks.core.random import generator_for

    model, batches = make("llama")
    model.double()

    def loss(model, batch):  # in fp64, where the default is fp32
        logits, ids = call(model, batch).logits, batch["input_ids"]
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    rule = ZerothOrder(eps=1e-5, batches=2, per="tensor")
    views = list(find_prunable(model))[3:6]
    before = [v.parameter.detach().clone() for v in views]
    found = rule.measure(Measured(model, batches, loss, None), {v.name: [v] for v in views})
    assert all(torch.equal(v.parameter, w) for v, w in zip(views, before))
    for view in views:
        expected = 0.0
        for i, batch in enumerate(batches):
            (gradient,) = torch.autograd.grad(loss(model, batch), view.parameter)
            generator = generator_for(0, view.name, i)
            z = torch.randn(gradient.shape, generator=generator).double()
            expected += abs(float((gradient * z).sum()))
        assert found[view.name] == pytest.approx(expected, rel=2e-3)


def test_ecoflap_fills_in_proportion_up_to_the_reach():
    rule = ZerothOrder(reach=0.1)
    sizes = {"a": 100, "b": 100, "c": 100}
    keep = rule.keep({"a": 1.0, "b": 0.0, "c": 3.0}, sizes, 0.5)
    assert keep == pytest.approx({"a": 47.5, "b": 40.0, "c": 62.5})
    keep = rule.keep({"a": 1.0, "b": 0.0, "c": 1e9}, sizes, 0.1)
    assert keep["c"] == 100 and sum(keep.values()) == pytest.approx(270)


def test_cfsp_is_a_sigmoid_of_the_angle():
    model, batches = make("llama")
    changes = block_changes(model, [f"model.layers.{i}" for i in range(3)], batches)
    hidden = [
        model(**b, output_hidden_states=True).hidden_states[:3] for b in batches
    ]  # of the last block transformers returns the normed states
    for i in range(2):
        x, y = (torch.cat([h[i + k].flatten(0, 1) for h in hidden]).detach() for k in (0, 1))
        angle = torch.cosine_similarity(x, y).arccos() / math.pi
        assert changes[f"model.layers.{i}"] == pytest.approx(float(angle.mean()), abs=1e-4)
    rule = CoarseToFine(slope=13.1072)
    sizes = {"a": 1000, "b": 1000}
    keep = rule.keep({"a": 0.1, "b": 0.3}, sizes, 0.5)
    z = [1 / (1 + math.exp(13.1072 * d)) for d in (0.1, -0.1)]
    assert keep["a"] / keep["b"] == pytest.approx(z[0] / z[1])
    assert sum(keep.values()) == pytest.approx(1000)


def test_options_and_what_cannot_be():
    rule = measured_budget("owl:outliers=7,per=tensor")
    assert rule == OutlierRatios(outliers=7, per="tensor")
    assert measured_budget(str(rule)) == rule and measured_budget("erk") is None
    assert str(OutlierRatios()) == "owl"
    model, batches = make("llama")
    before = [p.clone() for p in model.parameters()]
    for options, message in [
        ({"budget": "owl:sprad=1", "data": batches}, "it has"),
        ({"budget": "cfsp:per=tensor", "data": batches}, "only"),
        ({"budget": "ecoflap"}, "needs calibration batches"),
        ({"budget": "owl", "data": batches, "resume": True}, "resume"),
    ]:
        with pytest.raises(InvalidArgument, match=message):
            sw.prune(model, "magnitude", sparsity=0.5, **options)
    with pytest.raises(InvalidArgument, match="one density"):
        sw.prune(model, "wanda", pattern="2:4", data=batches, budget="owl")
    assert sw.prune(model, "owl", pattern="2:4", data=batches).options["budget"] == "uniform"
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    with pytest.raises(ModelError, match="shape"):
        block_changes(model, ["model.embed_tokens"], batches)


def test_a_model_without_blocks_has_a_density_per_tensor():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(16, 32), torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU()),
        torch.nn.Linear(32, 8), torch.nn.Linear(8, 4),
    )  # fmt: skip
    data = [torch.randn(20, 16)]
    result = sw.prune(model, "wanda", sparsity=0.5, data=data, budget="owl:outliers=2",
                      pattern="unstructured")  # fmt: skip
    assert result.sparsity == pytest.approx(0.5, abs=1e-3)
