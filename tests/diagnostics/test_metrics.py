"""Metrics equal their formulas, and the recorded figures of the shared models."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparseworks.core.errors import InvalidArgument
from sparseworks.data.text import token_ids, windows
from sparseworks.diagnostics.metrics import (
    accuracy,
    divergence,
    fidelity,
    get_metric,
    perplexity,
    retrieval,
)
from sparseworks.diagnostics.statistics import bootstrap_interval, paired_interval, student_quantile


class Table(nn.Module):
    """A bigram model: logits of the next token from a table."""

    def __init__(self, size=7):
        super().__init__()
        self.table = nn.Parameter(torch.randn(size, size))

    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(
            logits=self.table[input_ids], last_hidden_state=self.table[input_ids]
        )


def test_perplexity_is_its_formula():
    model = Table()
    ids = torch.randint(0, 7, (3, 5))
    log_p = model.table.detach().log_softmax(-1)
    losses = [-log_p[a, b] for row in ids.tolist() for a, b in itertools.pairwise(row)]
    expected = math.exp(sum(losses) / len(losses))
    batches = [{"input_ids": ids[:1]}, {"input_ids": ids[1:]}]
    assert perplexity(batches)(model) == pytest.approx(expected, rel=1e-5)


def test_divergence_is_its_formula_and_remembers_the_dense_model():
    dense, other = Table(), Table()
    ids = torch.randint(0, 7, (3, 5))
    metric = divergence(dense, [{"input_ids": ids[:1]}, {"input_ids": ids[1:]}])
    assert metric(dense) == pytest.approx(0.0, abs=1e-6)
    p, q = (m.table.detach().double().softmax(-1) for m in (dense, other))
    expected = sum(float((p[a] * (p[a] / q[a]).log()).sum()) for a in ids.flatten()) / ids.numel()
    with torch.no_grad():
        dense.table.zero_()
    assert metric(other) == pytest.approx(expected, rel=1e-5)


def test_perplexity_of_the_shared_language_model(data_root):
    transformers = pytest.importorskip("transformers")
    folder = data_root / "models" / "novel-llama-6m"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = (data_root / "text" / "novels-valid.txt").read_text()[:240_000]
    held = windows(token_ids(text, tokenizer), length=256, batch_size=32)
    assert perplexity(held)(model) == pytest.approx(52.4, abs=0.05)


def test_fidelity_and_retrieval():
    torch.manual_seed(0)
    model = Table(50)
    ids = torch.arange(40).view(20, 2)
    mask = torch.ones_like(ids)
    batch = {"input_ids": ids, "attention_mask": mask}
    metric = fidelity(model, [batch])
    assert metric(model) == pytest.approx(1.0)
    other = Table(50)
    a, b = (nn.functional.normalize(m.table.detach()[ids].mean(1), dim=-1) for m in (model, other))
    assert metric(other) == pytest.approx(float((a * b).sum(-1).mean()), abs=1e-6)
    assert retrieval([batch], [batch])(model) == 100.0
    rolled = {"input_ids": ids.roll(1, 0), "attention_mask": mask}
    assert retrieval([batch], [rolled])(model) == 0.0


def test_accuracy_and_modes():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9)).train()
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(2))
        net[0].bias.zero_()
    x, y = torch.tensor([[1.0, 0], [0, 1], [1, 0]]), torch.tensor([0, 1, 1])
    assert accuracy([(x, y)])(net) == pytest.approx(200 / 3)
    assert net.training
    assert get_metric(lambda m: 3.0, model=net)(net) == 3.0
    with pytest.raises(InvalidArgument, match="unknown metric"):
        get_metric("speed", model=net)


def test_quantiles_of_published_tables():
    for freedom, level, value in (
        (1, 0.95, 12.706), (2, 0.95, 4.303), (3, 0.95, 3.182), (10, 0.99, 3.169), (29, 0.9, 1.699),
    ):  # fmt: skip
        assert student_quantile(level, freedom) == pytest.approx(value, abs=5e-4)


def test_intervals_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    for values in ([1.0, 2.0], [1.0, 2.0, 4.0], [0.1] * 2 + [0.3] * 5, list(range(25))):
        for level in (0.95, 0.9875):
            ours = paired_interval([float(v) for v in values], level)
            scale = stats.sem(values)
            low, high = stats.t.interval(level, len(values) - 1, loc=ours.mean, scale=scale)
            assert (ours.low, ours.high) == pytest.approx((low, high), rel=1e-9)
    assert paired_interval([1.0]).high == math.inf
    normal = torch.randn(4000, generator=torch.Generator().manual_seed(0)) + 1
    boot = bootstrap_interval(normal)
    assert boot.low < boot.mean < boot.high
    assert boot.high - boot.low == pytest.approx(2 * 1.96 / 4000**0.5, rel=0.15)
