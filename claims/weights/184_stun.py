"""STUN on a mixture with planted redundancy: similar experts go first, then single weights.

Half of the experts go in the first comparison, one of every pair: with a third the choice hardly
mattered. 0.01 nats (1 % of perplexity) is the least that counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import MissingDependency
from sparseworks.diagnostics.claims import Claim, Promise, Setting
from sparseworks.diagnostics.subjects import language_model_windows
from sparseworks.models.hooks import duplicate
from sparseworks.weights.structured.backup import Backup
from sparseworks.weights.structured.experts import find_banks, keep_experts

EXPERTS = 6  # three pairs: the two of a pair are nearly alike, in weights and in routing
APART, WITHIN = 0.35, 0.05  # noise of a pair and of its members, in deviations of the weights


@torch.no_grad()
def _mixture(dense: Any, seed: int) -> nn.Module:
    """The dense decoder upcycled to a Mixtral of six experts in pairs."""
    try:
        from transformers import MixtralConfig, MixtralForCausalLM
    except ImportError:
        raise MissingDependency("this claim needs: pip install 'sparseworks[hf]'") from None
    told = {
        n: getattr(dense.config, n)
        for n in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
            "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
            "rms_norm_eps", "tie_word_embeddings", "rope_parameters",
        )
    }  # fmt: skip
    config = MixtralConfig(**told, num_local_experts=EXPERTS, num_experts_per_tok=2)
    model = MixtralForCausalLM(config).eval()
    own, given = model.state_dict(), dense.state_dict()
    model.load_state_dict({n: given[n] for n in own if n in given}, strict=False)
    generator = torch.Generator().manual_seed(seed)
    for layer, old in zip(model.model.layers, dense.model.layers):
        bank, mlp = layer.mlp.experts, old.mlp
        pairs = {
            bank.gate_up_proj: torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
            bank.down_proj: mlp.down_proj.weight,
            layer.mlp.gate.weight: torch.zeros_like(layer.mlp.gate.weight[0]),
        }
        for target, base in pairs.items():
            scale = float(base.std()) if base.any() else 1.0
            for pair in range(EXPERTS // 2):
                shared = APART * scale * torch.randn(base.shape, generator=generator)
                for expert in (2 * pair, 2 * pair + 1):
                    noise = WITHIN * scale * torch.randn(base.shape, generator=generator)
                    target[expert] = base + shared + noise
    return model


def _at_random(model: nn.Module, kept: int, seed: int) -> nn.Module:
    """As many experts of every layer, drawn at random."""
    twin = duplicate(model)
    generator = torch.Generator().manual_seed(seed)
    for bank in find_banks(twin):
        order = torch.randperm(bank.count, generator=generator).tolist()
        keep_experts(twin, bank, [[i] for i in order[:kept]], 0, Backup())
    return twin


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    dense, calibration, _, metric = language_model_windows(seed, setting)
    model, calibration = _mixture(dense, seed), calibration[:2]
    found = {"dense loss": math.log(metric(dense)), "mixture loss": math.log(metric(model))}
    third = {"experts": 1 / 3, "layers": "equal", "kappa": 0, "copy": True, "data": calibration}
    half = {**third, "experts": 1 / 2}
    alone = sw.prune(model, "stun", sparsity=_share(model, 2), **half)
    found["experts loss"] = math.log(metric(alone.model))
    found["random experts loss"] = math.log(metric(_at_random(model, EXPERTS // 2, seed)))
    both = sw.prune(model, "stun", sparsity=0.6, pattern="row", **third)
    found["stun loss"] = math.log(metric(both.model))
    weights = sw.prune(model, "wanda", sparsity=0.6, copy=True, data=calibration)
    found["wanda loss"] = math.log(metric(weights.model))
    found["similar over random"] = found["random experts loss"] - found["experts loss"]
    found["stun over wanda"] = found["wanda loss"] - found["stun loss"]
    return found


def _share(model: nn.Module, part: int) -> float:
    """What one in `part` experts is of all prunable weights."""
    views = list(sw.find_prunable(model))
    total = sum(v.parameter.numel() for v in views)
    banks = sum(v.parameter.numel() for v in views if v.groups == EXPERTS)
    return banks / part / total


CLAIM = Claim(
    card="184",
    method="stun",
    title="similar experts first, then single weights",
    model="a 6M-parameter Llama upcycled to six experts in three pairs of near copies, untrained",
    data="novels: 16 x 256 calibration tokens, 32 windows held out; all drawn anew per seed",
    baseline="the same number of experts at random; Wanda alone at the same total sparsity",
    metric="loss per token (log-perplexity) on the same windows",
    promises=(
        Promise("similar over random", "half of the experts: loss below random ones'",
                negligible=0.01),
        Promise("stun over wanda", "60 % in all: loss below that of Wanda alone"),
    ),
    measure=measure,
    looks=(3, 5, 8),
    version=2,
)  # fmt: skip
