"""The residual stream of a pre-norm decoder: who reads it, who writes it, and turning it.

Readers take the stream's width as inputs (queries, keys, values, gates, up-projections, routers),
writers have it as outputs (output and down-projections, with their biases); banks of experts
`[experts, out, in]` are one or the other. A parameter with two or more axes that is neither is an
error, as it would be left in the old basis.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.core.errors import ModelError
from sparseworks.models.calls import Batch, call, move, token_mask
from sparseworks.weights.structured.backup import Backup, Change
from sparseworks.weights.structured.sliced import gain_of, slice_layer

__all__ = ["Stream"]

Parts = list[tuple[nn.Module, str]]  # (owner, attribute)
_READERS = {
    "q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "gate",
    "router", "shared_expert_gate",
}  # fmt: skip
_WRITERS = {"o_proj", "down_proj"}
_WIDTHS = ("hidden_dim", "hidden_size")
_EPS = ("variance_epsilon", "eps")


class Stream:
    """The stream of one model; every change goes through the backup.

    Args:
        model: with `.model.embed_tokens`, `.model.norm` and an output head.
        layers: its decoder layers.
        backup: puts back what is replaced.
        shortcuts: layers get shortcuts, and the last output keeps the full width, unless there are
            banks of experts, whose code makes outputs as wide as their inputs.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[nn.Module], backup: Backup, shortcuts: bool
    ) -> None:
        self.model, self.layers, self.backup, self.shortcuts = model, layers, backup, shortcuts
        whole: Any = model
        self.embedding: nn.Embedding = whole.model.embed_tokens
        self.head: Any = whole.get_output_embeddings() if _has_head(model) else None
        self.final: nn.Module = whole.model.norm
        self.width = int(self.embedding.weight.shape[1])
        self.device = self.embedding.weight.device
        self.norms = [
            n for layer in layers for n in (layer.input_layernorm, layer.post_attention_layernorm)
        ] + [self.final]
        self.plus = [gain_of(n, self.width)[1] for n in self.norms]
        self.banked = any(p.ndim == 3 for layer in layers for p in layer.parameters())
        self.changes: list[Change] = []
        self._names = {id(m): n for n, m in model.named_modules()}
        if not isinstance(self.head, nn.Linear):
            raise ModelError(f"{type(model).__name__} has no Linear output head to turn")
        self._parts = {
            id(m): self._sorted(m) for layer in layers for m in (layer.self_attn, layer.mlp)
        }

    def _sorted(self, module: Any) -> tuple[Parts, Parts]:
        """(readers, writers) below a module, as (owner, attribute)."""
        readers, writers = [], []
        for prefix, owner in module.named_modules():
            for attribute, parameter in owner._parameters.items():
                if parameter is None or parameter.ndim < 2:
                    continue
                known = prefix.rpartition(".")[2] if attribute == "weight" else attribute
                shape = parameter.shape
                if known in _READERS and shape[-1] == self.width:
                    readers.append((owner, attribute))
                elif known in _WRITERS and shape[-2] == self.width:
                    writers.append((owner, attribute))
                else:
                    raise ModelError(
                        f"{self._names[id(module)]}.{prefix}.{attribute} {list(shape)} neither "
                        "reads nor writes the residual stream in a way that is known; slicing "
                        "would break the model"
                    )
        return readers, writers

    def _put(self, owner: nn.Module, attribute: str, value: Tensor) -> None:
        old = owner._parameters[attribute]
        assert old is not None
        new = nn.Parameter(value.to(old.dtype).contiguous(), old.requires_grad)
        self.backup.tensors.append((owner, attribute, True, old))
        owner._parameters[attribute] = new
        if not isinstance(owner, (nn.Linear, nn.Embedding)) or value.ndim != 2:
            return
        for name, axis in (("in_features", 1), ("out_features", 0), ("embedding_dim", 1)):
            if getattr(owner, name, value.shape[axis]) != value.shape[axis]:
                self._set(owner, name, value.shape[axis])

    def _set(self, owner: nn.Module, name: str, value: Any) -> None:
        self.changes.append(Change(self._names[id(owner)], name, getattr(owner, name), value))
        self.backup.set(owner, name, value)

    def fuse_gains(self) -> None:
        """The gains of all norms into what reads their outputs; a tied head gets its own weight."""
        config: Any = self.model.config
        if self.head.weight is self.embedding.weight:
            self._put(self.head, "weight", self.head.weight.detach().clone())
            self.backup.set(config, "tie_word_embeddings", False)
        for i, norm in enumerate(self.norms):
            gain, plus = gain_of(norm, self.width)
            self._scale(norm, plus, self.width)
            if norm is self.final:
                self._put(self.head, "weight", self.head.weight.detach().double() * gain)
                continue
            layer: Any = self.layers[i // 2]
            for owner, attribute in self._parts[id(layer.mlp if i % 2 else layer.self_attn)][0]:
                weight = owner._parameters[attribute]
                assert weight is not None
                self._put(owner, attribute, weight.detach().double() * gain)

    def _scale(self, norm: nn.Module, plus: bool, width: int) -> None:
        """A norm of a stream of this width that divides by the old one."""
        gain = torch.full((width,), (self.width / width) ** 0.5 - plus, dtype=torch.float64)
        self._put(norm, "weight", gain.to(self.device))
        name = next((n for n in _EPS if isinstance(getattr(norm, n, None), float)), None)
        if name is not None and width != self.width:
            self._set(norm, name, getattr(norm, name) * self.width / width)

    def _turn(self, module: Any, norm: int, into: Tensor, out: Tensor) -> None:
        readers, writers = self._parts[id(module)]
        for owner, attribute in readers:
            self._put(owner, attribute, _of(owner, attribute).double() @ into)
            for name in _WIDTHS:  # routers and banks of experts remember the width
                if getattr(owner, name, None) == self.width and into.shape[1] != self.width:
                    self._set(owner, name, into.shape[1])
        self._scale(self.norms[norm], self.plus[norm], into.shape[1])
        for owner, attribute in writers:
            self._put(owner, attribute, out.t() @ _of(owner, attribute).double())
            if isinstance(owner, nn.Linear) and owner.bias is not None:
                self._put(owner, "bias", out.t() @ owner.bias.detach().double())

    def rotate_attention(self, layer: int, into: Tensor, out: Tensor) -> None:
        """Attention of a layer reads a stream turned by `into` `[d, w]`, writes one by `out`."""
        self._turn(self.layers[layer].self_attn, 2 * layer, into, out)

    def rotate_mlp(self, layer: int, into: Tensor, out: Tensor) -> None:
        self._turn(self.layers[layer].mlp, 2 * layer + 1, into, out)

    def rotate_ends(self, first: Tensor, last: Tensor) -> None:
        """The embedding writes a stream turned by `first`, the head reads one turned by `last`."""
        self._put(self.embedding, "weight", self.embedding.weight.detach().double() @ first)
        self._put(self.head, "weight", self.head.weight.detach().double() @ last)
        self._scale(self.final, self.plus[-1], last.shape[1])

    def shortcut(self, layer: int, attention: Tensor, mlp: Tensor) -> None:
        """Give a layer its shortcuts."""
        module = self.layers[layer]
        dtype = self.embedding.weight.dtype
        self.backup.set(module, "__class__", type(module))
        slice_layer(module, attention.to(dtype).contiguous(), mlp.to(dtype).contiguous())

    def capture(
        self, batches: Sequence[Batch]
    ) -> tuple[list[Tensor], list[list[dict[str, Any]]], list[Tensor | None]]:
        """Of every batch the first layer's inputs, what else each layer is called with, padding."""
        hidden: list[Tensor] = []
        kwargs: list[list[dict[str, Any]]] = []
        masks = [token_mask(b) for b in batches]

        def before(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
            shown = args[0] if args else given["hidden_states"]
            if not kwargs[-1]:
                hidden.append(shown.detach())
            kwargs[-1].append({k: v for k, v in given.items() if k != "hidden_states"})

        handles = [m.register_forward_pre_hook(before, with_kwargs=True) for m in self.layers]
        try:
            for batch in batches:
                kwargs.append([])
                call(self.model, move(batch, self.device))
        finally:
            for handle in handles:
                handle.remove()
        return hidden, kwargs, masks

    @staticmethod
    def attend(layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """What attention adds to the stream."""
        found: Tensor = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **kwargs)[0]
        return found

    @staticmethod
    def mix(layer: Any, hidden: Tensor) -> Tensor:
        """What the MLP adds to it."""
        found = layer.mlp(layer.post_attention_layernorm(hidden))
        result: Tensor = found[0] if isinstance(found, tuple) else found
        return result

    def magnitudes(self) -> Tensor:
        """Sum of squares of all weights that read or write each channel, `[d]`, fp64."""
        total = self.embedding.weight.detach().double().square().sum(0)
        total += self.head.weight.detach().double().square().sum(0)
        for readers, writers in self._parts.values():
            for parts, axis in ((readers, -1), (writers, -2)):
                for owner, attribute in parts:
                    weight = _of(owner, attribute)
                    if weight.shape[axis] == self.width:
                        squares = weight.double().square().movedim(axis, -1)
                        total += squares.reshape(-1, self.width).sum(0)
        return total

    def flops(self, width: int | None) -> float:
        """Floating-point operations of the products with weights, per token (2 per multiply-add).

        Args:
            width: of the sliced stream; None: of the model as it is.
        """
        return 2.0 * self._scaled(width, self._used)

    def parameters(self, width: int | None) -> float:
        """Parameters of the model at this width; None: as it is."""
        total = sum(p.numel() for p in self.model.parameters())
        if width is None:
            return float(total)
        head, table = self.head.weight.numel(), self.embedding.weight.numel()
        tied = self.head.weight is self.embedding.weight
        layers = sum(_of(o, a).numel() for p in self._each() for o, a in p)
        rest = total - layers - table - (0 if tied else head)
        return rest + table * width / self.width + self._scaled(width, lambda _: 1.0)

    def _each(self) -> list[Parts]:
        return [parts for both in self._parts.values() for parts in both]

    def _scaled(self, width: int | None, used: Callable[[nn.Module], float]) -> float:
        """Entries of the layers' matrices, shortcuts and head at this width, each times `used`."""
        touching = sum(_of(o, a).numel() * used(o) for p in self._each() for o, a in p)
        head: int = self.head.weight.numel()
        if width is None:
            return touching + head
        share = width / self.width
        if not self.shortcuts:
            return (touching + head) * share
        shortcuts = 2 * len(self.layers) * width * width
        if self.banked:
            return (touching + head) * share + shortcuts
        last = self._parts[id(self.layers[-1].mlp)][1]  # these writers keep the full width
        whole = sum(_of(o, a).numel() * used(o) for o, a in last) + head
        return (touching + head - whole) * share + whole + shortcuts + width * (self.width - width)

    def _used(self, owner: nn.Module) -> float:
        """Share of a bank of experts that a token is multiplied with."""
        config: Any = self.model.config
        experts = getattr(owner, "num_experts", None)
        bank = any(p is not None and p.ndim == 3 for p in owner._parameters.values())
        return config.num_experts_per_tok / experts if bank and experts else 1.0

    def told(self, width: int) -> dict[str, Any]:
        """Tell the config of the narrower model.

        Raises:
            ModelError: a model built from it would have other shapes.
        """
        config: Any = self.model.config
        heads = getattr(config, "head_dim", None) or self.width // config.num_attention_heads
        fields = {"hidden_size": width, "head_dim": heads, "tie_word_embeddings": False}
        if (old := getattr(config, "rms_norm_eps", None)) is not None:
            fields["rms_norm_eps"] = old * self.width / width
            for module in self.model.modules():  # norms of queries and keys read this field too
                name = next((n for n in _EPS if getattr(module, n, None) == old), None)
                if name is not None and width != self.width:
                    self._set(module, name, fields["rms_norm_eps"])
        for name, value in fields.items():
            if not hasattr(config, name):
                setattr(config, name, None)
            self.backup.set(config, name, value)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built = type(self.model)(copy.deepcopy(config))
        made = {n: p.shape for n, p in built.named_parameters()}
        for name, parameter in self.model.named_parameters():
            if made.get(name) != parameter.shape:
                raise ModelError(
                    f"the config of {type(self.model).__name__} cannot tell a stream of {width} "
                    f"({name} would be {list(made.get(name, []))}); use basis='block'"
                )
        return fields


def _of(owner: nn.Module, attribute: str) -> Tensor:
    parameter = owner._parameters[attribute]
    assert parameter is not None
    return parameter.detach()


def _has_head(model: Any) -> bool:
    return callable(getattr(model, "get_output_embeddings", None))
