"""The last product of a block is left out where only evidence is wanted; nothing else changes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.core.evidence import InputNorm
from sparseworks.models import blocks
from sparseworks.models.calibration import Calibration, stream
from sparseworks.models.tap import EvidenceTap
from sparseworks.models.views import find_prunable

sys.path.insert(0, str(Path(__file__).parent))
from families import FAMILIES, make


def _streamed(model, batches):
    """Norms of every view, each weight halved where they are visited."""
    norms = {}

    def visit(view, collectors):
        norms[view.name] = collectors[0].norm, collectors[0].tokens
        with torch.no_grad():
            view.parameter.mul_(0.5)

    views = list(find_prunable(model))
    stream(
        model, views, Calibration(batches), lambda v, d: [InputNorm(v.groups, v.shape[1], d)], visit
    )
    return norms


@pytest.fixture
def left_out(monkeypatch):
    """Names of the views whose products were left out, one for each time."""
    names = []
    whole = EvidenceTap._unwanted

    def counted(tap, func, args):
        zeros = whole(tap, func, args)
        if zeros is not None:
            names.append(tap.idle.name)
        return zeros

    monkeypatch.setattr(EvidenceTap, "_unwanted", counted)
    return names


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_evidence_is_the_same_to_the_bit(name, monkeypatch, left_out):
    model, batches = make(name)
    found = _streamed(model, batches)
    did = len(left_out)
    monkeypatch.setattr(blocks, "_last", lambda *_: None)
    model, batches = make(name)
    whole = _streamed(model, batches)
    assert len(left_out) == did and found.keys() == whole.keys()
    for n in found:
        assert all(torch.equal(a, b) for a, b in zip(found[n], whole[n])), n
    if name in ("llama", "bert", "gpt2"):
        assert did == model.config.num_hidden_layers * len(batches)


@pytest.mark.parametrize("method,options,some", [
    ("wanda", {}, True), ("wanda", {"propagate": "dense"}, False), ("sparsegpt", {}, False),
])  # fmt: skip
def test_where_outputs_are_needed_they_are_computed(method, options, some, left_out):
    model, batches = make("llama")
    sw.prune(model, method, sparsity=0.5, data=batches, **options)
    assert bool(left_out) == some


class Turning(nn.Module):
    """Two layers whose order depends on the inputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        first, second = (self.a, self.b) if float(x[0, 0]) > 0 else (self.b, self.a)
        return second(first(x).relu())


def test_a_block_that_goes_on_after_the_product_is_gathered_in_full(monkeypatch, left_out):
    torch.manual_seed(0)
    made = [torch.randn(9, 6).abs(), -torch.randn(9, 6).abs(), torch.randn(9, 6)]
    state = nn.Sequential(Turning(), Turning()).state_dict()
    found = []
    for whole in (False, True):
        model = nn.Sequential(Turning(), Turning()).eval()
        model.load_state_dict(state)
        with monkeypatch.context() as patch:
            if whole:
                patch.setattr(blocks, "_last", lambda *_: None)
            found.append(_streamed(model, made))
    assert "0.b.weight" in left_out
    for n in found[0]:
        assert all(torch.equal(a, b) for a, b in zip(found[0][n], found[1][n])), n
