"""Adapters beside frozen weights are no weights of the model, as PEFT and others make them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.models.views import find_prunable


class Adapted(nn.Module):
    """A linear layer with LoRA, of the structure that PEFT gives it."""

    adapter_layer_names = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "gains")

    def __init__(self, base, rank=4):
        super().__init__()
        self.base_layer = base
        wide, high = base.in_features, base.out_features
        self.lora_A = nn.ModuleDict({"default": nn.Linear(wide, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, high, bias=False)})
        self.lora_embedding_A = nn.ParameterDict({"default": torch.ones(rank, wide)})
        self.lora_embedding_B = nn.ParameterDict({})
        self.gains = nn.ModuleDict({"default": nn.Linear(high, high, bias=False)})

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        more = self.lora_B["default"](self.lora_A["default"](x))
        return self.base_layer(x) + self.gains["default"](more)


class Block(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.o_proj(torch.relu(self.q_proj(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Block(), Block()])
        self.classifier = nn.Linear(16, 4)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x)


def adapted(head=False):
    model = Model()
    for layer in model.layers:
        layer.q_proj = Adapted(layer.q_proj)
    if head:
        model.classifier = Adapted(model.classifier)
    return model


def data():
    return [torch.randn(8, 16, generator=torch.Generator().manual_seed(1))]


def adapters(model):
    owners = ("lora_", "gains", "modules_to_save")
    return {n for n, _ in model.named_parameters() if any(o in n for o in owners)}


def wide(model):
    return {n for n, p in model.named_parameters() if p.ndim > 1}


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_only_weights_of_the_model_are_pruned(method, head):
    model = adapted(head)
    before = {n: p.clone() for n, p in model.named_parameters()}
    result = sw.prune(model, method, sparsity=0.5, data=data())
    now = dict(model.named_parameters())
    assert {t.name for t in result.tensors} == {
        f"layers.{i}.{n}.weight" for i in range(2) for n in ("q_proj.base_layer", "o_proj")
    }
    for name in adapters(model):
        assert torch.equal(now[name], before[name])
        assert result.skipped[name] == "an adapter, not a weight of the model"
    classifier = "classifier.base_layer.weight" if head else "classifier.weight"
    assert result.skipped[classifier] == "output head"
    assert {t.name for t in result.tensors} | set(result.skipped) == wide(model)


@pytest.mark.parametrize("include", ["*q_proj*", "layers", "*", "*.weight", "*.q_proj.*"])
def test_an_adapter_is_not_meant_by_the_name_of_its_layer(include):
    names = {v.name for v in find_prunable(adapted(), include=include)}
    assert names and not names & adapters(adapted())
    assert "layers.0.q_proj.base_layer.weight" in names


@pytest.mark.parametrize(
    "include", ["*lora_A*", "*.lora_A", "layers.0.q_proj.lora_A.default.weight"]
)
def test_an_adapter_is_pruned_by_its_own_name(include):
    names = {v.name for v in find_prunable(adapted(), include=include)}
    assert "layers.0.q_proj.lora_A.default.weight" in names
    assert all("lora_A" in n for n in names)


def test_adapters_of_other_libraries_are_known_by_name():
    class Direct(nn.Linear):
        def __init__(self):
            super().__init__(16, 16)
            self.lora_A = nn.Parameter(torch.ones(2, 16))
            self.lora_B = nn.Parameter(torch.ones(16, 2))

    model = Model()
    model.layers[0].q_proj = Direct()
    result = sw.prune(model, "magnitude", sparsity=0.5)
    assert "layers.0.q_proj.weight" in {t.name for t in result.tensors}
    for name in ("lora_A", "lora_B"):
        assert "adapter" in result.skipped[f"layers.0.q_proj.{name}"]


def test_sparse_training_leaves_adapters_alone():
    model = adapted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = sw.sparsify(model, optimizer, "gradual", sparsity=0.5, steps=10)
    assert not set(run.masks) & adapters(model)
    assert set(run.masks) | set(run.skipped) == wide(model)


def test_slim_keeps_the_rank():
    model = adapted()
    result = sw.slim(model, data()[0], flops=0.8)
    for layer in model.layers:
        assert layer.q_proj.lora_A["default"].out_features == 4
        assert layer.q_proj.lora_B["default"].in_features == 4
    rank = "layers.0.q_proj.lora_A.default.weight"
    assert rank in result.shapes or "adapter" in result.skipped[rank]
    model(data()[0])


def test_a_model_of_peft():
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config)
    dense = {v.name for v in find_prunable(base)}
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, task_type="CAUSAL_LM"))
    ids = torch.randint(0, 64, (2, 12))
    result = sw.prune(model, "wanda", sparsity=0.5, data=[{"input_ids": ids}])
    names = {t.name.removeprefix("base_model.model.").replace(".base_layer", "")
             for t in result.tensors}  # fmt: skip
    assert names == dense
    assert all("adapter" in result.skipped[n] for n in adapters(model))
