"""What a language model is made of, as far as decoding goes: data, no code.

Weights are matrices that are made when they are asked for (`Weight`), so that a model is packed one
matrix at a time; once packed they are `Panels`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparseworks.engine.decoder.integers import Integers
from sparseworks.engine.decoder.rotary import Rotary
from sparseworks.kernels.panels import Panels
from sparseworks.models.active import ActiveInputs

__all__ = ["AttentionSpec", "LayerSpec", "LinearSpec", "MixtureSpec", "MlpSpec",
           "ModelSpec", "NormSpec", "Weight", "interleaved"]  # fmt: skip


@dataclass(frozen=True)
class Weight:
    """A matrix `[rows, columns]` to be packed.

    Args:
        rows, columns: its size.
        make: gives the matrix.
        names: of the modules whose weights it holds, all with the same input.
        integers: gives what a quantized matrix is made of; None: the model records none.
    """

    rows: int
    columns: int
    make: Callable[[], Tensor]
    names: tuple[str, ...] = ()
    integers: Callable[[], Integers] | None = None


@dataclass
class LinearSpec:
    """y = W x + b. `bias`: fp32 `[rows]`. `active`: which entries of x count; None: all."""

    name: str
    weight: Weight | Panels
    bias: Tensor | None = None
    active: ActiveInputs | None = None


@dataclass
class NormSpec:
    """`kind`: none; rms, weight x / sqrt(mean(x^2) + eps); layer, centred first, with `bias`."""

    kind: str = "none"
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0


@dataclass
class AttentionSpec:
    """softmax(scale q k^T) v for `heads` queries over `kv_heads` keys of `size` numbers each.

    Rows of `qkv`: all queries, all keys, all values. `rotary`: index of a table, -1: none.
    `window`: positions that are seen, this one included; 0: all. `softcap`: c tanh(s / c).
    """

    qkv: LinearSpec
    out: LinearSpec
    heads: int
    kv_heads: int
    size: int
    scale: float
    query_norm: NormSpec = field(default_factory=NormSpec)
    key_norm: NormSpec = field(default_factory=NormSpec)
    softcap: float = 0.0
    window: int = 0
    rotary: int = -1


@dataclass
class MlpSpec:
    """down(act(up x)); gated, down(act(gate x) * up x): 16 rows of gates, then 16 of values."""

    up: LinearSpec
    down: LinearSpec
    gated: bool
    activation: str


@dataclass
class MixtureSpec:
    """The `chosen` experts of largest softmax(router x); the last one is `shared` by all tokens."""

    router: LinearSpec
    experts: list[MlpSpec]
    chosen: int
    shared: bool
    normalized: bool


@dataclass
class LayerSpec:
    """h += residual * after(attention(before(h))); h += residual * after(mlp(before(h)))."""

    attention: AttentionSpec
    mlp: MlpSpec | MixtureSpec
    before_attention: NormSpec = field(default_factory=NormSpec)
    after_attention: NormSpec = field(default_factory=NormSpec)
    before_mlp: NormSpec = field(default_factory=NormSpec)
    after_mlp: NormSpec = field(default_factory=NormSpec)
    parallel: bool = False
    residual: float = 1.0


@dataclass
class ModelSpec:
    """Embeddings, layers, final norm and head.

    Args:
        embedding: `[vocabulary, width]`, fp32, bf16 or fp16.
        positions: learned ones `[count, width]`, from row `position_offset` on.
        rotary: rotations that layers choose from.
        max_positions: how many tokens of a text there are positions for.
    """

    width: int
    embedding: Tensor
    head: LinearSpec
    layers: list[LayerSpec]
    final_norm: NormSpec
    max_positions: int
    rotary: list[Rotary] = field(default_factory=list)
    positions: Tensor | None = None
    position_offset: int = 0
    embedding_scale: float = 1.0
    logit_softcap: float = 0.0
    logit_scale: float = 1.0

    def linears(self) -> Iterator[LinearSpec]:
        """Every matrix, in the order of use."""
        for layer in self.layers:
            yield layer.attention.qkv
            yield layer.attention.out
            if isinstance(layer.mlp, MixtureSpec):
                yield layer.mlp.router
                mlps = layer.mlp.experts
            else:
                mlps = [layer.mlp]
            for mlp in mlps:
                yield mlp.up
                yield mlp.down
        yield self.head

    def packed_bytes(self) -> int:
        return sum(x.weight.nbytes for x in self.linears() if isinstance(x.weight, Panels))


def interleaved(gate: Tensor, up: Tensor) -> Tensor:
    """Rows of both, 16 of `gate`, then the 16 of `up` they belong to; filled up with zeros."""
    fill = -gate.shape[0] % 16
    pad = (0, fill) if gate.ndim == 1 else (0, 0, 0, fill)
    both = [torch.nn.functional.pad(t, pad) for t in (gate, up)]
    both = [t.view(-1, 16, *t.shape[1:]) for t in both]
    return torch.stack(both, 1).flatten(0, 2)
