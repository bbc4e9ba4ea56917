"""Recurrent weights are pruned, trained sparse, saved and shown like any other matrix."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils import parametrize, spectral_norm, weight_norm
from torch.nn.utils import prune as torch_prune

import sparseworks as sw
from sparseworks.cli import main
from sparseworks.core.masks import masks
from sparseworks.models.recurrence import gates_of
from sparseworks.models.views import find_prunable

sys.path.insert(0, str(Path(__file__).parents[2] / "models"))
from recurrent import CASES, Steps, Tagger, in_one_buffer, plain_inputs

X = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (6, 4), generator=torch.Generator().manual_seed(0))
METHODS = ["magnitude", "random", "wanda", "sparsegpt", "snip", "grasp", "synflow"]


def _loss(model, batch):
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def _recurrent(model):
    return [v for v in find_prunable(model) if v.layout == "recurrent"]


def _check(model, sparsity):
    record = masks(model)
    assert record is not None and not any(record.violations(model).values())
    for view in _recurrent(model):
        zeros = view.parameter.numel() - record.entry(view.name).kept
        assert bool((view.parameter[~record[view.name]] == 0).all())
        if sparsity is not None:
            total, columns = view.parameter.numel(), view.shape[1]  # rows round down
            assert sparsity - 1 / columns < zeros / total <= sparsity, view.name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_masked_weights_are_exact_zeros_and_come_back_bit_for_bit(case, method, tmp_path):
    model = Tagger(*case)
    loss = _loss if method in ("snip", "grasp") else None
    result = sw.prune(model, method, sparsity=0.5, data=[(X, Y)], loss=loss)
    assert len(_recurrent(model)) == len([n for n in result.masks if n.startswith("core.")])
    _check(model, None if loss or method == "synflow" else 0.5)
    sw.save(model, tmp_path / "m.safetensors")
    again = sw.load(tmp_path / "m.safetensors", Tagger(*case, seed=1))
    _check(again, None)
    assert all(torch.equal(masks(again)[n], result.masks[n]) for n in result.masks)
    with torch.no_grad():
        assert torch.equal(again(X), model(X))


@pytest.mark.parametrize("pattern", ["2:4", "block2x2", "rows", "rows2", "columns", "row"])
@pytest.mark.parametrize("case", [("lstm", "plain"), ("gru", "both"), ("rnn", "bare")])
def test_patterns_hold_in_recurrent_weights(case, pattern):
    model = Tagger(*case)
    with torch.no_grad():
        model.core.weight_ih_l0[: gates_of(model.core) * 6 // 2] *= 10  # half of the gates
    sw.prune(model, "magnitude", sparsity=0.5, pattern=pattern, include="core.*ih_l0")
    mask = masks(model)["core.weight_ih_l0"]
    units = mask.view(gates_of(model.core), 6, 8)
    if pattern.startswith("rows"):
        assert torch.equal(units, units[:1, :, :1].expand_as(units))
        assert int(units[0, :, 0].sum()) == (3 if pattern == "rows" else 4)
    elif pattern == "2:4":
        assert bool((mask.view(-1, 4).sum(1) == 2).all())
    elif pattern == "row":
        assert bool((mask.sum(1) == 4).all())
    assert not bool(mask.all())


@pytest.mark.parametrize("case", [c for c in CASES if c[1] in ("plain", "projected")])
def test_refitting_errs_less_on_the_products_it_saw(case):
    def error(recovery):
        model = Tagger(*case)
        dense = copy.deepcopy(model)
        sw.prune(
            model, "magnitude", sparsity=0.6, data=[X], include="core.*hh_l0", recovery=recovery
        )
        given = X if model.core.batch_first else X.transpose(0, 1)
        with torch.no_grad():
            inputs = list(torch.tanh(model.before(given)))
        rows = torch.stack(plain_inputs(dense.core, inputs)[0]["weight_hh_l0"])
        change = model.core.weight_hh_l0.detach() - dense.core.weight_hh_l0.detach()
        return float((change.double() @ rows.T).square().sum())

    assert error("refit") < 0.9 * error(None)


def test_cells_are_pruned_with_evidence_of_every_step():
    model = Steps()
    result = sw.prune(model, "wanda", sparsity=0.5, data=[X], exclude=["before", "after"])
    assert len(result.masks) == 6 and not result.warnings
    _check(model, 0.5)


@pytest.mark.parametrize("method", ["static", "set", "rigl", "gradual", "granet", "fixed"])
@pytest.mark.parametrize("case", [("lstm", "projected"), ("gru", "deep"), ("relu", "both")])
def test_training_keeps_masked_weights_at_zero(case, method):
    model = Tagger(*case).train()
    if method == "fixed":
        sw.prune(model, "magnitude", sparsity=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    options = {} if method == "fixed" else {"sparsity": 0.5, "steps": 6}
    if method in ("set", "rigl", "gradual", "granet"):
        options["every"] = 2
    run = sw.sparsify(model, optimizer, method, **options)
    for _ in range(6):
        optimizer.zero_grad()
        _loss(model, (X, Y)).backward()
        optimizer.step()
        for name, mask in run.masks.items():
            assert bool((run.parameters[name][~mask] == 0).all())
    assert abs(run.current_sparsity - 0.5) < 0.05
    assert any(not bool(m.all()) for n, m in run.masks.items() if n.startswith("core."))


def test_transforms_fold_back_into_the_layer_in_its_own_order():
    """Two weights of one module are parametrized at once."""
    model = Tagger("lstm", "both")
    names = list(model.state_dict())
    run = sw.transform(model, "bip", sparsity=0.5, steps=4)
    assert parametrize.is_parametrized(model.core, "weight_hh_l1")
    optimizer = torch.optim.SGD(run.parameter_groups(), 0.1)
    run.attach(optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        (_loss(model, (X, Y)) + run.penalty()).backward()
        optimizer.step()
    with torch.no_grad():
        before = model(X)
        run.finish()
        assert torch.equal(model(X), before)
    assert list(model.state_dict()) == names
    _check(copy.deepcopy(model), None)


def test_weights_that_share_a_buffer_are_saved_one_by_one(tmp_path):
    """On CUDA the fused call keeps all weights of a layer in one storage."""
    model = in_one_buffer(Tagger("gru", "both"))
    sw.prune(model, "magnitude", sparsity=0.5)
    sw.save(model, tmp_path / "m.safetensors")
    with torch.device("meta"):
        empty = Tagger("gru", "both")
    again = sw.load(tmp_path / "m.safetensors", empty)
    with torch.no_grad():
        assert torch.equal(again(X), model(X))
    apart = sw.prune(Tagger("gru", "both"), "wanda", sparsity=0.7, data=[X])
    shared = sw.prune(in_one_buffer(Tagger("gru", "both")), "wanda", sparsity=0.7, data=[X])
    assert all(torch.equal(apart.masks[n], shared.masks[n]) for n in apart.masks)


@pytest.mark.parametrize("source", ["checkpoint", "model"])
def test_inspect_counts_recurrent_weights(source, tmp_path, capsys):
    model = Tagger("lstm", "projected")
    sw.prune(model, "magnitude", sparsity=0.5)
    path = tmp_path / "m.safetensors"
    sw.save(model, path)
    if source == "model":
        (tmp_path / "made.py").write_text(
            f"import sys\nsys.path.insert(0, {str(Path(__file__).parents[2] / 'models')!r})\n"
            "from recurrent import Tagger\n\n\n"
            "def make():\n    return Tagger('lstm', 'projected')\n"
        )
    target = str(path) if source == "checkpoint" else f"{tmp_path / 'made.py'}:make"
    assert main(["inspect", target, "--json"]) in (0, None)
    shown = {r["name"]: r for r in json.loads(capsys.readouterr().out)["tensors"]}
    for view in _recurrent(model):
        row = shown[view.name]
        kept = int((view.parameter != 0).sum()) if source == "checkpoint" else row["weights"]
        assert row["flops_per_position"] == 2 * kept
    assert not any("bias" in name for name in shown)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "snip"])
@pytest.mark.parametrize("case", [("lstm", "projected"), ("gru", "both"), ("rnn", "plain")])
def test_recurrent_layers_that_torch_masked_are_pruned_as_the_folded_ones(case, method):
    def masked():
        model = Tagger(*case)
        torch_prune.ln_structured(model.core, "weight_ih_l0", 0.3, n=2, dim=1)
        torch_prune.ln_structured(model.core, "weight_hh_l0", 0.3, n=2, dim=1)
        return model

    model, folded = masked(), masked()
    sw.fold_torch_masks(folded)
    loss = _loss if method == "snip" else None
    for each in (model, folded):
        sw.prune(each, method, sparsity=0.5, data=[(X, Y)], loss=loss)
        _check(each, None if loss else 0.5)
    assert all(
        torch.equal(masks(model)[f"core.{n}_orig"], masks(folded)[f"core.{n}"])
        for n in ("weight_ih_l0", "weight_hh_l0")
    )
    with torch.no_grad():
        torch.testing.assert_close(model(X), folded(X))
    held = {id(w) for w in model.core._flat_weights}
    assert held == {id(getattr(model.core, n)) for n in model.core._flat_weights_names}
    assert type(model.core.weight_hh_l0) is torch.Tensor  # computed by torch's hook again


@pytest.mark.parametrize("tool", [spectral_norm, weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_recurrent_weights_that_a_hook_rescales_are_left_dense_with_the_reason(tool):
    model = Tagger("lstm", "plain")
    tool(model.core, "weight_hh_l0")
    result = sw.prune(model, "magnitude", sparsity=0.5)
    assert not any("weight_hh_l0" in n for n in result.masks)
    assert any("weight_hh_l0" in n and tool.__name__ in why for n, why in result.skipped.items())
