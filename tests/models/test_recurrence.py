"""Evidence for recurrent weights is what a plain loop over samples and steps multiplies."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sparseworks.core.evidence import Hessian
from sparseworks.core.patterns import Group
from sparseworks.models.calibration import Calibration, collect
from sparseworks.models.calls import call
from sparseworks.models.costs import multiply_adds
from sparseworks.models.recurrence import gates_of, products_shown
from sparseworks.models.tap import calibration_mode
from sparseworks.models.views import find_prunable
from sparseworks.weights.dynamic.isoflop import model_macs

sys.path.insert(0, str(Path(__file__).parent))
from recurrent import CASES, Packed, Steps, Tagger, in_one_buffer, plain_inputs

LENGTHS = torch.tensor([3, 6, 1, 4])
PADDED = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(1))  # [steps, samples, in]


def _hessians(model, batches):
    views = [v for v in find_prunable(model) if v.layout == "recurrent"]
    found = collect(
        model, views, Calibration(batches), lambda v, d: [Hessian(v.groups, v.shape[1], d)]
    )
    return {n.removeprefix("core."): c[0] for n, c in found.items()}


def _agree(model, found, samples):
    inputs = [torch.tanh(model.before(s)).detach() for s in samples]
    seen, _ = plain_inputs(model.core, inputs)
    assert set(found) == set(seen)
    for name, collector in found.items():
        rows = torch.stack(seen[name])
        assert int(collector.tokens) == len(rows), name
        torch.testing.assert_close(
            collector.gram[0].double(), rows.T @ rows, rtol=1e-4, atol=1e-4, msg=name
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "form"), CASES)
def test_every_weight_has_the_evidence_of_the_plain_loop(kind, form, dtype):
    model = Tagger(kind, form).to(dtype)
    x = PADDED.to(dtype)
    given = x.transpose(0, 1) if model.core.batch_first else x
    _agree(model, _hessians(model, [given]), list(x.transpose(0, 1)))


@pytest.mark.parametrize(("kind", "form"), CASES)
def test_packed_sequences_count_their_own_steps_only(kind, form):
    model = Packed(kind, form)
    given = PADDED.transpose(0, 1) if model.core.batch_first else PADDED
    found = _hessians(model, [{"x": given, "lengths": LENGTHS}])
    _agree(model, found, [PADDED[:n, i] for i, n in enumerate(LENGTHS.tolist())])


@pytest.mark.parametrize(("kind", "form"), CASES)
def test_showing_products_changes_no_output(kind, form):
    for model, batch in (
        (Tagger(kind, form), PADDED),
        (Packed(kind, form), {"x": PADDED, "lengths": torch.tensor([4, 4, 2, 3, 1, 4])}),
    ):
        if isinstance(batch, dict) and not model.core.batch_first:
            batch = {**batch, "lengths": LENGTHS}
        with torch.no_grad():
            expected = call(model, batch)
            with products_shown():
                torch.testing.assert_close(call(model, batch), expected)


def test_initial_states_are_the_first_hidden_inputs():
    class Started(Tagger):
        def forward(self, x):
            start = torch.ones(2, x.shape[1], 6)
            return self.after(self.core(self.before(x), (start, start))[0])

    model = Started("lstm", "plain")
    model.core = nn.LSTM(8, 6, bidirectional=True)
    model.after = nn.Linear(12, 3)
    found = _hessians(model, [PADDED[:1]])
    for name in ("weight_hh_l0", "weight_hh_l0_reverse"):
        torch.testing.assert_close(found[name].gram[0], torch.full((6, 6), 4.0))


@pytest.mark.parametrize("inference", [False, True])
def test_cells_show_their_products_at_every_step(inference):
    model = Steps()
    with torch.inference_mode(inference):
        found = _hessians(model, [PADDED])
    assert set(found) == {f"{n}.weight_{k}" for n in ("lstm", "gru", "rnn") for k in ("ih", "hh")}
    assert all(int(c.tokens) == 6 * 4 for c in found.values())
    with torch.no_grad():
        inputs = torch.tanh(model.before(PADDED)).flatten(0, 1)
    torch.testing.assert_close(found["lstm.weight_ih"].gram[0], inputs.T @ inputs)


@pytest.mark.parametrize("first", [False, True])
def test_padded_tokens_are_left_out_in_either_order_of_the_axes(first):
    class Masked(Tagger):
        def forward(self, x, attention_mask):
            return super().forward(x if self.core.batch_first else x.transpose(0, 1))

    model = Masked("gru", "bare" if first else "plain")
    mask = torch.arange(6) < LENGTHS[:, None]
    found = _hessians(model, [{"x": PADDED.transpose(0, 1), "attention_mask": mask.long()}])
    with torch.no_grad():
        kept = torch.tanh(model.before(PADDED.transpose(0, 1)))[mask]
    for name, collector in found.items():
        assert int(collector.tokens) == int(mask.sum())
        if "ih" in name:
            torch.testing.assert_close(collector.gram[0], kept.T @ kept)


@pytest.mark.parametrize(("kind", "form"), CASES)
def test_multiply_adds_are_sizes_times_steps(kind, form):
    model = Tagger(kind, form)
    cost = multiply_adds(model, PADDED)
    for name, parameter in model.named_parameters():
        expected = parameter.numel() * 6 * 4 if parameter.ndim == 2 else 0
        assert cost.parameters[name] == expected, name
    assert cost.other == 0 and model_macs(model, PADDED) == cost.dense


def test_weights_in_one_buffer_are_told_apart():
    """On CUDA the fused call keeps all weights of a layer in one storage."""
    model, expected = in_one_buffer(Tagger("lstm", "both")), Tagger("lstm", "both")
    for name, collector in _hessians(model, [PADDED]).items():
        torch.testing.assert_close(collector.gram, _hessians(expected, [PADDED])[name].gram)
    assert multiply_adds(model, PADDED).parameters == multiply_adds(expected, PADDED).parameters


@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru"])
@pytest.mark.parametrize("size", [1, 2])
def test_groups_of_rows_are_whole_hidden_units(kind, size):
    model = Tagger(kind, "both")
    for view in find_prunable(model):
        if view.layout != "recurrent":
            continue
        pattern = view.fitted(Group("rows", size))
        pattern.check(view.shape)
        assert pattern.units(view.shape) == 6 // size and str(pattern) == str(Group("rows", size))
        scores = torch.rand(view.shape)
        mask = view.select(Group("rows", size), scores, 2)
        units = mask.view(gates_of(model.core), 6 // size, size, -1)
        assert bool((units == units[:1, :, :1, :1]).all())
        energy = scores.view(gates_of(model.core), 6 // size, -1).sum((0, 2))
        assert set(units[0, :, 0, 0].nonzero().flatten().tolist()) == set(
            energy.topk(2).indices.tolist()
        )


def test_a_model_that_ends_in_a_recurrent_layer_has_no_output_head():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.GRU(4, 3))
    assert {v.name for v in find_prunable(model)} == {
        "0.weight", "1.weight", "2.weight_ih_l0", "2.weight_hh_l0"
    }  # fmt: skip


def test_calibration_mode_is_left_as_it_was_found():
    model = Tagger("lstm", "plain").train()
    fast = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(KeyError), calibration_mode(model):
        raise KeyError
    assert model.training and torch.backends.mha.get_fastpath_enabled() == fast
