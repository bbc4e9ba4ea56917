"""Multiply-adds: against closed formulas, torch's own counter, and by whom they are caused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from sparseworks.models.costs import multiply_adds
from sparseworks.models.zoo import resnet20


def resnet_formula(name, parameter):
    """Size times places of a CIFAR ResNet on 32 x 32 images."""
    places = 32 * 32
    if name.startswith("linear"):
        places = 1
    elif name.startswith(("layer2", "layer3")):
        places = 16 * 16 if name.startswith("layer2") else 8 * 8
    return parameter.numel() * places


def test_a_resnet_costs_what_its_shapes_say():
    model = resnet20().to(memory_format=torch.channels_last).train()
    cost = multiply_adds(model, torch.randn(3, 3, 32, 32))
    assert model.training
    for name, parameter in model.named_parameters():
        expected = 3 * resnet_formula(name, parameter) if parameter.ndim > 1 else 0
        assert cost.parameters[name] == expected, name
    assert cost.other == 0
    half = dict.fromkeys(cost.parameters, 0.5)
    assert cost.sparse(half) == cost.dense / 2 and cost.sparse({}) == cost.dense


class Mixed(nn.Module):
    """Packed attention, a tied embedding, a grouped convolution, a functional product."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.grouped = nn.Conv1d(8, 8, 3, padding=1, groups=4)
        self.bank = nn.Parameter(torch.randn(2, 8, 6))

    def forward(self, ids):
        x = self.table(ids)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.grouped(x.transpose(1, 2)).transpose(1, 2)
        y = sum(x @ part for part in self.bank)
        return F.linear(x, self.table.weight), y


def test_packed_tied_and_functional_weights_are_counted():
    torch.manual_seed(0)
    model, ids = Mixed(), torch.randint(0, 11, (2, 5))
    cost = multiply_adds(model, ids)
    tokens = 10
    assert cost.parameters["attention.in_proj_weight"] == tokens * 3 * 8 * 8
    assert cost.parameters["attention.out_proj.weight"] == tokens * 8 * 8
    assert cost.parameters["grouped.weight"] == tokens * 8 * 2 * 3
    assert cost.parameters["bank"] == tokens * 2 * 8 * 6
    assert cost.parameters["table.weight"] == tokens * 8 * 11
    assert cost.other == 2 * (2 * 5 * 5 * 8)  # scores and mixing, 2 samples, 8 channels


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_it_agrees_with_torchs_own_counter_on_a_transformer(implementation):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=24, attn_implementation=implementation,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    batch = {"input_ids": torch.randint(0, 30, (2, 7))}
    cost = multiply_adds(model, batch)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**batch)
    assert 2 * cost.dense == pytest.approx(counter.get_total_flops(), rel=0.005)
    size = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n)
    assert sum(cost.parameters.values()) == 2 * 7 * size
