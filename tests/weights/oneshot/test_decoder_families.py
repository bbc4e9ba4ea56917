"""Decoder families in common use: each prunes by Wanda, saves, loads again, and generates."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import sparseworks as sw
from sparseworks.models.views import find_prunable
from tiny_models import DECODER_SIZES

sys.path.insert(0, str(Path(__file__).parents[2] / "models"))
from families import _ids

transformers = pytest.importorskip("transformers")
SIZES = DECODER_SIZES | {"pad_token_id": 0}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES = {
    "Llama": {},
    "Mistral": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "sliding_window": 4},
    "Gemma3": {"head_dim": 8, "sliding_window": 4},
    "Phi3": {},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 32},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "GPTNeoX": {},
    "DeepseekV2": LATENT,
    "DeepseekV3": LATENT,
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": {**ROUTED, "shared_expert_intermediate_size": 24},
    "Qwen3Moe": {**ROUTED, "head_dim": 8},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}
_OWN = {"GPT2": "GPT2LMHeadModel"}  # classes that are not named <family>ForCausalLM
_TEXT = {"Gemma3": "Gemma3TextConfig"}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_prunes_saves_loads_and_generates(family, tmp_path):
    torch.manual_seed(0)
    config_class = getattr(transformers, _TEXT.get(family, f"{family}Config"))
    sizes = {} if family == "GPT2" else SIZES
    config = config_class(**{**sizes, "vocab_size": 64, **FAMILIES[family]})
    model = getattr(transformers, _OWN.get(family, f"{family}ForCausalLM"))(config).eval()
    batches = _ids()
    result = sw.prune(model, "wanda", sparsity=0.5, data=batches)
    assert set(result.masks) == {v.name for v in find_prunable(model)}
    assert result.masks.violations(model) == {}
    # nothing of a layer is passed over in silence: every matrix is pruned or has its reason
    layers = [n for n, p in model.named_parameters() if p.ndim >= 2]
    assert all(n in result.masks or n in result.skipped for n in layers)
    dense = {n for n in result.skipped if ".layers." in n or ".h." in n}
    assert all("router" in result.skipped[n] for n in dense)
    sw.save(model, tmp_path / "saved")
    again = sw.from_pretrained(tmp_path / "saved")
    ids = batches[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.generate(ids[:, :5], max_new_tokens=3, do_sample=False).shape == (2, 8)
    assert sw.masks(again) is not None and set(sw.masks(again)) == set(result.masks)
