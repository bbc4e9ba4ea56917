"""Small causal language models of every family that the decoder reads."""

from __future__ import annotations

from typing import Any

import torch

_SMALL = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
_OLD = {k: v for k, v in _SMALL.items() if k not in ("num_key_value_heads",)}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
         "rope_theta": 10000.0}  # fmt: skip
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 16, "rope_theta": 500000.0}  # fmt: skip
_LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8,
         "long_factor": [4.0] * 8, "original_max_position_embeddings": 24}  # fmt: skip

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _SMALL),
    "llama, tied, odd heads": ("Llama", _SMALL | {"tie_word_embeddings": True, "head_dim": 20}),
    "llama 3 rotations": ("Llama", _SMALL | {"rope_parameters": _LLAMA3}),
    "yarn": ("Llama", _SMALL | {"rope_parameters": _YARN}),
    "linear rotations": ("Llama", _SMALL | {"rope_parameters": {
        "rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
    "llama with biases": ("Llama", _SMALL | {"attention_bias": True, "mlp_bias": True}),
    "mistral, window": ("Mistral", _SMALL | {"sliding_window": 7}),
    "qwen2": ("Qwen2", _SMALL),
    "qwen3": ("Qwen3", _SMALL | {"head_dim": 16}),
    "gemma": ("Gemma", _SMALL | {"head_dim": 16}),
    "gemma2": ("Gemma2", _SMALL | {"head_dim": 16, "sliding_window": 7,
                                   "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3", _SMALL | {"head_dim": 16, "sliding_window": 7, "num_hidden_layers": 7,
                                   "query_pre_attn_scalar": 16}),
    "phi3": ("Phi3", _SMALL),
    "phi3, long rotations": ("Phi3", _SMALL | {"rope_parameters": _LONG,
                                               "original_max_position_embeddings": 24}),
    "granite": ("Granite", _SMALL | {"embedding_multiplier": 3.0, "residual_multiplier": 0.5,
                                     "attention_multiplier": 0.2, "logits_scaling": 2.0}),
    "opt": ("OPT", {k: v for k, v in _OLD.items() if k != "intermediate_size"}
            | {"ffn_dim": 80, "word_embed_proj_dim": 64}),
    "gpt2": ("GPT2", {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 96,
                      "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}),
    "gpt-neox": ("GPTNeoX", _OLD | {"rotary_pct": 0.25}),
    "gpt-neox, one after the other": ("GPTNeoX", _OLD | {"use_parallel_residual": False}),
    "mixtral": ("Mixtral", _SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2,
                                     "sliding_window": None}),
    "qwen2 moe": ("Qwen2Moe", _SMALL | {
        "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40, "decoder_sparse_step": 1, "norm_topk_prob": False}),
    "qwen3 moe": ("Qwen3Moe", _SMALL | {
        "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 16,
        "decoder_sparse_step": 1, "norm_topk_prob": True}),
}  # fmt: skip


def family(name: str, **changes: Any) -> Any:
    """A model of random weights, fp32, that are bf16 numbers."""
    import transformers

    kind, options = FAMILIES[name]
    config_class = getattr(transformers, f"{kind}TextConfig", None) or getattr(
        transformers, f"{kind}Config"
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}{'LMHeadModel' if kind == 'GPT2' else 'ForCausalLM'}")(
        config_class(**(options | changes))
    )
    with torch.no_grad():
        for n, p in model.named_parameters():
            scale = 1.0 if "norm" in n or "ln_" in n else 4.0
            p.add_(0.02 * torch.randn_like(p)).mul_(scale).copy_(p.bfloat16())
    return model.eval()
