"""Dropping blocks: what goes is missed least, configs describe the rest, failures undo all."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tiny_vit import TinyViT
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument
from sparseworks.weights.structured import load_slim, save_slim
from sparseworks.weights.structured.backup import Backup
from sparseworks.weights.structured.depth import blocks, drop, drop_least, renamed

X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def vit(depth: int = 4, idle: int = 2) -> TinyViT:
    """One block adds next to nothing to its input."""
    torch.manual_seed(1)
    model = TinyViT(depth=depth).eval()
    with torch.no_grad():
        for name in ("proj", "fc2"):
            layer = getattr(model.blocks[idle], name)
            layer.weight.mul_(1e-4)
            layer.bias.zero_()
    return model


@pytest.mark.parametrize("idle", [0, 2, 3])
def test_the_block_that_does_least_goes_and_the_rest_stays(idle: int) -> None:
    model = vit(idle=idle)
    before, expected = list(model.blocks), model(X)
    state = copy.deepcopy(model.state_dict())
    backup = Backup()
    assert drop_least(model, X, backup) == ("blocks", idle, {})
    assert list(model.blocks) == [b for i, b in enumerate(before) if i != idle]
    torch.testing.assert_close(model(X), expected, rtol=1e-2, atol=1e-3)
    backup.restore()
    assert list(model.blocks) == before
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())


def test_only_what_widths_cannot_give_costs_blocks(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="blocks=True"):
        sw.slim(vit(), X, flops=0.45, floor=0.5, copy=True)
    wide = sw.slim(vit(), X, flops=0.8, floor=0.5, blocks=True)
    assert wide.blocks == () and len(wide.model.blocks) == 4
    result = sw.slim(vit(), X, flops=0.45, floor=0.5, blocks=True)
    assert result.blocks == ("blocks.2",) and len(result.model.blocks) == 3
    assert result.flops[1] <= 0.45 * result.flops[0]
    assert "blocks.2" in str(result) and result.to_dict()["blocks"] == ["blocks.2"]
    save_slim(result, tmp_path / "small")
    again = load_slim(tmp_path / "small", vit(idle=0))
    assert torch.equal(again(X), result.model(X))


def test_a_failure_after_a_drop_brings_the_block_back() -> None:
    model = vit()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(InvalidArgument):
        sw.slim(model, X, flops=0.001, floor=0.9, blocks=True)
    assert len(model.blocks) == 4
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())


def test_layers_that_are_no_blocks_stay() -> None:
    chain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    assert not list(blocks(nn.ModuleDict({"chain": chain})))
    with pytest.raises(InvalidArgument, match="no block"):
        drop(vit(), "blocks", 9, Backup())


def test_names_follow_a_drop() -> None:
    assert renamed("a.layers.3.fc.weight axis 0", "a.layers", 1) == "a.layers.2.fc.weight axis 0"
    assert renamed("a.layers.1.fc", "a.layers", 1) is None
    assert renamed("a.layers.0.fc", "a.layers", 1) == "a.layers.0.fc"
    assert renamed("b.layers.3.fc", "a.layers", 1) == "b.layers.3.fc"


@pytest.mark.parametrize("name", ["bert", "gpt2", "qwen2"])
def test_the_config_tells_the_depth_and_plain_loading_works(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    if name == "bert":
        config = transformers.BertConfig(**sizes, intermediate_size=48, num_labels=3)
        model = transformers.BertForSequenceClassification(config)
    elif name == "gpt2":
        config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4)
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.Qwen2Config(**sizes, num_key_value_heads=2, intermediate_size=48)
        model = transformers.Qwen2ForCausalLM(config)
    model.eval()
    ids = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    container, _, fields = drop_least(model, {"input_ids": ids}, Backup())
    assert len(model.get_submodule(container)) == 2
    assert fields["n_layer" if name == "gpt2" else "num_hidden_layers"] == 2
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        if name == "qwen2":  # places in the cache follow
            short = model.generate(ids, max_new_tokens=3, do_sample=False)
            assert torch.equal(short, again.generate(ids, max_new_tokens=3, do_sample=False))
            assert [b.self_attn.layer_idx for b in model.model.layers] == [0, 1]
