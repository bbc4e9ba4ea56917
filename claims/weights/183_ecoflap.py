"""Sparsity per block by sensitivity against the same for all: ECoFLaP, OWL, under Wanda.

Up to 8 seeds: 4 left OWL's ratios per matrix open.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument
from sparseworks.diagnostics.claims import Claim, Promise, Setting
from sparseworks.diagnostics.subjects import language_model_windows
from sparseworks.models.calls import default_loss
from sparseworks.models.views import find_prunable
from sparseworks.weights.oneshot.ecoflap import ZerothOrder
from sparseworks.weights.oneshot.sensitivity import Measured

SPARSITY = 0.6875  # 11 of 16: every matrix of the model reaches it exactly, row by row


def _rank_correlation(a: list[float], b: list[float]) -> float:
    ranks = [torch.tensor(x).argsort().argsort().double() for x in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def _gradient_norms(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """||grad|| of every prunable matrix, mean over batches."""
    named = {v.name: v.parameter for v in find_prunable(model)}
    total = dict.fromkeys(named, 0.0)
    for batch in batches:
        found = torch.autograd.grad(default_loss(model, batch), list(named.values()))
        for name, gradient in zip(named, found):
            total[name] += float(gradient.norm()) / len(batches)
    return total


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    dense, calibration, _, metric = language_model_windows(seed, setting)
    views = list(find_prunable(dense))
    # stage 1 sees one short window a draw: it costs two forward passes a matrix and batch
    draws = 8 if setting == "full" else 3
    few = [{k: v[:1, :128] for k, v in b.items()} for b in calibration[:draws]]
    rule = ZerothOrder()
    sizes = rule.measure(Measured(dense, few, None, None, seed), {v.name: [v] for v in views})
    norms = _gradient_norms(dense, few)
    blocks: dict[str, float] = {}
    for view in views:
        blocks[rule.group_of(view)] = blocks.get(rule.group_of(view), 0.0) + sizes[view.name]
    order = sorted(blocks, key=blocks.__getitem__)
    mirrored = {a: blocks[b] for a, b in zip(order, reversed(order))}
    arms: dict[str, Any] = {
        "uniform": "uniform",
        "ecoflap": rule.budget_of(blocks, views),
        "reversed": rule.budget_of(mirrored, views),
        "owl": "owl",
        "owl per tensor": "owl:per=tensor",
    }
    found = {"rank correlation": _rank_correlation([sizes[n] for n in norms], [*norms.values()])}
    found["dense loss"] = math.log(metric(dense))
    for arm, budget in arms.items():
        result = sw.prune(
            dense, "wanda", sparsity=SPARSITY, budget=budget, data=calibration, copy=True
        )
        if abs(result.sparsity - SPARSITY) > 2e-4:
            raise InvalidArgument(f"{arm}: sparsity {result.sparsity}, not {SPARSITY}")
        found[f"{arm} loss"] = math.log(metric(result.model))
    for arm in ("ecoflap", "owl", "owl per tensor"):
        found[f"{arm} over uniform"] = found["uniform loss"] - found[f"{arm} loss"]
    found["ecoflap over reversed"] = found["reversed loss"] - found["ecoflap loss"]
    return found


CLAIM = Claim(
    card="183",
    method="ecoflap",
    title="sparsity per block by what the loss feels prunes better than the same for all",
    model="a 6M-parameter Llama of 6 blocks, by Wanda, 68.75 %",
    data="novels: 32 x 256 calibration tokens, 32 windows held out; both drawn anew per seed",
    baseline="the same sparsity in every block; ECoFLaP's scores given in reversed order",
    metric="loss per token (log-perplexity), differences on the same windows",
    promises=(
        Promise("ecoflap over uniform", "loss below that of uniform sparsity, ECoFLaP"),
        Promise("ecoflap over reversed", "loss below that of the reversed scores, ECoFLaP"),
        Promise("owl over uniform", "loss below that of uniform sparsity, OWL"),
        Promise("owl per tensor over uniform", "the same with OWL's ratios per matrix"),
        Promise(
            "rank correlation",
            "zeroth-order scores and true gradient norms of 42 matrices, Spearman",
            margin=0.8,
        ),
    ),
    measure=measure,
    looks=(3, 5, 8),
)
