"""Layers whose weights torch's own hooks compute, and matrices that no layer owns."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.nn.utils import spectral_norm, weight_norm

import sparseworks as sw
from sparseworks.core.errors import DataError, InvalidArgument
from sparseworks.models.hooks import duplicate
from sparseworks.models.views import find_prunable

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


def pruned(share=0.3):
    """A model with torch's masks, on rows and columns alike so that any pattern of rows fits."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    )
    torch_prune.ln_structured(model[0], "weight", 0.25, n=2, dim=1)
    torch_prune.l1_unstructured(model[0], "bias", 0.25)
    return model


def batches():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 8, generator=generator)
    return [(x, torch.arange(32) % 4)]


def state(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


def same(model, before):
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[n], t) for n, t in before.items())


METHODS = ["random", "magnitude", "wanda", "sparsegpt", "snip", "grasp", "synflow"]


@pytest.mark.parametrize("method", METHODS)
def test_torchs_masks_are_kept_and_methods_see_what_the_folded_model_shows(method):
    model = pruned()
    mask = model[0].weight_mask.bool()
    folded = duplicate(model)
    sw.fold_torch_masks(folded)
    sw.prune(folded, method, sparsity=0.5, data=batches())
    result = sw.prune(model, method, sparsity=0.5, data=batches())
    record = sw.masks(model)
    assert result.sparsity == pytest.approx(0.5, abs=0.01)
    assert not (record["0.weight_orig"] & ~mask).any()
    assert record.violations(model) == {}
    x = batches()[0][0]
    if method != "random":  # which draws by name
        assert torch.equal(record["0.weight_orig"], sw.masks(folded)["0.weight"])
        torch.testing.assert_close(model(x), folded(x))
    assert torch.equal(model[0].weight, model[0].weight_orig * model[0].weight_mask)
    assert torch_prune.is_pruned(model[0])


def test_the_weight_is_right_before_the_next_forward_pass():
    model = pruned()
    sw.prune(model, "magnitude", sparsity=0.75, include="0")
    assert int((model[0].weight == 0).sum()) == 96
    assert torch.equal(model[0].weight, model[0].weight_orig * model[0].weight_mask)


def test_a_failed_call_leaves_also_what_lies_beneath_a_mask():
    model = pruned()
    before = state(model)
    x = batches()[0][0].clone()
    x[3, 2] = torch.nan
    with pytest.raises(DataError):
        sw.prune(model, "wanda", sparsity=0.5, data=[x])
    assert same(model, before) and sw.masks(model) is None
    assert len(model[0]._forward_pre_hooks) == 2


def test_a_layer_that_is_not_pruned_keeps_what_lies_beneath_and_stays_out_of_the_record():
    model = pruned()
    before = model[0].weight_orig.clone()
    result = sw.prune(model, "magnitude", sparsity=0.5, exclude="0.weight")
    assert torch.equal(model[0].weight_orig, before)
    assert result.skipped["0.weight_orig"] == "excluded by name"
    assert set(sw.masks(model)) == {"2.weight"}


def test_too_few_weights_under_a_mask_are_refused_with_what_to_do():
    model = pruned()
    torch_prune.l1_unstructured(model[2], "weight", 0.9)
    before = state(model)
    with pytest.raises(InvalidArgument, match=r"2\.weight_orig.*higher sparsity"):
        sw.prune(model, "magnitude", sparsity=0.5)
    assert same(model, before)


def test_copies_leave_the_model_as_it_is_after_any_forward_pass():
    model = pruned()
    model(batches()[0][0])  # the weight has a graph now, which deepcopy refuses
    before = state(model)
    result = sw.prune(model, "wanda", sparsity=0.5, data=batches(), copy=True)
    assert same(model, before) and sw.masks(model) is None
    assert result.model is not model and sw.masks(result.model)


def test_folding_changes_names_alone():
    model = pruned()
    parameter, mask, x = model[0].weight_orig, model[0].weight_mask.bool(), batches()[0][0]
    expected = model(x)
    record = sw.fold_torch_masks(model)
    assert torch.equal(model(x), expected)
    assert model[0].weight is parameter and not torch_prune.is_pruned(model[0])
    assert set(record) == {"0.weight", "0.bias"}
    assert torch.equal(record["0.weight"], mask) and record.violations(model) == {}
    assert not torch.signbit(model[0].weight[~mask]).any()
    again = sw.fold_torch_masks(model)
    assert set(again) == set(record)
    assert sw.fold_torch_masks(nn.Linear(2, 2)) is None


def test_folding_after_pruning_keeps_the_narrower_mask():
    model = pruned()
    sw.prune(model, "magnitude", sparsity=0.5)
    before, expected = sw.masks(model)["0.weight_orig"], model(batches()[0][0])
    record = sw.fold_torch_masks(model)
    assert torch.equal(record["0.weight"], before)
    assert torch.equal(model(batches()[0][0]), expected)


@pytest.mark.parametrize("first", ["nothing", "prune", "fold"])
def test_fixed_training_keeps_torchs_zeros(first):
    model = pruned()
    if first == "prune":
        sw.prune(model, "magnitude", sparsity=0.5)
    if first == "fold":
        sw.fold_torch_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    run = sw.sparsify(model, optimizer, "fixed")
    x, y = batches()[0]
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    record = run.finish()
    suffix = "" if first == "fold" else "_orig"
    assert {f"0.weight{suffix}", f"0.bias{suffix}"} <= set(record)
    assert record.violations(model) == {}
    if first == "prune":
        assert "2.weight" in record and "2.weight" not in run.skipped


def test_a_mask_without_its_parameter_is_an_error():
    model = pruned()
    sw.prune(model, "magnitude", sparsity=0.5)
    torch_prune.remove(model[0], "weight")  # not through the record
    with pytest.raises(sw.SparseworksError, match=r"0\.weight_orig"):
        sw.sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), "fixed")


def test_saved_and_loaded_bit_for_bit(tmp_path):
    model, twin = pruned(), pruned()
    sw.prune(model, "sparsegpt", sparsity=0.5, data=batches())
    sw.save(model, tmp_path / "m.safetensors")
    sw.load(tmp_path / "m.safetensors", twin)
    assert same(twin, state(model)) and sw.masks(twin).sparsity() == sw.masks(model).sparsity()


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_what_a_norm_rescales_is_named(norm):
    model = pruned()
    norm(model[2])
    before = state(model)
    result = sw.prune(model, "magnitude", sparsity=0.5)
    names = [n for n, _ in model[2].named_parameters() if n.startswith("weight")]
    assert names and all(norm.__name__ in result.skipped[f"2.{n}"] for n in names)
    assert all(torch.equal(model.state_dict()[f"2.{n}"], before[f"2.{n}"]) for n in names)


@pytest.mark.parametrize("method", ["gradual", "rigl"])
def test_methods_that_choose_masks_name_what_torch_pruned(method):
    model = pruned()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = sw.sparsify(model, optimizer, method, sparsity=0.5, steps=10)
    assert set(run.masks) == {"2.weight"}
    assert "fold_torch_masks" in run.skipped["0.weight_orig"]
    assert "fold_torch_masks" in str(run)


def test_slim_cuts_masks_with_their_weights():
    model = pruned()
    x = batches()[0][0]
    result = sw.slim(model, x, flops=0.6, copy=True)
    slimmed = result.model
    assert slimmed[0].weight_orig.shape == slimmed[0].weight_mask.shape != (16, 8)
    assert slimmed[0].weight.shape == slimmed[0].weight_orig.shape
    assert (slimmed[0].out_features, slimmed[0].in_features) == slimmed[0].weight.shape
    slimmed(x)
    sw.slim(model, x, flops=0.6)
    assert type(model[0].weight) is torch.Tensor  # none that the export left
    assert torch.equal(model[0].weight, model[0].weight_orig * model[0].weight_mask)


def test_compile_folds_hooks_in_its_own_copy():
    model = pruned().eval()
    weight_norm(model[2])
    x = batches()[0][0]
    expected, before = model(x), state(model)
    fast = sw.compile(model, x)
    torch.testing.assert_close(fast(x), expected.detach())
    assert same(model, before) and torch_prune.is_pruned(model[0])
    assert "0.weight_orig" in fast.explain() and "2.weight_v" in fast.explain()


class Bare(nn.Module):
    """x W^T and x V, with matrices that are no layers; V is used by nothing else."""

    def __init__(self, width=8):
        super().__init__()
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(2)
        self.W = nn.Parameter(torch.randn(width, width, generator=generator))
        self.V = nn.Parameter(torch.randn(width, width, generator=generator))
        self.bank = nn.Parameter(torch.randn(2, width, width, generator=generator))
        self.shift = nn.Parameter(torch.randn(1, width, generator=generator))
        self.out = nn.Linear(width, width)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = torch.relu(x @ self.W.T) @ self.V + self.shift
        x = (x.expand(2, *x.shape) @ self.bank).sum(0)
        return self.head(torch.relu(self.out(x)))


class Layered(Bare):
    """The same with layers."""

    def __init__(self):
        super().__init__()
        self.w, self.v = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        with torch.no_grad():
            self.w.weight.copy_(self.W)
            self.v.weight.copy_(self.V.T)

    def forward(self, x):
        x = self.v(torch.relu(self.w(x))) + self.shift
        x = (x.expand(2, *x.shape) @ self.bank).sum(0)
        return self.head(torch.relu(self.out(x)))


@pytest.mark.parametrize("pattern", ["row", "2:4", "block2x4"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "snip"])
def test_a_bare_matrix_is_pruned_as_the_layer_that_it_stands_for(method, pattern):
    options = {"pattern": pattern, "data": batches()}
    options |= {} if pattern == "2:4" else {"sparsity": 0.5}
    bare, layered = Bare(), Layered()
    sw.prune(bare, method, include=["W", "V"], **options)
    sw.prune(layered, method, include=["w", "v"], **options)
    torch.testing.assert_close(bare.W, layered.w.weight)
    torch.testing.assert_close(bare.V.T, layered.v.weight)
    assert torch.equal(sw.masks(bare)["V"].T, sw.masks(layered)["v.weight"])


def test_a_bare_bank_is_pruned_matrix_by_matrix():
    model = Bare()
    result = sw.prune(model, "wanda", sparsity=0.5, data=batches(), include="bank")
    assert (sw.masks(model)["bank"].sum(1) == 4).all()  # of every column, which are the outputs
    assert result.tensors[0].error is not None


def test_bare_matrices_without_evidence_are_refused_or_named():
    model = Bare()
    before = state(model)
    with pytest.raises(InvalidArgument, match="W, which stays dense"):
        sw.prune(model, "magnitude", sparsity=0.5, include="W")
    with pytest.raises(InvalidArgument, match="not seen to multiply"):
        sw.prune(model, "magnitude", sparsity=0.5, include="shift", data=batches())
    assert same(model, before)
    result = sw.prune(model, "magnitude", sparsity=0.5, include="*", data=batches())
    assert {t.name for t in result.tensors} == {"W", "V", "bank", "out.weight", "head.weight"}
    assert "not seen to multiply" in result.skipped["shift"]


def test_a_matrix_that_is_multiplied_from_both_sides_is_named():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.W = nn.Parameter(torch.randn(8, 8))
            self.out = nn.Linear(8, 8)

        def forward(self, x):
            return self.out(x @ self.W @ self.W.T)

    result = sw.prune(Twice(), "wanda", sparsity=0.5, include="*", data=batches())
    assert "several ways" in result.skipped["W"]


def test_fixed_training_keeps_the_zeros_of_a_bare_matrix():
    model = Bare()
    sw.prune(model, "wanda", sparsity=0.5, include=["W", "V"], data=batches())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    run = sw.sparsify(model, optimizer, "fixed")
    x, y = batches()[0]
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert set(run.finish()) == {"W", "V"}
    assert sw.masks(model).violations(model) == {}


class Everything(nn.Module):
    """A parameter of every kind that two or more axes can have."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.position = nn.Parameter(torch.zeros(1, 4, 8))
        self.recurrent = nn.LSTM(8, 8, batch_first=True)
        self.transposed = nn.ConvTranspose1d(8, 8, 1)
        self.norm = nn.LayerNorm((4, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True)
        self.pruned = nn.Linear(8, 8)
        self.normed = weight_norm(nn.Linear(8, 8))
        self.parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.spectral = spectral_norm(nn.Linear(8, 8))
        self.bare = Bare()
        self.twin = nn.Linear(8, 8)
        self.plain = nn.Linear(8, 8)
        self.twin.weight = self.plain.weight
        self.list = nn.ParameterList([nn.Parameter(torch.ones(8, 8))])
        self.lora_A = nn.Parameter(torch.zeros(2, 8))
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight
        torch_prune.l1_unstructured(self.pruned, "weight", 0.25)

    def forward(self, ids):
        return self.head(self.plain(self.pruned(self.embed(ids))))


def wide(model):
    return {n for n, p in model.named_parameters(remove_duplicate=False) if p.ndim > 1}


@pytest.mark.parametrize(
    "options",
    [{}, {"include": "plain"}, {"include": "*"}, {"exclude": "attention"}, {"copy": True}],
)
def test_no_matrix_is_absent_from_the_result_of_prune(options):
    model = Everything()
    ids = torch.zeros(2, 4, dtype=torch.int64)
    result = sw.prune(model, "magnitude", sparsity=0.5, data=[ids], **options)
    treated = {t.name for t in result.tensors}
    assert treated | set(result.skipped) == wide(model)
    assert not treated & set(result.skipped) and all(result.skipped.values())


@pytest.mark.parametrize("method", ["fixed", "rigl"])
def test_no_matrix_is_absent_from_a_run(method):
    model = Everything()
    options = {} if method == "fixed" else {"sparsity": 0.5, "steps": 10}
    if method == "fixed":
        sw.prune(model, "magnitude", sparsity=0.5)
    run = sw.sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), method, **options)
    names = set(run.masks) | set(run.skipped)
    assert names == wide(model) and not set(run.masks) & set(run.skipped)


def test_no_matrix_is_absent_from_a_transformed_model():
    model = Everything()
    before = wide(model)
    job = sw.transform(model, "jackpots", sparsity=0.5, steps=10, include=["bare.out", "attention"])
    assert set(job.views) | set(job.skipped) == before


def test_no_matrix_is_absent_from_a_slimmed_model():
    model = Bare()
    model.unused = nn.Linear(8, 8)
    result = sw.slim(model, batches()[0][0], flops=0.7, exclude="out")
    assert set(result.shapes) | set(result.skipped) >= wide(model)
    assert "not reached" in result.skipped["unused.weight"]
    assert not wide(model) & set(result.shapes) & set(result.skipped)
    assert set(result.to_dict()["skipped"]) == set(result.skipped)


def test_no_matrix_is_absent_from_a_compiled_model():
    model = Everything().eval()
    fast = sw.compile(model, torch.zeros(2, 4, dtype=torch.int64))
    told = fast.explain()
    ran = set() if fast.plan is None else {n for n in wide(model) if f" {n} " in told}
    folded = next((n for n in fast.notes if "folded" in n), "")
    left = {n for n, p in model.named_parameters() if p.ndim > 1}
    assert all(n in ran or n in fast.skipped or n in folded for n in left)


def test_find_prunable_names_every_matrix_once():
    model = Everything()
    found = find_prunable(model)
    names = [v.name for v in found] + [s.name for s in found.skipped]
    assert set(names) == wide(model) and len(names) == len(set(names))
