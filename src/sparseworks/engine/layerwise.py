"""Causal language models of families that the native decoder does not know, layer by layer.

Every linear layer gets the layout that was measured fastest for one vector: packed bf16 values
under a bit mask, with 16-bit indices, 8-bit integers, or the dense matrix as it is. Prompts (more
than a few tokens at once) run through the batched sparse product. All else is the model's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseworks.core.errors import ModelError
from sparseworks.engine.measuring import interleaved_ms
from sparseworks.engine.products import SparseLinear
from sparseworks.kernels import pack_index, pack_integer, pack_mask, spmv
from sparseworks.kernels.native import available

__all__ = ["DecodeLinear", "LayerwiseDecoder", "by_linear_layers"]

_INDEXED = 0.8  # sparsity from which on indices are tried
_PROMPT = 0.6  # sparsity from which on prompts run through the sparse product
_FEW = 4  # tokens up to which one vector after the other is fastest


class DecodeLinear(nn.Module):
    """y = W x + b for one token at a time; inference only.

    Args:
        layer: the dense layer.
        packed: its weight in a layout of `sparseworks.kernels`, or None for dense.
        threads: of the native kernels.
    """

    bias: Tensor | None
    dense: Tensor | None

    def __init__(self, layer: nn.Linear, packed: Any, threads: int) -> None:
        super().__init__()
        weight = layer.weight.detach()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.sparsity = 1 - int(torch.count_nonzero(weight)) / max(1, weight.numel())
        self.packed, self.threads = packed, threads
        bias = None if layer.bias is None else layer.bias.detach().float()
        self.register_buffer("bias", bias)
        keep = packed is None or self.sparsity < _PROMPT
        self.register_buffer("dense", weight if keep else None)
        self.many = None if keep else SparseLinear(weight.float(), self.bias, threads)

    @property
    def layout(self) -> str:
        return "dense" if self.packed is None else type(self.packed).__name__

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        if self.packed is not None and flat.shape[0] <= _FEW:
            found = [spmv(self.packed, v.float(), self.bias, self.threads) for v in flat]
            y = torch.stack(found)
        elif self.many is not None:
            y = self.many(flat.float())
        else:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            assert self.dense is not None  # kept where nothing else runs long prompts
            y = F.linear(flat, self.dense, bias)
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, {self.layout}, sparsity={self.sparsity:.3f}"
        )


class LayerwiseDecoder:
    """A causal language model of transformers with faster linear layers.

    Attributes:
        model: a copy whose linear layers are `DecodeLinear`; attributes and calls are its own.
        times: milliseconds a vector by layer: chosen layout, and dense.
        notes: why it is not one native program.
    """

    def __init__(
        self, model: nn.Module, times: dict[str, dict[str, float]], notes: list[str]
    ) -> None:
        self.model, self.times, self.notes = model, times, notes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # not there yet, while it is copied
            raise AttributeError(name)
        return getattr(self.model, name)

    def explain(self) -> str:
        """A line per linear layer: layout, sparsity, and the time a vector takes."""
        layers = {n: m for n, m in self.model.named_modules() if isinstance(m, DecodeLinear)}
        width = max((len(n) for n in layers), default=5)
        lines = [f"{'layer':<{width}}  layout       sparsity       ms  dense ms"]
        for name, layer in layers.items():
            times = self.times[name]
            lines.append(
                f"{name:<{width}}  {layer.layout:<11}  {layer.sparsity:8.3f} "
                f"{times[layer.layout]:8.4f}  {times['dense']:8.4f}"
            )
        return "\n".join([*lines, *self.notes])

    def save(self, path: Any) -> None:
        """Refused: there is no plan to be saved."""
        raise ModelError(
            f"{path}: nothing was written: this decoder runs layer by layer and has no plan "
            f"({self.notes[0]}); save the model, and compile it again where it is loaded"
        )


def by_linear_layers(
    model: nn.Module, int8: bool, threads: int, notes: list[str]
) -> LayerwiseDecoder:
    """Replace the linear layers of a copy.

    Kept weights are rounded to bf16 (a bf16 model keeps its bits); `int8` also tries 8-bit integers
    with a scale for 128 columns.

    Raises:
        ModelError: weights that are not finite.
    """
    twin = copy.deepcopy(model).eval()
    times: dict[str, dict[str, float]] = {}
    for name, layer in list(twin.named_modules()):
        if type(layer) is not nn.Linear:
            continue
        if not bool(torch.isfinite(layer.weight).all()):
            raise ModelError(f"{name}.weight: NaN or Inf; nothing was compiled")
        made, times[name] = _fastest(layer, int8, threads)
        parent, _, child = name.rpartition(".")
        setattr(twin.get_submodule(parent), child, made)
    return LayerwiseDecoder(twin, times, notes)


def _fastest(layer: nn.Linear, int8: bool, threads: int) -> tuple[DecodeLinear, dict[str, float]]:
    weight = layer.weight.detach()
    sparsity = 1 - int(torch.count_nonzero(weight)) / max(1, weight.numel())
    candidates: dict[str, Any] = {"dense": None}
    if available():
        tried = [pack_mask]
        if sparsity >= _INDEXED and weight.shape[1] <= 1 << 16:
            tried.append(pack_index)  # type: ignore[arg-type]
        if int8:
            tried.append(pack_integer)  # type: ignore[arg-type]
        for pack in tried:
            packed = pack(weight)
            candidates[type(packed).__name__] = packed
    x = torch.randn(layer.in_features)
    runs: dict[str, Callable[[], Any]] = {
        "dense": lambda: F.linear(x.to(weight.dtype)[None], weight, layer.bias)
    }
    for name, packed in candidates.items():
        if packed is not None:
            runs[name] = lambda packed=packed: spmv(packed, x, None, threads)  # type: ignore[misc]
    times = dict(zip(runs, interleaved_ms(*runs.values()), strict=True))
    best = min(times, key=lambda name: times[name])
    return DecodeLinear(layer, candidates[best], threads), times
