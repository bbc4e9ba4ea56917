"""Decoder layers whose residual stream changes its basis: what SliceGPT makes of a layer.

    y = x S_a + attention(norm(x)),      out = y S_m + mlp(norm(y)),

the layer's own submodules with other shapes, and two matrices more: `attention_shortcut` S_a
`[width in, width]` and `mlp_shortcut` S_m `[width, width out]`. The class stays a subclass of the
layer's own, so what asks for it still finds it. `save_slim` and `load_slim` write and read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.core.errors import ModelError

__all__ = ["PARTS", "SlicedLayer", "decoder_layers", "slice_layer", "sliced_layers"]

PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


class SlicedLayer:
    """The forward pass of a pre-norm decoder layer with shortcuts; see this module."""

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        attended = self.self_attn(hidden_states=normed, **kwargs)[0]
        hidden_states = hidden_states @ self.attention_shortcut + attended
        mixed = self.mlp(self.post_attention_layernorm(hidden_states))
        mixed = mixed[0] if isinstance(mixed, tuple) else mixed
        result: Tensor = hidden_states @ self.mlp_shortcut + mixed
        return result


@cache
def _class_for(layer: type) -> type:
    return type(f"Sliced{layer.__name__}", (SlicedLayer, layer), {})


def slice_layer(layer: nn.Module, attention: Tensor, mlp: Tensor) -> None:
    """Make a decoder layer one with these shortcuts, in place."""
    layer.__class__ = _class_for(type(layer))  # type: ignore[arg-type]
    layer.attention_shortcut = nn.Parameter(attention)
    layer.mlp_shortcut = nn.Parameter(mlp)


def forget_shortcuts(layer: nn.Module) -> None:
    """What `slice_layer` added, where the class is that of before again."""
    for name in ("attention_shortcut", "mlp_shortcut"):
        layer._parameters.pop(name, None)


def sliced_layers(model: nn.Module) -> list[str]:
    """Names of the layers that `slice_layer` made."""
    return [n for n, m in model.named_modules() if isinstance(m, SlicedLayer)]


def decoder_layers(model: nn.Module) -> Sequence[nn.Module]:
    """The layers of a pre-norm decoder, each with the four `PARTS` and nothing that is in between.

    Raises:
        ModelError: the model is built otherwise.
    """
    core = getattr(model, "model", None)
    layers = getattr(core, "layers", None)
    fitting = ("embed_tokens", "norm", "layers")
    if (
        core is None
        or not isinstance(layers, nn.ModuleList)
        or len(layers) == 0
        or not all(hasattr(core, name) for name in fitting)
    ):
        raise ModelError(
            f"{type(model).__name__}: SliceGPT knows decoders with .model.embed_tokens, "
            ".model.layers, .model.norm and .lm_head (Llama, Mistral, Qwen, Phi-3, Mixtral, OLMoE)"
        )
    for i, layer in enumerate(layers):
        normed = [n for n, m in layer.named_children() if "norm" in n.lower()]
        if not all(hasattr(layer, p) for p in PARTS) or len(normed) != 2:
            raise ModelError(
                f"model.layers.{i} ({type(layer).__name__}) is not pre-norm with two norms, so "
                "rotations do not pass through it; use sw.slim with another method"
            )
    found: Sequence[nn.Module] = list(layers)
    return found


@torch.no_grad()
def gain_of(norm: nn.Module, width: int) -> tuple[Tensor, bool]:
    """The gain of an RMS norm (fp64), and whether it is one plus its weight.

    Raises:
        ModelError: it is no RMS norm with a gain alone.
    """
    weight = getattr(norm, "weight", None)
    if isinstance(weight, Tensor) and weight.shape == (width,) and not hasattr(norm, "bias"):
        large = torch.full((1, width), 1e4, dtype=weight.dtype, device=weight.device)
        shown = norm(large)[0].double()  # of a constant vector: the gain
        for plus in (False, True):
            gain = weight.detach().double() + plus
            if torch.allclose(shown, gain, rtol=1e-2, atol=1e-3):
                return gain, plus
    raise ModelError(
        f"{type(norm).__name__} is no RMS norm with a gain; SliceGPT on layer norms would replace "
        "them, which no standard class allows"
    )
