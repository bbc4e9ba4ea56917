"""Models with mixtures as the classes that transformers has for them: Mixtral, Qwen3-MoE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sparseworks.core.errors import MissingDependency, ModelError
from sparseworks.experts.layers import MoE
from sparseworks.experts.routers import TopK

__all__ = ["as_transformers"]

_CLASSES = {"llama": "Mixtral", "mistral": "Mixtral", "qwen3": "Qwen3Moe"}
_LEFT = {"model_type", "architectures", "transformers_version", "auto_map", "num_experts_per_tok"}


def as_transformers(model: nn.Module, layers: Mapping[str, MoE]) -> Any:
    """The same function as a model of transformers.

    Raises:
        ModelError: it has no class for this one; the message says why.
        MissingDependency: transformers is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise MissingDependency("transformers is needed: pip install 'sparseworks[hf]'") from None
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if not isinstance(kind, str) or not type(model).__name__.endswith("ForCausalLM"):
        raise ModelError(f"{type(model).__name__} is not a causal language model of transformers")
    if kind not in _CLASSES:
        raise ModelError(f"a mixture of {kind!r} has no class; there are {', '.join(_CLASSES)}")
    if getattr(config, "attention_bias", False) and kind == "llama":
        raise ModelError("attention_bias=True has no place in Mixtral")
    first = _common(layers)
    target = _CLASSES[kind]
    dense = [i for i in range(config.num_hidden_layers) if f"model.layers.{i}.mlp" not in layers]
    sizes: dict[str, Any]
    if target == "Mixtral":
        if dense:
            raise ModelError(
                f"layers {dense} are dense, which Mixtral cannot say; upcycle all of them "
                "(layers='all'), or keep the model here (sw.save, sw.load)"
            )
        sizes = {"num_local_experts": first.experts.count}
        if kind == "llama":
            sizes["sliding_window"] = None
    else:
        sizes = {
            "num_experts": first.experts.count, "moe_intermediate_size": first.experts.hidden,
            "norm_topk_prob": True, "mlp_only_layers": dense, "decoder_sparse_step": 1,
        }  # fmt: skip
    told = {k: v for k, v in config.to_dict().items() if k not in _LEFT}
    told |= sizes | {"num_experts_per_tok": _router(first).k}
    made = getattr(transformers, f"{target}ForCausalLM")(
        getattr(transformers, f"{target}Config")(**told)
    )
    made = made.to(next(model.parameters()).dtype).eval()
    with torch.no_grad():
        made.load_state_dict(model.state_dict())
    made.generation_config = getattr(model, "generation_config", None)
    return made


def _router(layer: MoE) -> TopK:
    assert isinstance(layer.gate, TopK)
    return layer.gate


def _common(layers: Mapping[str, MoE]) -> MoE:
    """One of the layers, which are all alike and of the form that transformers computes."""
    first = next(iter(layers.values()))
    for name, layer in layers.items():
        bank = layer.experts
        plain = type(layer.gate) is TopK and layer.gate.renormalize
        if not plain or layer.eval_capacity is not None or layer.shared_expert is not None:
            raise ModelError(
                f"{name}: transformers has no {type(layer.gate).__name__} routing; keep the model "
                "here (sw.save, and sw.load into a model upcycled in the same way)"
            )
        if not bank.gated or bank.up_bias is not None or bank.activation != "silu":
            raise ModelError(f"{name}: the experts of Mixtral are gated by SiLU and have no bias")
        if (bank.count, bank.hidden) != (first.experts.count, first.experts.hidden):
            raise ModelError(f"{name} differs from the first mixture in the size of its experts")
    return first
