"""The test of own-method: its formula again, number by number, and what every method keeps."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import sparseworks as sw

sw.load_plugin(Path(__file__).with_name("own_method.py"))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def test_it_keeps_what_the_formula_says() -> None:
    model = net()
    rows = model.get_parameter("0.weight").tolist()
    scores = {}
    for i, row in enumerate(rows):
        mean = sum(abs(w) for w in row) / len(row)
        scores.update({(i, j): abs(w) / mean**0.5 for j, w in enumerate(row)})
    kept = sorted(scores, key=lambda place: -scores[place])[: len(scores) // 2]
    sw.prune(model, "own-method", sparsity=0.5, balance=0.5)
    pruned = model.get_parameter("0.weight").tolist()
    assert {(i, j) for i, row in enumerate(pruned) for j, w in enumerate(row) if w} == set(kept)


def test_zeros_are_exact_and_recorded() -> None:
    for pattern, sparsity in (("unstructured", 0.7), ("2:4", 0.5)):
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        result = sw.prune(model, "own-method", sparsity=sparsity, pattern=pattern)
        masks = sw.masks(model)
        assert abs(result.sparsity - sparsity) <= 1 / 64
        assert masks is not None and masks.violations(model) == {}
