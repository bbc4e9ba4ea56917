"""Cutting recurrent layers: equal to zeroing, gates whole, sizes told, saved and loaded."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune

import sparseworks as sw
from sparseworks.core.errors import ModelError
from sparseworks.core.masks import masks
from sparseworks.models.coupling import trace
from sparseworks.models.recurrence import gates_of
from sparseworks.weights.structured import load_slim, save_slim
from sparseworks.weights.structured.backup import Backup
from sparseworks.weights.structured.cutting import cut, zero
from sparseworks.weights.structured.folding import fold, fold_linear
from sparseworks.weights.structured.gates import Gates
from sparseworks.weights.structured.scores import ActivationEnergy

sys.path.insert(0, str(Path(__file__).parents[2] / "models"))
from recurrent import CASES, Steps, Tagger

X = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0))


def _agree_after_cutting(model, keep_of):
    """The cut model computes what the zeroed one computes; returns the cut model."""
    coupling = trace(model, X)
    keep = coupling.keep_all()
    for family in coupling.families:
        keep[family.roots] = keep_of(family)
    zeroed, small = copy.deepcopy(model), copy.deepcopy(model)
    zero(zeroed, coupling, keep)
    cut(small, coupling, keep)
    with torch.no_grad():
        torch.testing.assert_close(small(X), zeroed(X), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) == coupling.parameters(keep)
    return small


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(CASES), st.integers(0, 1000))
def test_cutting_any_units_equals_zeroing_them(case, seed):
    random = np.random.default_rng(seed)

    def keep_of(family):
        keep = random.random(len(family)) < 0.6
        keep[random.permutation(len(family))[: family.least]] = True
        return keep

    small = _agree_after_cutting(Tagger(*case, seed), keep_of)
    core = small.core
    assert core.weight_ih_l0.shape == (gates_of(core) * core.hidden_size, core.input_size)
    assert core.weight_hh_l0.shape[1] == (core.proj_size or core.hidden_size)
    assert core.input_size == small.before.out_features
    assert small.after.in_features == core.weight_hh_l0.shape[1] * (1 + core.bidirectional)
    held = {id(p) for p in core.parameters()}
    assert {id(w) for w in core._flat_weights} == held


@pytest.mark.parametrize("case", CASES)
def test_a_hidden_unit_is_one_group_of_all_gates_layers_and_directions(case):
    model = Tagger(*case)
    coupling = trace(model, X)
    assert all(f.exact for f in coupling.families)
    narrow = model.core.proj_size
    assert [len(f) for f in coupling.families] == [8, 6, *([narrow] if narrow else [])]
    group = coupling.group(int(coupling.families[1].roots[2]), coupling.families[1])
    for part in group.slices:
        gates = gates_of(model.core)
        both = (1 + model.core.bidirectional) if "core" not in part.name or "ih" in part.name else 1
        rows = part.axis == 0 and "hr" not in part.name
        wanted = [g * 6 + 2 for g in range(gates if rows else 1 if "core" in part.name else both)]
        if part.axis == 1 and "weight_ih" in part.name:
            wanted = [g * 6 + 2 for g in range(both)]
        assert list(part.indices) == wanted, part


def test_cells_are_cut_together_with_what_reads_them():
    small = _agree_after_cutting(Steps(), lambda f: np.arange(len(f)) % 3 != 1)
    for cell in (small.lstm, small.gru, small.rnn):
        assert cell.weight_ih.shape == (gates_of(cell) * cell.hidden_size, cell.input_size)
    assert small.gru.input_size == small.lstm.hidden_size == 4


class Learned(nn.Module):
    """Learned initial states, the last states read, an unknown operation beside them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.h, self.c = (nn.Parameter(torch.randn(2, 1, 6)) for _ in range(2))
        self.core = nn.LSTM(5, 6, num_layers=2)
        self.after = nn.Linear(12, 3)

    def forward(self, x):
        n = x.shape[1]
        start = (self.h.expand(-1, n, -1).contiguous(), self.c.expand(-1, n, -1).contiguous())
        _, (h, c) = self.core(x, start)
        return torch.special.erfcx(self.after(torch.cat([h[-1], c[0]], -1)) + torch.trace(x[0]))


def test_initial_states_go_with_their_units():
    small = _agree_after_cutting(Learned().eval(), lambda f: np.arange(len(f)) >= 2)
    assert small.h.shape == small.c.shape == (2, 1, 4) and small.core.hidden_size == 4


def test_states_given_by_the_caller_keep_their_width():
    class Given(nn.Module):
        def __init__(self):
            super().__init__()
            self.core, self.after = nn.GRU(5, 6), nn.Linear(6, 3)

        def forward(self, x, h):
            return self.after(self.core(x, h)[0])

    batch = {"x": X, "h": torch.zeros(1, 4, 6)}
    assert not trace(Given(), batch).families
    with pytest.raises(ModelError, match="no group may be cut"):
        sw.slim(Given(), batch, params=0.5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["group-norm", "group-taylor", "group-energy"])
def test_slimmed_models_meet_the_budget_and_come_back_from_disk(case, method, tmp_path):
    model = Tagger(*case)
    result = sw.slim(
        model, X, params=0.6, copy=True, method=method, data=[X], fold="none",
        loss=lambda m, b: m(b).square().mean(),
    )  # fmt: skip
    assert 0.4 * result.parameters[0] < result.parameters[1] <= 0.6 * result.parameters[0]
    again = load_slim(save_slim(result, tmp_path / "small"), Tagger(*case, seed=1))
    with torch.no_grad():
        assert torch.equal(again(X), result.model(X))
        assert torch.equal(copy.deepcopy(again)(X), again(X))
    assert repr(again.core) == repr(result.model.core)
    again(X).sum().backward()
    assert all(p.grad is not None for p in again.parameters())


def test_a_failing_cut_leaves_the_layer_as_it_was():
    class Stubborn(Tagger):
        def forward(self, x):
            return self.after(self.core(self.before(x))[0].reshape(6, 4, 6))

    model = Stubborn("lstm", "plain")
    expected = model(X).detach()
    with pytest.raises(ModelError, match="does not run with its new shapes"):
        sw.slim(model, X, params=0.5)
    assert torch.equal(model(X), expected) and model.core.hidden_size == 6
    assert {id(w) for w in model.core._flat_weights} == {id(p) for p in model.core.parameters()}


def test_widths_of_hidden_units_are_multiples():
    result = sw.slim(Tagger("lstm", "both"), X, params=0.7, round_to=4)
    assert result.model.core.hidden_size == 4 and result.model.core.input_size % 4 == 0


def test_projections_stay_narrower_than_their_units():
    model = sw.slim(Tagger("lstm", "projected"), X, params=0.35, floor=0.01).model
    assert model.core.proj_size < model.core.hidden_size


def test_masks_are_cut_with_their_weights():
    model = Tagger("gru", "both")
    sw.prune(model, "magnitude", sparsity=0.5)
    sw.slim(model, X, params=0.6)
    record = masks(model)
    assert record is not None
    record.check(model)
    assert not any(record.violations(model).values())


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("how", ["mean", "linear"])
def test_constant_inputs_of_a_recurrent_layer_fold_exactly(kind, how):
    """A channel that always says the same goes into the bias of every direction."""
    model = Tagger(kind, "both")
    with torch.no_grad():
        model.before.weight[:4] = 0
        expected = model(X)
    coupling = trace(model, X)
    keep = coupling.keep_all()
    keep[coupling.axes["before.weight", 0][:4]] = False
    assert (fold if how == "mean" else fold_linear)(model, coupling, keep, [X], Backup()) == 2
    cut(model, coupling, keep)
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected, rtol=1e-3, atol=1e-3)


def test_energy_is_what_a_unit_sends_to_every_reader():
    model = Tagger("lstm", "plain")
    coupling = trace(model, X)
    scores = ActivationEnergy().score(model, coupling, [X], None)
    with torch.no_grad():
        y, _ = model.core(torch.tanh(model.before(X)))
        before = torch.cat([torch.zeros(1, 4, 6), y[:-1]]).square().mean((0, 1))
        wanted = before * model.core.weight_hh_l0.square().sum(0)
        wanted += y.square().mean((0, 1)) * model.after.weight.square().sum(0)
    found = torch.from_numpy(scores[coupling.axes["after.weight", 1]]).float()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", [("lstm", "both"), ("gru", "deep"), ("rnn", "bare")])
def test_gates_of_zero_and_one_compute_what_the_cut_model_computes(case):
    model = Tagger(*case)
    coupling = trace(model, X)
    families = [f for f in coupling.families if f.exact]
    gates = Gates(model, coupling, families)
    keep = coupling.keep_all()
    for family, values in zip(families, gates.values):
        values[::2] = 0
        keep[family.roots[::2]] = False
    with torch.no_grad():
        with gates:
            found = model(X)
        cut(model, coupling, keep)
        torch.testing.assert_close(found, model(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [("lstm", "projected"), ("gru", "both"), ("rnn", "deep")])
def test_a_layer_that_torch_masked_is_slimmed_with_its_masks(case: tuple[str, str]) -> None:
    model = Tagger(*case)
    prune.l1_unstructured(model.core, "weight_hh_l0", 0.3)
    result = sw.slim(model, X, flops=0.6)
    core = model.core
    assert core.hidden_size < 6 and "core.weight_hh_l0_orig" in result.shapes
    assert core.weight_hh_l0_mask.shape == core.weight_hh_l0_orig.shape == core.weight_hh_l0.shape
    assert core.weight_hh_l0.shape[0] == gates_of(core) * core.hidden_size
    plain = copy.deepcopy(model)
    sw.fold_torch_masks(plain)
    with torch.no_grad():
        torch.testing.assert_close(model(X), plain(X))


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize("case", [("lstm", "plain"), ("gru", "both")])
def test_units_whose_weight_is_normalised_stay_with_the_reason(case, norm) -> None:  # type: ignore[no-untyped-def]
    model = Tagger(*case)
    norm(model.core, "weight_hh_l0")
    result = sw.slim(model, X, flops=0.9)
    core = model.core
    assert core.hidden_size == 6 and core.weight_hh_l0.shape == (gates_of(core) * 6, 6)
    computed = [n for n in result.skipped if "core" in n and "hh_l0" in n and "reverse" not in n]
    assert computed and all("function of its parameters" in result.skipped[n] for n in computed)
    assert any("left whole: core" in w for w in result.warnings)
