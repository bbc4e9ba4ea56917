"""Streaming block by block gives what a full forward pass through the pruned model shows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sparseworks.core.errors import DataError
from sparseworks.core.evidence import Hessian, InputNorm
from sparseworks.models.blocks import Stack, find_stages
from sparseworks.models.calibration import Calibration, collect, stream
from sparseworks.models.calls import call, few_tokens
from sparseworks.models.tap import calibration_mode
from sparseworks.models.views import find_prunable

sys.path.insert(0, str(Path(__file__).parent))
from families import FAMILIES, make


def _norms(view, device):
    return [InputNorm(view.groups, view.shape[1], device)]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_streamed_evidence_is_that_of_a_full_pass_through_the_pruned_model(name):
    model, batches = make(name)
    views = list(find_prunable(model))
    with calibration_mode(model):
        stages = find_stages(model, views, batches[0])
    stage_of = {}
    for position, stage in enumerate(stages):
        if isinstance(stage, Stack):
            for i, block in enumerate(stage.views):
                stage_of |= {v.name: (position, i) for v in block}
        else:
            stage_of[stage.name] = (position, 0)
    expected, current, seen = {}, None, []

    def visit(view, collectors):
        nonlocal expected, current
        if stage_of[view.name] != current:
            current = stage_of[view.name]
            expected = collect(model, views, Calibration(batches), _norms)
        torch.testing.assert_close(
            collectors[0].norm, expected[view.name][0].norm, rtol=1e-4, atol=1e-5
        )
        assert torch.equal(collectors[0].tokens, expected[view.name][0].tokens)
        seen.append(view.name)
        with torch.no_grad():  # a change that later blocks must see
            view.parameter.mul_(torch.rand(view.parameter.shape).round())

    unused = stream(model, views, Calibration(batches), _norms, visit)
    assert sorted(seen + unused) == sorted(v.name for v in views)
    assert not unused


@pytest.mark.parametrize("name", ["bert", "llama", "vit", "t5", "gemma3", "opt", "gpt2"])
def test_transformers_are_streamed_by_block(name):
    model, batches = make(name)
    with calibration_mode(model):
        stages = find_stages(model, list(find_prunable(model)), batches[0])
    stacks = [s for s in stages if isinstance(s, Stack)]
    assert len(stacks) == (2 if name == "t5" else 1)
    assert all(len(b) >= 4 for s in stacks for b in s.views if b)


@pytest.mark.parametrize("name", ["llama", "bert", "vit", "shared"])
def test_evidence_equals_forward_hooks_on_linear_modules(name):
    model, batches = make(name)
    prunable = find_prunable(model)
    sums = {v.name: torch.zeros(v.shape[1]) for v in prunable}

    def hook(view):
        def before(module, args):
            x = args[0].detach().float()
            if x.ndim == 3 and padding is not None and x.shape[:2] == padding.shape:
                x = x[padding]
            sums[view.name] += x.reshape(-1, x.shape[-1]).square().sum(0)

        return before

    linear = [v for v in prunable if isinstance(v.module, nn.Linear)]
    handles = [v.module.register_forward_pre_hook(hook(v)) for v in linear]
    for batch in batches:
        padding = batch["attention_mask"].bool() if isinstance(batch, dict) else None
        with torch.no_grad():
            call(model, batch)
    for handle in handles:
        handle.remove()
    found = collect(model, linear, Calibration(batches), _norms)
    for view in linear:
        torch.testing.assert_close(found[view.name][0].squares[0], sums[view.name])


@pytest.mark.parametrize("name", ["grouped_cnn", "conv1d3d"])
def test_convolution_evidence_predicts_the_output(name):
    """With the patches' Gram matrix G, sum of squared outputs = tr(W G W^T)."""
    model, batches = make(name)
    for view in find_prunable(model):
        if view.layout != "conv":
            continue
        outputs = []
        bias, view.module.bias = view.module.bias, None
        handle = view.module.register_forward_hook(
            lambda m, a, o, out=outputs: out.append(o.detach())
        )
        grams = collect(
            model, [view], Calibration(batches), lambda v, d: [Hessian(v.groups, v.shape[1], d)]
        )[view.name][0].gram
        handle.remove()
        view.module.bias = bias
        weight = view.matrix().view(view.groups, -1, view.shape[1])
        predicted = torch.einsum("goi,gij,goj->", weight, grams, weight)
        actual = sum(o.square().sum() for o in outputs)
        torch.testing.assert_close(predicted, actual, rtol=1e-4, atol=1e-4)


def test_experts_are_told_apart():
    model, batches = make("mixtral")
    views = [v for v in find_prunable(model) if v.layout == "experts"]
    found = collect(model, views, Calibration(batches), _norms)
    tokens = sum(b["input_ids"].numel() for b in batches)
    for view in views:
        assert int(found[view.name][0].tokens.sum()) == 2 * tokens  # two experts a token


def test_where_block_inputs_live_changes_nothing(tmp_path):
    results = []
    for spill, device in ((None, None), (tmp_path, None), (None, "cpu")):
        model, batches = make("llama")
        norms = {}
        calibration = Calibration(batches, spill=spill, device=device)
        stream(
            model, list(find_prunable(model)), calibration, _norms,
            lambda v, c, n=norms: n.__setitem__(v.name, c[0].norm),
        )  # fmt: skip
        assert calibration.hidden_bytes > 0
        results.append(norms)
    for other in results[1:]:
        assert all(torch.equal(results[0][k], other[k]) for k in results[0])
    assert not list(tmp_path.iterdir())


def test_empty_or_broken_data_is_refused():
    with pytest.raises(DataError, match="empty"):
        Calibration([])
    model, batches = make("vit")
    batches[1] = batches[1] * float("nan")
    with pytest.raises(DataError, match="NaN or Inf"):
        collect(model, list(find_prunable(model)), Calibration(batches), _norms)


def test_the_model_is_left_as_it_was():
    model, batches = make("llama")
    model.train()
    model.config.use_cache = True
    collect(model, list(find_prunable(model)), Calibration(batches), _norms)
    assert model.training and model.config.use_cache
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_only_token_ids_with_their_mask_are_cut():
    ids, mask = torch.arange(12).view(2, 6), torch.ones(2, 6)
    short = few_tokens({"input_ids": ids, "attention_mask": mask, "labels": ids}, 4)
    assert torch.equal(short["input_ids"], ids[:, :4]) and short["attention_mask"].shape == (2, 4)
    for whole in (
        {"input_ids": ids, "attention_mask": torch.ones(2, 1, 6, 6)},
        {"input_ids": ids, "pixel_values": torch.ones(2, 6)},
        {"inputs_embeds": torch.ones(2, 6, 3)},
        torch.ones(2, 6),
    ):
        assert few_tokens(whole, 4) is whole
