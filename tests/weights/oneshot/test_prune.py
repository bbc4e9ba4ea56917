"""`prune` as a user calls it: methods, patterns, budgets, families, and what must not happen."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import DataError, InvalidArgument, ModelError, PatternError
from sparseworks.models.calls import call
from sparseworks.models.views import find_prunable

sys.path.insert(0, str(Path(__file__).parents[2] / "models"))
from families import FAMILIES, make


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_takes_every_kind_of_method(name, method):
    model, batches = make(name)
    result = sw.prune(model, method, sparsity=0.5, data=batches)
    record = sw.masks(model)
    assert record.violations(model) == {}
    assert set(record) == {v.name for v in find_prunable(model)}
    for name in record:
        masked = model.get_parameter(name).detach()[~record[name]]
        assert not torch.signbit(masked).any()  # +0.0: -0.0 would cost a lossless file a bit
    for tensor in result.tensors:
        row = method == "wanda"
        view = find_prunable(model).by_name()[tensor.name]
        rows, columns = view.shape
        expected = rows * (columns - columns // 2) if row else tensor.total - tensor.total // 2
        assert tensor.kept == expected == int(record[tensor.name].sum())
    assert all(
        torch.isfinite(v).all() for v in model.state_dict().values() if v.is_floating_point()
    )
    call(model, batches[0])
    assert method in str(result) and result.to_dict()["tensors"]


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "row", "block4x4", "rows", "columns"])
@pytest.mark.parametrize("method", ["random", "magnitude", "wanda", "snip"])
def test_patterns(method, pattern):
    model, batches = make("llama")
    fixed = ":" in pattern
    result = sw.prune(
        model, method, pattern=pattern, sparsity=None if fixed else 0.5, data=batches,
        budget="uniform",
    )  # fmt: skip
    assert result.sparsity == pytest.approx(0.75 if pattern == "1:4" else 0.5)
    if fixed:
        n = int(pattern[0])
        for view in find_prunable(model):
            runs = view.matrix(sw.masks(model)[view.name]).reshape(-1, 4)
            assert bool((runs.sum(1) == n).all())


def test_nm_on_a_convolution_counts_channels_at_a_tap():
    model, batches = make("grouped_cnn")
    sw.prune(model, "magnitude", pattern="2:4", exclude="wide", data=batches)
    mask = sw.masks(model)["stem.weight"]  # [16, 4, 3, 3]
    assert bool((mask.sum(1) == 2).all())


def test_indivisible_tensors_are_named_or_skipped():
    model, _ = make("grouped_cnn")
    with pytest.raises(PatternError, match=r"wide\.weight.*multiple of 4, not 1"):
        sw.prune(model, "magnitude", pattern="2:4")
    result = sw.prune(model, "magnitude", pattern="2:4", skip_indivisible=True)
    assert "wide.weight" in result.skipped and "wide.weight" not in result.masks


def test_wanda_is_its_formula():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    data = [torch.randn(7, 12) * torch.arange(1, 13), torch.randn(5, 12)]
    weight = model[0].weight.detach().clone()
    sw.prune(model, "wanda", sparsity=0.5, data=data)
    x = torch.cat(data)
    score = weight.abs() * x.norm(dim=0)
    for row, mask in zip(score, sw.masks(model)["0.weight"]):
        assert set(mask.nonzero().view(-1).tolist()) == set(row.topk(6).indices.tolist())
    # the second layer is scored on the outputs of the pruned first
    hidden = torch.relu(model[0](x)).detach()
    second = model[2].weight.abs() * hidden.norm(dim=0)
    kept = sw.masks(model)["2.weight"]
    assert bool((second[~kept] == 0).all())


def test_wanda_alpha_varies_rows_and_reaches_the_sparsity():
    model, batches = make("llama")
    result = sw.prune(model, "wanda", sparsity=0.6, data=batches, rows="alpha")
    assert result.sparsity == pytest.approx(0.6, abs=0.02)
    name = result.tensors[0].name
    assert len(set(sw.masks(model)[name].sum(1).tolist())) > 1


def test_wanda_masks_do_not_move_when_scale_moves_into_the_norm():
    """A norm's gain up and the following weight columns down is the same function."""
    data = make("llama")[1]
    results = {}
    for method in ("wanda", "magnitude"):
        for scaled in (False, True):
            model, _ = make("llama")
            if scaled:
                layer = model.model.layers[0]
                factor = torch.ones(32)
                factor[::5] = 32.0
                with torch.no_grad():
                    layer.input_layernorm.weight.mul_(factor)
                    for part in ("q_proj", "k_proj", "v_proj"):
                        getattr(layer.self_attn, part).weight.div_(factor)
            sw.prune(model, method, sparsity=0.5, data=data)
            results[method, scaled] = sw.masks(model)["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(results["wanda", False], results["wanda", True])
    assert not torch.equal(results["magnitude", False], results["magnitude", True])


def test_snip_and_grasp_are_their_formulas():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    data = [(torch.randn(6, 5).double(), torch.randint(0, 3, (6,)))]

    def loss(m, batch):
        return nn.functional.cross_entropy(m(batch[0]), batch[1])

    weight = model[0].weight

    def value(w):
        parameters = {**dict(model.named_parameters()), "0.weight": w}
        return nn.functional.cross_entropy(
            torch.func.functional_call(model, parameters, data[0][0]), data[0][1]
        )

    w = weight.detach()
    gradient = torch.func.grad(value)(w)
    hessian = torch.func.hessian(value)(w).reshape(35, 35)
    expected = {
        "snip": (w * gradient).abs(),
        "grasp": w * (hessian @ gradient.flatten()).view(7, 5),
    }
    for method, scores in expected.items():
        twin = copy.deepcopy(model)
        sw.prune(twin, method, sparsity=0.6, data=data, loss=loss)
        kept = sw.masks(twin)["0.weight"].flatten()
        assert set(kept.nonzero().view(-1).tolist()) == set(
            scores.flatten().float().topk(14).indices.tolist()
        )


def test_synflow_conserves_and_avoids_layer_collapse():
    torch.manual_seed(0)
    layers = [nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)]
    model = nn.Sequential(*layers)
    result = sw.prune(model, "synflow", sparsity=0.98, data=[torch.randn(2, 8)])
    assert result.sparsity == pytest.approx(0.98, abs=1e-3)
    assert all(t.kept > 0 for t in result.tensors)
    one = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))
    from sparseworks.weights.oneshot.synflow import SynFlow

    flows = SynFlow().gather(one, list(find_prunable(one, include="*")), [torch.ones(1, 3)], None)
    total = [float(f.double().sum()) for f in flows.values()]
    assert total[0] == pytest.approx(total[1], rel=1e-5)  # flow is conserved through the layers


def test_budgets_reach_the_models_sparsity():
    for budget in ("uniform", "erk", "global"):
        for method in ("magnitude", "wanda"):
            model, batches = make("resnet")
            result = sw.prune(
                model, method, sparsity=0.7, budget=budget, pattern="unstructured", data=batches
            )
            total = sum(t.total for t in result.tensors)
            slack = len(result.tensors) if budget == "uniform" else 0
            assert abs(sum(t.kept for t in result.tensors) - (total - int(total * 0.7))) <= slack


def test_a_second_call_starts_from_the_first_masks():
    model, batches = make("llama")
    sw.prune(model, "magnitude", sparsity=0.5)
    before = {n: sw.masks(model)[n] for n in sw.masks(model)}
    with torch.no_grad():
        for view in find_prunable(model):
            view.parameter.add_(100.0 * ~before[view.name])  # large where masked
    sw.prune(model, "wanda", sparsity=0.75, data=batches)
    after = sw.masks(model)
    assert after.sparsity() == pytest.approx(0.75, abs=0.01)
    assert all(not bool((after[n] & ~before[n]).any()) for n in after)
    assert after.violations(model) == {}
    with pytest.raises(InvalidArgument, match="higher sparsity"):
        sw.prune(model, "magnitude", sparsity=0.1)


def test_rounds_end_at_the_target_and_differ_from_one_shot():
    first, batches = make("vit")
    data = [(b, torch.tensor([0, 1])) for b in batches]
    second = copy.deepcopy(first)

    def loss(m, batch):
        return nn.functional.cross_entropy(m(batch[0]).logits, batch[1])

    one = sw.prune(first, "snip", sparsity=0.8, data=data, loss=loss)
    many = sw.prune(second, "snip", sparsity=0.8, data=data, loss=loss, rounds=4)
    assert one.sparsity == many.sparsity
    assert any(not torch.equal(one.masks[n], many.masks[n]) for n in one.masks)


def test_refit_lowers_the_error_of_any_mask():
    for method in ("magnitude", "wanda", "random"):
        model, batches = make("llama")
        plain = sw.prune(model, method, sparsity=0.6, data=batches, copy=True)
        refit = sw.prune(model, method, sparsity=0.6, data=batches, copy=True, recovery="refit")
        first = plain.tensors[0].name
        assert torch.equal(plain.masks[first], refit.masks[first])
        assert refit.masks.violations(refit.model) == {}
        inputs = batches[0]
        with torch.no_grad():
            dense = model(**inputs).logits
            errors = [(r.model(**inputs).logits - dense).square().mean() for r in (plain, refit)]
        assert errors[1] < errors[0]


def test_copy_leaves_the_model_alone():
    model, batches = make("bert")
    before = snapshot(model)
    result = sw.prune(model, "sparsegpt", sparsity=0.5, data=batches, copy=True)
    assert unchanged(model, before) and sw.masks(model) is None
    assert sw.masks(result.model).violations(result.model) == {}


def test_an_interrupted_call_leaves_the_model_as_it_was():
    model, batches = make("llama")
    before = snapshot(model)

    def stop(done, total, what):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sw.prune(model, "wanda", sparsity=0.5, data=batches, progress=stop)
    assert unchanged(model, before) and sw.masks(model) is None


def test_a_large_model_keeps_finished_blocks_and_resumes(monkeypatch):
    from sparseworks.weights.oneshot import job

    monkeypatch.setattr(job, "_ROLLBACK_BYTES", 0)
    whole, batches = make("llama")
    model = copy.deepcopy(whole)
    sw.prune(whole, "wanda", sparsity=0.5, data=batches)

    def stop(done, total, what):
        if done > total // 2:
            raise DataError("the disk with the data is gone")

    with pytest.raises(DataError, match="resume=True"):
        sw.prune(model, "wanda", sparsity=0.5, data=batches, progress=stop)
    assert 0 < len(sw.masks(model)) < len(sw.masks(whole))
    assert sw.masks(model).violations(model) == {}
    sw.prune(model, "wanda", sparsity=0.5, data=batches, resume=True)
    assert all(torch.equal(sw.masks(model)[n], sw.masks(whole)[n]) for n in sw.masks(whole))


def test_experts_without_tokens_are_named():
    model, batches = make("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()  # every token goes to the same experts
    for method in ("wanda", "sparsegpt"):
        result = sw.prune(model, method, sparsity=0.5, data=batches, copy=True)
        assert any("no calibration token reached" in w for w in result.warnings)
        assert result.sparsity == pytest.approx(0.5)


def test_random_masks_follow_the_seed():
    def mask(seed):
        model, _ = make("llama")
        sw.prune(model, "random", sparsity=0.5, seed=seed)
        return next(iter(sw.masks(model).values()))

    assert torch.equal(mask(1), mask(1)) and not torch.equal(mask(1), mask(2))


def test_tied_weights_are_treated_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 8)
            self.a = nn.Linear(8, 8)
            self.b = nn.Linear(8, 8)
            self.b.weight = self.a.weight
            self.out = nn.Linear(8, 10)
            self.out.weight = self.embed.weight

        def forward(self, x):
            return self.out(self.b(self.a(self.embed(x))))

    model = Tied()
    result = sw.prune(model, "magnitude", sparsity=0.5)
    assert [t.name for t in result.tensors] == ["a.weight"]
    assert "same tensor as a.weight" in result.skipped["b.weight"]
    assert model.a.weight is model.b.weight
    assert int((model.embed.weight == 0).sum()) == 0


@pytest.mark.parametrize(
    "options,message",
    [
        ({"sparsity": 1.0}, r"not in \[0, 1\)"),
        ({"sparsity": -0.1}, r"not in \[0, 1\)"),
        ({"sparsity": "50"}, "not a number"),
        ({}, "needs `sparsity`"),
        ({"pattern": "2:4", "sparsity": 0.9}, "contradicts"),
        ({"sparsity": 0.5, "pattern": "diagonal"}, "unknown pattern"),
        ({"sparsity": 0.5, "budget": "fair"}, "unknown budget"),
        ({"sparsity": 0.5, "include": "nowhere.*"}, "matches no weight"),
        ({"sparsity": 0.5, "recovery": "magic"}, "recovery"),
        ({"sparsity": 0.5, "powr": 2}, "did you mean 'power'"),
        ({"sparsity": 0.5, "rounds": 0}, "rounds"),
    ],
)
def test_bad_options_change_nothing(options, message):
    model, _ = make("llama")
    before = snapshot(model)
    with pytest.raises(InvalidArgument, match=message):
        sw.prune(model, "magnitude", **options)
    assert unchanged(model, before) and sw.masks(model) is None


def test_bad_models_and_data_change_nothing():
    model, batches = make("llama")
    with pytest.raises(InvalidArgument, match="did you mean 'wanda'"):
        sw.prune(model, "wandaa", sparsity=0.5, data=batches)
    with pytest.raises(InvalidArgument, match="calibration batches"):
        sw.prune(model, "wanda", sparsity=0.5)
    with pytest.raises(DataError, match="empty"):
        sw.prune(model, "wanda", sparsity=0.5, data=[])
    with pytest.raises(ModelError, match="no prunable weight"):
        sw.prune(nn.Sequential(nn.ReLU()), "magnitude", sparsity=0.5)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = float("nan")
    before = snapshot(model)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj.*NaN"):
        sw.prune(model, "magnitude", sparsity=0.5)
    same = {k: v for k, v in before.items() if "layers.1.mlp.up_proj" not in k}
    assert all(torch.equal(model.state_dict()[k], v) for k, v in same.items())


def test_bf16_models_and_frozen_weights():
    model, batches = make("llama")
    model = model.to(torch.bfloat16).requires_grad_(False)
    for method in ("magnitude", "wanda", "sparsegpt", "snip"):
        result = sw.prune(model, method, sparsity=0.5, data=batches, copy=True)
        assert result.sparsity == pytest.approx(0.5, abs=0.01)
        assert next(result.model.parameters()).dtype == torch.bfloat16
        assert not any(p.requires_grad for p in result.model.parameters())


def test_method_objects_carry_their_pattern_and_budget():
    model, batches = make("llama")
    method = sw.methods.Wanda(pattern=sw.NM(2, 4))
    by_object = sw.prune(model, method, data=batches, copy=True)
    by_name = sw.prune(model, "wanda", pattern="2:4", data=batches, copy=True)
    assert by_object.options == by_name.options
    assert all(torch.equal(by_object.masks[n], by_name.masks[n]) for n in by_name.masks)
    wide = sw.methods.Magnitude(budget="erk")
    kept = {t.name: t.kept for t in sw.prune(model, wide, sparsity=0.5, copy=True).tensors}
    erk = sw.prune(model, "magnitude", sparsity=0.5, budget="erk", copy=True)
    assert kept == {t.name: t.kept for t in erk.tensors}
    overruled = sw.prune(model, method, pattern="row", sparsity=0.5, data=batches, copy=True)
    assert overruled.options["pattern"] == "row"
