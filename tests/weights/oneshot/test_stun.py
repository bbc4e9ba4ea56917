"""STUN: clusters by brute force, the experts that stay, the sum of both stages, files."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch

import sparseworks as sw
from sparseworks.core.errors import DataError, InvalidArgument, ModelError
from sparseworks.models.views import find_prunable
from sparseworks.weights.structured import load_slim, save_slim
from sparseworks.weights.structured.experts import clusters, coactivations, find_banks
from tiny_models import DECODER_SIZES

sys.path.insert(0, str(Path(__file__).parents[2] / "models"))
from families import _ids
from families import make as family

transformers = pytest.importorskip("transformers")
SIZES = DECODER_SIZES | {"num_experts_per_tok": 2}
FAMILIES = {
    "Mixtral": {"num_local_experts": 8},
    "Qwen2Moe": {
        "num_experts": 8,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
    },
    "Olmoe": {"num_experts": 8},
}


def make(name):
    """Experts in pairs: 2 i and 2 i + 1 are nearly alike, in weights and in routing."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **FAMILIES[name]})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for bank in find_banks(model):
            bank.router.weight.normal_()
            for _, _, _, tensor in bank.tensors():
                tensor[1::2] = tensor[::2] + 1e-3 * torch.randn(tensor[::2].shape)
    return model, _ids()


def test_clusters_are_complete_linkage_below_one_threshold():
    torch.manual_seed(0)
    for _ in range(20):
        found = {}
        for name in "ab":
            d = torch.rand(6, 6)
            found[name] = ((d + d.t()) / 2).fill_diagonal_(torch.inf)
        for remove in range(9):
            made = clusters(found, remove, {"a": 1, "b": 2})
            assert sum(len(g) for g in made.values()) == 12 - remove
            assert sorted(itertools.chain(*made["a"])) == list(range(6))
            inside = [
                float(found[n][i, j])
                for n, groups in made.items()
                for g in groups
                for i, j in itertools.combinations(g, 2)
            ]
            # the threshold is the least: with one below the largest distance inside, fewer go
            if inside:
                fewer = {n: d.masked_fill(d >= max(inside), 1e9) for n, d in found.items()}
                assert _removed(fewer) < remove
    with pytest.raises(InvalidArgument, match="cannot be removed"):
        clusters(found, 10, {"a": 1, "b": 2})


def _removed(found):
    """Joins of the greedy rule with every distance below 1e9, written plainly."""
    total = 0
    for name, d in found.items():
        groups = [{i} for i in range(len(d))]
        order = sorted(itertools.combinations(range(len(d)), 2), key=lambda p: float(d[p]))
        for i, j in order:
            a, b = (next(g for g in groups if x in g) for x in (i, j))
            small = all(float(d[x, y]) < 1e9 for x in a for y in b) if a is not b else False
            if small and len(groups) > {"a": 1, "b": 2}[name]:
                groups.remove(b)
                a |= b
                total += 1
    return total


def test_coactivation_counts_tokens():
    model, batches = family("mixtral")
    banks = find_banks(model)
    counts = coactivations(model, banks, batches)
    tokens = sum(b["input_ids"].numel() for b in batches)
    for bank in banks:
        together = counts[bank.name]
        assert int(together.diagonal().sum()) == 2 * tokens  # two experts a token
        assert int(together.sum()) == 4 * tokens and torch.equal(together, together.t())


@pytest.mark.parametrize("layers", ["global", "equal"])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_planted_pairs_are_joined_and_both_stages_add_up(name, layers, tmp_path):
    model, batches = make(name)
    dense_banks = [b.router.weight.detach().clone() for b in find_banks(model)]
    total = sum(v.parameter.numel() for v in find_prunable(model))
    result = sw.prune(model, "stun", sparsity=0.6, data=batches, experts=0.5, layers=layers,
                      coactivation=0.0, pattern="unstructured", kappa=0)  # fmt: skip
    for bank, before in zip(find_banks(model), dense_banks):
        assert bank.count == 4 and bank.experts.num_experts == 4
        kept = [int((before == row).all(1).nonzero()[0]) // 2 for row in bank.router.weight]
        assert sorted(kept) == [0, 1, 2, 3]  # one of every pair
    left = sum(v.parameter.numel() for v in find_prunable(model))
    kept = sum(t.kept for t in result.tensors)
    assert kept == pytest.approx(0.4 * total, abs=len(result.tensors))
    assert left < total and "8 of 16 experts" in result.warnings[0]
    assert result.masks.violations(model) == {} and result.method == "stun"
    with torch.no_grad():
        expected = model(**batches[0]).logits
    if layers == "global":
        save_slim(result, tmp_path / "slim")
        again = load_slim(tmp_path / "slim")
    else:
        assert result.changes == ()
        sw.save(model, tmp_path / "plain")
        again = sw.from_pretrained(tmp_path / "plain")
    with torch.no_grad():
        assert torch.equal(again(**batches[0]).logits, expected)
    again.generate(batches[0]["input_ids"], max_new_tokens=2, do_sample=False)


def test_a_layer_of_few_clusters_averages_them():
    model, batches = make("Mixtral")
    before = find_banks(model)[0].experts.down_proj.detach().clone()
    sw.prune(model, "stun", sparsity=0.5, data=batches, experts=0.5, coactivation=0.0,
             local="magnitude", layers="equal", kappa=4, exclude="*experts*")  # fmt: skip
    after = find_banks(model)[0].experts.down_proj
    torch.testing.assert_close(after.detach(), (before[::2] + before[1::2]) / 2)


def test_what_cannot_be_is_refused_and_left_alone():
    model, batches = make("Mixtral")
    before = {n: p.clone() for n, p in model.state_dict().items()}
    for options, kind, message in [
        ({"sparsity": 0.1, "experts": 0.5, "data": batches}, InvalidArgument, "lower experts"),
        ({"sparsity": 0.9, "experts": 0.9, "data": batches}, InvalidArgument, "cannot be removed"),
        ({"sparsity": 0.6}, DataError, "data="),
        ({"data": batches}, InvalidArgument, "needs `sparsity`"),
        ({"sparsity": 0.6, "data": batches, "budget": "fair"}, InvalidArgument, "unknown budget"),
    ]:
        with pytest.raises(kind, match=message):
            sw.prune(model, "stun", **options)
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[n], after[n]) for n in before)
        assert find_banks(model)[0].experts.num_experts == 8
    with pytest.raises(ModelError, match="no layer with a router"):
        sw.prune(family("llama")[0], "stun", sparsity=0.5, data=batches)
    copied = sw.prune(model, "stun", sparsity=0.6, data=batches, copy=True)
    assert find_banks(model)[0].count == 8 and sw.masks(model) is None
    assert sum(b.count for b in find_banks(copied.model)) == 12
