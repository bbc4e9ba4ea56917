"""`sw.prune` against plain implementations of the papers, and what Wanda's score is blind to."""

from __future__ import annotations

import copy

import pytest
import reference_pruners as reference
import torch

import sparseworks as sw
from sparseworks import data
from sparseworks.diagnostics.metrics import perplexity

CASES = [("wanda", "row", 0.5)]


@pytest.fixture(scope="module")
def subject(data_root):
    transformers = pytest.importorskip("transformers")
    folder = data_root / "models" / "novel-llama-6m"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = data_root / "text"
    calibration = data.load(text / "novels-train.txt", tokenizer=tokenizer, samples=16)
    held = data.load(text / "novels-valid.txt", tokenizer=tokenizer, samples=20,
                     split="evaluation")  # fmt: skip
    return model, calibration, perplexity(held)


@pytest.mark.parametrize("method,pattern,sparsity", CASES)
def test_perplexity_agrees_within_one_percent(subject, method, pattern, sparsity):
    dense, calibration, metric = subject
    ours = copy.deepcopy(dense)
    sw.prune(ours, method, sparsity=sparsity, pattern=pattern, data=calibration)
    theirs = copy.deepcopy(dense)
    plain = getattr(reference, method)(sparsity, (2, 4) if pattern == "2:4" else None)
    windows = [batch["input_ids"] for batch in calibration]
    reference.prune_blocks(theirs, theirs.model.layers, windows, plain)
    assert metric(theirs) > metric(dense) * 1.005  # it did prune
    assert metric(ours) == pytest.approx(metric(theirs), rel=0.01)


@torch.no_grad()
def _scale_norms(model, factor, seed=0):
    """The same function: some norm gains times `factor`, the columns that read them over it."""
    generator = torch.Generator().manual_seed(seed)
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        readers = {
            block.input_layernorm: (attention.q_proj, attention.k_proj, attention.v_proj),
            block.post_attention_layernorm: (mlp.gate_proj, mlp.up_proj),
        }
        for norm, linears in readers.items():
            chosen = torch.rand(norm.weight.shape, generator=generator) < 0.1
            norm.weight[chosen] *= factor
            for linear in linears:
                linear.weight[:, chosen] /= factor


def test_wanda_sees_through_rescaled_norms_and_magnitude_does_not(subject):
    dense, calibration, metric = subject
    scaled = copy.deepcopy(dense)
    _scale_norms(scaled, 32.0)  # a power of two: only exponents change
    assert metric(scaled) == pytest.approx(metric(dense), rel=1e-5)
    masks, value = {}, {}
    for name, start in (("dense", dense), ("scaled", scaled)):
        for method in ("wanda", "magnitude"):
            result = sw.prune(start, method, sparsity=0.5, pattern="row", data=calibration,
                              copy=True)  # fmt: skip
            masks[name, method] = result.masks
            value[name, method] = metric(result.model)
    read = [
        n for n in masks["dense", "wanda"] if not n.endswith(("o_proj.weight", "down_proj.weight"))
    ]

    def moved(method):
        pairs = [(masks["dense", method][n], masks["scaled", method][n]) for n in read]
        return sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)

    assert read and moved("wanda") < 1e-4  # ties of rounding only
    assert moved("magnitude") > 0.05
    assert value["scaled", "wanda"] == pytest.approx(value["dense", "wanda"], rel=1e-3)
    assert value["scaled", "magnitude"] > 1.05 * value["dense", "magnitude"]
