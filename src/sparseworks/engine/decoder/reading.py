"""Causal language models of transformers, read from their modules as a `ModelSpec`.

Most families are written alike: blocks with `self_attn` and `mlp`, whose parts are recognised by
name (Llama, Mistral, Qwen, Gemma, Phi-3, Mixtral and their kin). OPT, GPT-2 and GPT-NeoX have names
of their own. Whatever is read is compared with the model on a text before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.engine.decoder.integers import integers_of
from sparseworks.engine.decoder.rotary import Rotary, read_rotary
from sparseworks.engine.decoder.spec import (
    AttentionSpec,
    LayerSpec,
    LinearSpec,
    MixtureSpec,
    MlpSpec,
    ModelSpec,
    NormSpec,
    Weight,
    interleaved,
)
from sparseworks.models.active import ActiveInputs, gates, input_rule
from sparseworks.models.quantized import Quantized, grids

__all__ = ["read_model"]

_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "relu": "relu",
}  # fmt: skip


def read_model(model: nn.Module) -> ModelSpec:
    """What a causal language model is made of.

    Raises:
        ModelError: of a kind that is not known here; the message says what was not understood.
    """
    kind = getattr(model.config, "model_type", type(model).__name__)
    reader = {"opt": _read_opt, "gpt2": _read_gpt2, "gpt_neox": _read_neox}.get(kind, _read_llama)
    try:
        spec = reader(_Reader(model))
    except (AttributeError, KeyError, TypeError) as error:
        raise ModelError(f"{kind}: {error}") from error
    _check_gates(model, spec)
    for layer in spec.layers:
        mlp = layer.mlp
        if isinstance(mlp, MlpSpec) and mlp.activation == "relu" and mlp.down.active is None:
            mlp.down.active = ActiveInputs(threshold=0.0)  # zeros count for nothing
    return spec


def _check_gates(model: nn.Module, spec: ModelSpec) -> None:
    """Every gate is one of a matrix that was read."""
    ruled = {
        name for x in spec.linears() if x.active is not None and isinstance(x.weight, Weight)
        for name in x.weight.names
    }  # fmt: skip
    for name, module in model.named_modules():
        odd = next(iter(gates(module)), None)
        if odd is not None and name not in ruled:
            raise ModelError(f"{name} has a {type(odd).__name__} that the decoder cannot apply")


class _Reader:
    """A model with the names of its modules."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        config: Any = model.config
        self.config: Any = config.get_text_config(decoder=True)
        self.names: dict[int, str] = {id(m): n for n, m in model.named_modules()}
        self.grids: Mapping[str, Quantized] = grids(model) or {}

    def name(self, module: nn.Module) -> str:
        return self.names[id(module)]

    def linear(self, *modules: Any, order: Callable[[Tensor], Tensor] = lambda t: t,
               gated: bool = False) -> LinearSpec:  # fmt: skip
        """Rows of several layers below each other; `gated`: of two, in turn; `order`: permuted."""
        for m in modules:
            if type(m) is not nn.Linear and type(m).__name__ != "Conv1D":
                raise ModelError(f"{self.name(m)} is {type(m).__name__}, not a linear layer")

        def matrix(m: Any) -> Tensor:
            weight: Tensor = m.weight.detach()
            return weight.T if type(m).__name__ == "Conv1D" else weight

        def joined(parts: list[Tensor]) -> Tensor:
            return order(interleaved(*parts) if gated else torch.cat(parts))

        biases = [getattr(m, "bias", None) for m in modules]
        bias = None
        if any(b is not None for b in biases):
            bias = joined([
                torch.zeros(matrix(m).shape[0]) if b is None else b.detach().float()
                for b, m in zip(biases, modules, strict=True)
            ])  # fmt: skip
        heights = [matrix(m).shape[0] for m in modules]
        rows = sum(n + (-n % 16 if gated else 0) for n in heights)
        names = tuple(map(self.name, modules))
        try:
            rules = [input_rule(m) for m in modules]
        except InvalidArgument as error:
            raise ModelError(f"{names[0]}: {error}") from None
        first = rules[0]
        if any((r is not None) if first is None else not first.same(r) for r in rules):
            raise ModelError(f"{' and '.join(names)} read the same inputs by rules of their own")
        weight = Weight(
            rows, matrix(modules[0]).shape[1], lambda: joined([matrix(m) for m in modules]), names,
            integers_of(self.grids, dict(zip(names, modules, strict=True)), joined),
        )  # fmt: skip
        return LinearSpec(" + ".join(names), weight, bias, rules[0])

    def norm(self, module: Any) -> NormSpec:
        if module is None or isinstance(module, nn.Identity):
            return NormSpec()
        if isinstance(module, nn.LayerNorm):
            weight = None if module.weight is None else module.weight.detach().float()
            bias = None if module.bias is None else module.bias.detach().float()
            return NormSpec("layer", weight, bias, module.eps)
        if "RMSNorm" not in type(module).__name__:
            raise ModelError(f"{self.name(module)} is {type(module).__name__}, not a known norm")
        eps = getattr(module, "variance_epsilon", None)
        weight = module.weight.detach().float()
        if type(module).__name__.startswith("Gemma"):
            weight = weight + 1
        return NormSpec("rms", weight, None, float(module.eps if eps is None else eps))

    def activation(self, name: str) -> str:
        if name not in _ACTIVATIONS:
            raise ModelError(f"the activation {name!r}")
        return _ACTIVATIONS[name]

    def head(self) -> LinearSpec:
        return self.linear(self.model.get_output_embeddings())

    def embedding(self) -> Tensor:
        found: Tensor = self.model.get_input_embeddings().weight.detach()
        return found


def _read_llama(r: _Reader) -> ModelSpec:
    config, base = r.config, r.model.get_decoder()
    types = list(dict.fromkeys(
        getattr(layer.self_attn, "layer_type", None) or "" for layer in base.layers
    )) if hasattr(base.rotary_emb, "layer_types") else [""]  # fmt: skip
    rotary = [read_rotary(base.rotary_emb, config, t) for t in types]
    activation = r.activation(getattr(config, "hidden_activation", None) or config.hidden_act)
    layers = [_llama_layer(r, layer, types, activation) for layer in base.layers]
    table = r.model.get_input_embeddings()
    scale = float(getattr(table, "scalar_embed_scale", getattr(table, "embed_scale", 1.0)))
    return ModelSpec(
        width=config.hidden_size, embedding=table.weight.detach(), head=r.head(), layers=layers,
        final_norm=r.norm(base.norm), max_positions=_positions(config, rotary), rotary=rotary,
        embedding_scale=scale * float(getattr(config, "embedding_multiplier", 1.0)),
        logit_softcap=float(getattr(config, "final_logit_softcapping", None) or 0.0),
        logit_scale=1 / float(getattr(config, "logits_scaling", 1.0)),
    )  # fmt: skip


def _llama_layer(r: _Reader, layer: Any, types: list[str], activation: str) -> LayerSpec:
    config, a = r.config, layer.self_attn
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    qkv = [a.qkv_proj] if hasattr(a, "qkv_proj") else [a.q_proj, a.k_proj, a.v_proj]
    kind = getattr(a, "layer_type", None)
    attention = AttentionSpec(
        qkv=r.linear(*qkv), out=r.linear(a.o_proj), heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads, size=size, scale=float(a.scaling),
        query_norm=r.norm(getattr(a, "q_norm", None)), key_norm=r.norm(getattr(a, "k_norm", None)),
        softcap=float(getattr(a, "attn_logit_softcapping", None) or 0.0),
        window=_window(a, config, kind), rotary=types.index(kind) if kind in types else 0,
    )  # fmt: skip
    sandwich = hasattr(layer, "pre_feedforward_layernorm")
    block = getattr(layer, "mlp", None) or layer.block_sparse_moe
    return LayerSpec(
        attention, _mixture(r, block, activation) if hasattr(block, "experts")
        else _mlp(r, block, activation),
        before_attention=r.norm(layer.input_layernorm),
        after_attention=r.norm(layer.post_attention_layernorm) if sandwich else NormSpec(),
        before_mlp=r.norm(layer.pre_feedforward_layernorm if sandwich
                          else layer.post_attention_layernorm),
        after_mlp=r.norm(layer.post_feedforward_layernorm) if sandwich else NormSpec(),
        residual=float(getattr(layer, "residual_multiplier", 1.0)),
    )  # fmt: skip


def _window(attention: Any, config: Any, kind: str | None) -> int:
    """Of one layer. Where layers have kinds, only `sliding_attention` has a window."""
    if kind is not None or hasattr(attention, "sliding_window"):
        return int(getattr(attention, "sliding_window", None) or 0)
    return int(getattr(config, "sliding_window", None) or 0)


def _positions(config: Any, rotary: list[Rotary]) -> int:
    limits = [x.limit for x in rotary if x.limit is not None and x.long is None]
    return min([int(config.max_position_embeddings), *limits])


def _mlp(r: _Reader, m: Any, activation: str) -> MlpSpec:
    if hasattr(m, "gate_up_proj"):

        def turned(t: Tensor) -> Tensor:
            return interleaved(*t.chunk(2))

        up = r.linear(m.gate_up_proj, order=turned)
        assert isinstance(up.weight, Weight)
        hidden = up.weight.rows // 2
        up.weight = replace(up.weight, rows=2 * (hidden + -hidden % 16))
    else:
        up = r.linear(m.gate_proj, m.up_proj, gated=True)
    return MlpSpec(up, r.linear(m.down_proj), True, activation)


def _mixture(r: _Reader, m: Any, activation: str) -> MixtureSpec:
    """A router over banks of experts `[experts, rows, columns]`, with a shared one or not."""
    bank, gate = m.experts, m.gate
    name = r.name(bank)
    if not isinstance(getattr(bank, "gate_up_proj", None), nn.Parameter):
        raise ModelError(f"{name} is {type(bank).__name__}, not a bank of experts")

    def expert(i: int) -> MlpSpec:
        up, down = bank.gate_up_proj, bank.down_proj
        half = up.shape[1] // 2

        first = Weight(2 * (half + -half % 16), up.shape[2],
                       lambda: interleaved(*up.detach()[i].chunk(2)))  # fmt: skip
        second = Weight(down.shape[1], down.shape[2], lambda: down.detach()[i])
        return MlpSpec(
            LinearSpec(f"{name}.gate_up_proj[{i}]", first),
            LinearSpec(f"{name}.down_proj[{i}]", second), True, activation,
        )  # fmt: skip

    experts = [expert(i) for i in range(bank.gate_up_proj.shape[0])]
    rows = [gate.weight.detach().float()]
    shared = getattr(m, "shared_expert", None)
    if shared is not None:
        experts.append(_mlp(r, shared, activation))
        rows.append(m.shared_expert_gate.weight.detach().float())
    router = torch.cat(rows)
    normalized = bool(getattr(gate, "norm_topk_prob", getattr(m, "norm_topk_prob", True)))
    return MixtureSpec(
        LinearSpec(r.name(gate), Weight(router.shape[0], router.shape[1], lambda: router)),
        experts, int(gate.top_k), shared is not None, normalized,
    )  # fmt: skip


def _read_opt(r: _Reader) -> ModelSpec:
    config, base = r.config, r.model.get_decoder()
    if base.project_in is not None or not config.do_layer_norm_before:
        raise ModelError("OPT with projected embeddings or norms behind its blocks")
    activation = r.activation(config.activation_function)
    heads = config.num_attention_heads

    def layer(b: Any) -> LayerSpec:
        a = b.self_attn
        attention = AttentionSpec(
            r.linear(a.q_proj, a.k_proj, a.v_proj), r.linear(a.out_proj), heads, heads,
            a.head_dim, float(a.scaling),
        )  # fmt: skip
        return LayerSpec(
            attention, MlpSpec(r.linear(b.fc1), r.linear(b.fc2), False, activation),
            before_attention=r.norm(b.self_attn_layer_norm), before_mlp=r.norm(b.final_layer_norm),
        )  # fmt: skip

    table = base.embed_positions
    return ModelSpec(
        config.hidden_size, r.embedding(), r.head(), [layer(b) for b in base.layers],
        r.norm(base.final_layer_norm), table.weight.shape[0] - table.offset,
        positions=table.weight.detach(), position_offset=table.offset,
    )  # fmt: skip


def _read_gpt2(r: _Reader) -> ModelSpec:
    config, base = r.config, r.model.transformer
    if getattr(config, "add_cross_attention", False):
        raise ModelError("GPT-2 with cross-attention")
    activation = r.activation(config.activation_function)
    heads = config.num_attention_heads

    def layer(b: Any) -> LayerSpec:
        size = config.hidden_size // heads
        scale = size**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scale /= b.attn.layer_idx + 1
        attention = AttentionSpec(
            r.linear(b.attn.c_attn), r.linear(b.attn.c_proj), heads, heads, size, scale
        )
        mlp = MlpSpec(r.linear(b.mlp.c_fc), r.linear(b.mlp.c_proj), False, activation)
        return LayerSpec(attention, mlp, before_attention=r.norm(b.ln_1), before_mlp=r.norm(b.ln_2))

    return ModelSpec(
        config.hidden_size, r.embedding(), r.head(), [layer(b) for b in base.h],
        r.norm(base.ln_f), base.wpe.weight.shape[0], positions=base.wpe.weight.detach(),
    )  # fmt: skip


def _read_neox(r: _Reader) -> ModelSpec:
    config, base = r.config, r.model.get_decoder()
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    rotary = [read_rotary(base.rotary_emb, config)]
    activation = r.activation(config.hidden_act)

    def split(t: Tensor) -> Tensor:  # [heads, 3, size] -> all queries, all keys, all values
        return t.view(heads, 3, size, *t.shape[1:]).transpose(0, 1).flatten(0, 2)

    def layer(b: Any) -> LayerSpec:
        a, m = b.attention, b.mlp
        attention = AttentionSpec(
            r.linear(a.query_key_value, order=split), r.linear(a.dense), heads, heads, size,
            float(a.scaling), rotary=0,
        )  # fmt: skip
        mlp = MlpSpec(r.linear(m.dense_h_to_4h), r.linear(m.dense_4h_to_h), False, activation)
        return LayerSpec(
            attention, mlp, before_attention=r.norm(b.input_layernorm),
            before_mlp=r.norm(b.post_attention_layernorm), parallel=config.use_parallel_residual,
        )  # fmt: skip

    return ModelSpec(
        config.hidden_size, r.embedding(), r.head(), [layer(b) for b in base.layers],
        r.norm(base.final_layer_norm), _positions(config, rotary), rotary=rotary,
    )  # fmt: skip
