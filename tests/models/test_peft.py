"""PEFT's own adapters on a pruned model: trained beside zeros that stay, and merged."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparseworks as sw

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
CONFIGS = {
    "lora": lambda: peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4),
    "dora": lambda: peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, use_dora=True),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
}


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1,
        )
    )  # fmt: skip


def batch():
    ids = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def train(model, steps=5):
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(wanted, 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        optimizer.step()
    return float(model(**batch()).loss)


@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_train_beside_zeros_that_stay(name):
    model = llama()
    sw.prune(model, "wanda", sparsity=0.5, data=[batch()])
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    before = float(model(**batch()).loss)
    adapted = peft.get_peft_model(model, CONFIGS[name]())
    assert train(adapted) < before
    now = {
        n.removeprefix("base_model.model.").replace(".base_layer", ""): p
        for n, p in adapted.named_parameters()
    }
    assert all(torch.equal(now[n], p) for n, p in base.items())
    merged = adapted.merge_and_unload()
    assert merged is model or type(merged) is type(model)
    record = sw.masks(merged)
    changed = record.violations(merged)  # a dense update was added to these weights
    wanted = ("q_proj", "v_proj") if name != "ia3" else ()  # IA3 scales: zeros stay zeros
    assert {n.split(".")[-2] for n in changed} == set(wanted)
    record.apply(merged)
    assert record.violations(merged) == {}


def test_pruning_a_model_with_adapters_prunes_the_base_alone():
    adapted = peft.get_peft_model(llama(), CONFIGS["lora"]())
    train(adapted)
    before = {n: p.detach().clone() for n, p in adapted.named_parameters()}
    result = sw.prune(adapted, "wanda", sparsity=0.5, data=[batch()])
    assert all("lora_" not in t.name for t in result.tensors)
    assert len(result.tensors) == 14 and result.sparsity == pytest.approx(0.5, abs=0.01)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, before[name])


def test_sparse_training_of_the_base_with_adapters_keeps_the_law():
    adapted = peft.get_peft_model(llama(), CONFIGS["lora"]())
    for p in adapted.parameters():
        p.requires_grad_(True)
    optimizer = torch.optim.SGD(adapted.parameters(), 0.1)
    run = sw.sparsify(adapted, optimizer, "rigl", sparsity=0.75, steps=6, every=2)
    assert not any("lora_" in n for n in run.masks)
    for _ in range(6):
        optimizer.zero_grad()
        adapted(**batch()).loss.backward()
        optimizer.step()
    run.finish()
    record = sw.masks(adapted)
    assert record.violations(adapted) == {}
    assert record.sparsity() == pytest.approx(0.75, abs=0.01)


def test_the_adapters_alone_are_saved_and_loaded_over_the_pruned_base(tmp_path):
    model = llama()
    sw.prune(model, "magnitude", sparsity=0.5)
    sw.save(model, tmp_path / "base.safetensors")
    adapted = peft.get_peft_model(model, CONFIGS["lora"]())
    train(adapted)
    adapted.eval().save_pretrained(tmp_path / "adapter")
    base = sw.load(tmp_path / "base.safetensors", llama())
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(**batch()).logits, adapted(**batch()).logits)
    assert isinstance(base, nn.Module) and sw.masks(base).sparsity() == pytest.approx(0.5, abs=0.01)
