"""Llama-type models as GGUF files, which llama.cpp and what is built on it read.

Zeros stay zeros, and are stored like any other weight: GGUF knows no sparsity.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument, MissingDependency, ModelError
from sparseworks.io.atomic import atomic_file

__all__ = ["GGUF_TYPES", "export_gguf"]

GGUF_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
_LAYER = {
    "input_layernorm.weight": "attn_norm", "post_attention_layernorm.weight": "ffn_norm",
    "self_attn.q_proj.weight": "attn_q", "self_attn.k_proj.weight": "attn_k",
    "self_attn.v_proj.weight": "attn_v", "self_attn.o_proj.weight": "attn_output",
    "mlp.gate_proj.weight": "ffn_gate", "mlp.up_proj.weight": "ffn_up",
    "mlp.down_proj.weight": "ffn_down",
}  # fmt: skip


def export_gguf(
    model: nn.Module, path: str | os.PathLike[str], type: str = "F16", head: str | None = None
) -> None:
    """Write a Llama or Mistral of transformers, without a tokenizer.

    Args:
        model: a causal language model, any floating dtype.
        path: of the file.
        type: of the matrices, one of `GGUF_TYPES`; norms stay F32.
        head: of the output head; None: as `type`.

    Raises:
        MissingDependency: the package `gguf` is not installed.
        ModelError: another family, or scaled rotations.
        InvalidArgument: an unknown type.
    """
    try:
        import gguf
    except ImportError:
        raise MissingDependency("GGUF files need the package gguf: pip install gguf") from None
    for given in (type, head):
        if given is not None and given not in GGUF_TYPES:
            raise InvalidArgument(f"type {given!r}: use one of {', '.join(GGUF_TYPES)}")
    config: Any = model.config
    if config.model_type not in ("llama", "mistral"):
        raise ModelError(f"{config.model_type} is not written as GGUF here; llama and mistral are")
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise ModelError(f"rotations of type {rope['rope_type']} are not written as GGUF here")
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    with atomic_file(Path(path)) as file:
        writer = gguf.GGUFWriter(file, "llama")
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(size)
        writer.add_value_length(size)
        writer.add_rope_dimension_count(size)
        writer.add_rope_freq_base(float(rope["rope_theta"]))
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        writer.add_tokenizer_model("no_vocab")

        def put(name: str, tensor: Tensor, kind: str) -> None:
            array = tensor.detach().float().contiguous().numpy()
            if kind == "F32":
                writer.add_tensor(name, array)
                return
            code = gguf.GGMLQuantizationType[kind]
            made = gguf.quants.quantize(array, code)
            writer.add_tensor(name, made, raw_dtype=code)

        last = model.get_output_embeddings().weight  # type: ignore[operator]
        first = model.get_input_embeddings().weight  # type: ignore[operator]
        # tables are read a row at a time: rounding them buys no speed
        put("token_embd.weight", first, type if type in ("F32", "BF16") else "F16")
        put("output.weight", last, head or type)
        base: Any = model.get_decoder()  # type: ignore[operator]
        put("output_norm.weight", base.norm.weight, "F32")
        for i, block in enumerate(base.layers):
            parameters = dict(block.named_parameters())
            unknown = sorted(set(parameters) - set(_LAYER))
            if unknown:
                raise ModelError(f"layer {i} has {unknown[0]}, which GGUF's llama has not")
            for source, name in _LAYER.items():
                tensor = parameters[source]
                if name in ("attn_q", "attn_k"):
                    tensor = _interleaved(tensor, size)
                put(f"blk.{i}.{name}.weight", tensor, "F32" if tensor.ndim == 1 else type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _interleaved(weight: Tensor, size: int) -> Tensor:
    """Rows of each head in the order in which llama.cpp turns pairs: 0, half, 1, half + 1, ..."""
    heads = weight.shape[0] // size
    return weight.detach().view(heads, 2, size // 2, -1).transpose(1, 2).reshape(weight.shape)
