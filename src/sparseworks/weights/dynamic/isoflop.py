"""The layers of Sparse-IFT: larger than the one they replace, as cheap once they are sparse."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.random import generator_for
from sparseworks.models.calls import Batch, call, split
from sparseworks.models.modes import evaluating
from sparseworks.models.recurrence import products_shown
from sparseworks.models.views import View

__all__ = [
    "Doped",
    "Factorized",
    "Parallel",
    "common_sparsity",
    "draw",
    "layer_macs",
    "model_macs",
]

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


class Parallel(nn.Module):
    """y = sum over n branches of norm_i(layer_i(x)): n sparse copies at density 1/n.

    Args:
        layer: the first branch; the others are drawn anew with its spread.
        norm: the batch norm that followed the layer, copied into every branch.
        branches: n = round(1 / (1 - s)).
        seed: of the new weights.
        name: of the layer, for its random numbers.
    """

    def __init__(self, layer: Layer, norm: nn.Module, branches: int, seed: int, name: str) -> None:
        super().__init__()
        made = []
        for i in range(branches):
            twin = layer if i == 0 else copy.deepcopy(layer)
            if i:
                draw(twin.weight, float(layer.weight.detach().std()), seed, f"{name}/{i}")
            made.append(nn.Sequential(twin, norm if i == 0 else copy.deepcopy(norm)))
        self.branches = nn.ModuleList(made)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return total


class Factorized(nn.Module):
    """y = V f(U x), both sparse: U is like the layer with d outputs, V 1 x 1 from d.

    f is batch norm and ReLU for convolutions, ReLU for linear layers; without it the product would
    express no more than one layer. d = ceil(size / (density (fan_in + outputs))).
    """

    def __init__(self, layer: Layer, sparsity: float, seed: int, name: str) -> None:
        super().__init__()
        size, fan_in, outputs = _sizes(layer)
        inner = math.ceil(size / ((1 - sparsity) * (fan_in + outputs)))
        self.first, self.second = _factors(layer, inner, layer.bias is not None, seed, name)
        self.between: nn.Module = nn.ReLU()
        if not isinstance(layer, nn.Linear):
            norms = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
            norm = norms[layer.weight.ndim](inner).to(layer.weight.device, layer.weight.dtype)
            self.between = nn.Sequential(norm, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.between(self.first(x)))
        return y


class Doped(nn.Module):
    """y = layer(x) + V(U x): the layer sparse, U and V dense and linear, of the freed cost.

    d = floor(s size / (fan_in + outputs)).
    """

    def __init__(self, layer: Layer, sparsity: float, seed: int, name: str) -> None:
        super().__init__()
        size, fan_in, outputs = _sizes(layer)
        inner = math.floor(sparsity * size / (fan_in + outputs))
        if inner < 1:
            raise InvalidArgument(
                f"sparse-ift: the cost that sparsity {sparsity:g} frees in {name} is less than a "
                "rank of one; raise it, or exclude the layer"
            )
        self.layer = layer
        self.first, self.second = _factors(layer, inner, False, seed, name)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) + self.second(self.first(x))
        return y


def _sizes(layer: Layer) -> tuple[int, int, int]:
    """Weights, inputs of one output, outputs."""
    size = layer.weight.numel()
    return size, size // layer.weight.shape[0], layer.weight.shape[0]


def _factors(layer: Layer, inner: int, bias: bool, seed: int, name: str) -> tuple[Layer, Layer]:
    """U with the layer's taps and stride, V 1 x 1; their product has the layer's spread."""
    outputs = layer.weight.shape[0]
    settings: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    first: Layer
    second: Layer
    if isinstance(layer, nn.Linear):
        first = nn.Linear(layer.in_features, inner, bias=False, **settings)
        second = nn.Linear(inner, outputs, bias=bias, **settings)
    else:
        kind: Any = type(layer)
        first = kind(
            layer.in_channels, inner, layer.kernel_size, layer.stride, layer.padding,
            layer.dilation, bias=False, padding_mode=layer.padding_mode, **settings,
        )  # fmt: skip
        second = kind(inner, outputs, 1, bias=bias, **settings)
    fan_in = layer.weight.numel() // outputs
    spread = float(layer.weight.detach().std())
    draw(first.weight, fan_in**-0.5, seed, f"{name}/first")
    draw(second.weight, spread * (fan_in / inner) ** 0.5, seed, f"{name}/second")
    if second.bias is not None and layer.bias is not None:
        with torch.no_grad():
            second.bias.copy_(layer.bias)
    if layer.weight.ndim == 4 and layer.weight.is_contiguous(memory_format=torch.channels_last):
        first.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return first, second


@torch.no_grad()
def draw(weight: Tensor, spread: float, seed: int, name: str) -> None:
    """Gaussian weights of this standard deviation, a function of seed and name."""
    drawn = torch.randn(weight.shape, generator=generator_for(seed, name))
    weight.copy_(drawn.to(weight.device) * spread)


class _Counter(TorchFunctionMode):
    """Adds up the multiply-adds of products (torch's own counter imports its compiler)."""

    total: int = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "linear" or name in ("conv1d", "conv2d", "conv3d"):
            self.total += out.numel() * args[1][0].numel()
        elif name in ("matmul", "__matmul__", "mm", "bmm"):
            self.total += out.numel() * args[0].shape[-1]
        elif name in ("addmm", "baddbmm"):
            self.total += out.numel() * args[1].shape[-1]
        elif name == "scaled_dot_product_attention":
            query, key = args[:2]
            self.total += out.numel() * key.shape[-2] + query.numel() * key.shape[-2]
        elif name == "multi_head_attention_forward":  # [tokens, batch, width], width fourth
            query, key, value, width = args[:4]
            self.total += (2 * query.numel() + key.numel() + value.numel()) * width
            self.total += 2 * query.numel() * key.shape[0]
        return out


@torch.no_grad()
def model_macs(model: nn.Module, example: Batch) -> int:
    """Multiply-adds of one call: convolutions, linear layers, matrix products and attention."""
    counter = _Counter()
    with evaluating(model), counter, products_shown():
        call(model, split(example)[0])
    return counter.total


@torch.no_grad()
def layer_macs(model: nn.Module, views: Iterable[View], example: Batch) -> dict[str, int]:
    """Multiply-adds of each weight in one call: its size times the places it is used at."""
    macs = {v.name: 0 for v in views}
    handles = []
    for view in views:

        def count(module: nn.Module, args: object, output: Tensor, view: View = view) -> None:
            places = output.numel() // view.shape[0]
            macs[view.name] += places * view.parameter.numel()

        handles.append(view.module.register_forward_hook(count))
    try:
        with evaluating(model):
            call(model, split(example)[0])
    finally:
        for handle in handles:
            handle.remove()
    return macs


def common_sparsity(wide: nn.Module, views: Iterable[View], dense: int, example: Batch) -> float:
    """The sparsity s of the given layers at which the wide model costs as much as the dense one.

    total - s * (multiply-adds of the layers) = dense, so s needs no search.

    Raises:
        InvalidArgument: the model is not wider, or what must stay dense costs too much by itself.
    """
    views = list(views)
    total = model_macs(wide, example)
    treated = sum(layer_macs(wide, views, example).values())
    sparsity = (total - dense) / max(1, treated)
    if not 0 < sparsity < 1:
        what = "is no larger than" if sparsity <= 0 else "has layers outside the masks dearer than"
        raise InvalidArgument(
            f"sparse-ift: the wide model ({total:,} multiply-adds, {treated:,} of them under "
            f"masks) {what} the dense one ({dense:,}); give a wider model, or include more layers"
        )
    return sparsity
