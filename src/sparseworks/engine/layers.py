"""A model layer by layer: every linear layer runs the kernel that was measured fastest.

For models that cannot be captured whole. The model is copied; linear layers whose sparse product
beats torch's dense one on the example's number of tokens get packed weights, all others stay as
they are. What runs between the layers is torch, unchanged.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseworks.core.errors import ModelError
from sparseworks.core.masks import masks
from sparseworks.engine.measuring import interleaved_ms, median_ms, tensors_of
from sparseworks.engine.products import SparseLinear
from sparseworks.kernels.native import available
from sparseworks.models.calls import call
from sparseworks.models.views import find_prunable

__all__ = ["LayerPlan", "by_layers"]

_MIN_SPARSITY = 0.4  # below this a dense product always wins; it is not even measured
_ADVANTAGE = 0.97  # sparse must take less than this share of dense


class _WeightRead(Exception):
    """The model looked at the weight of a layer that has none any more."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__("the weight of a compiled layer was read")
        self.layer = layer


class _Linear(SparseLinear):
    """Tells when the model reads the weight by itself."""

    @property
    def weight(self) -> Tensor:
        raise _WeightRead(self)


@dataclass(frozen=True)
class LayerPlan:
    """What was chosen for one layer.

    Args:
        name: of the module.
        kernel: "sparse" or "dense".
        sparsity: fraction of zeros.
        tokens: rows of input in the example.
        dense_ms: torch's dense product, median.
        sparse_ms: the sparse product, median; None where it was not measured.
        reason: why dense, where it is.
    """

    name: str
    kernel: str
    sparsity: float
    tokens: int
    dense_ms: float
    sparse_ms: float | None
    reason: str = ""

    @property
    def milliseconds(self) -> float:
        sparse = self.sparse_ms if self.kernel != "dense" else None
        return self.dense_ms if sparse is None else sparse


def by_layers(
    model: nn.Module, example: Any, threads: int | None
) -> tuple[nn.Module, list[LayerPlan], list[Tensor]]:
    """A copy of the model whose linear layers run the kernel that was measured fastest.

    Returns:
        The copy, what was chosen, and the copy's output on the example.
    """
    twin = copy.deepcopy(model).eval()
    inputs, _ = _trace(twin, example)
    record = masks(model)
    plans = []
    for view in find_prunable(twin, include="*", required=False):
        if type(view.module) is not nn.Linear or view.module_name not in inputs:
            continue
        mask = record[view.name] if record is not None and view.name in record else None
        plan, sparse = _choose(view.module_name, view.module, mask, inputs, threads)
        plans.append(plan)
        if sparse is not None:
            _replace(twin, view.module_name, sparse)
    found, plans = _settle(twin, model, example, plans)
    return twin, plans, found


def _settle(
    twin: nn.Module, model: nn.Module, example: Any, plans: list[LayerPlan]
) -> tuple[list[Tensor], list[LayerPlan]]:
    """Run the example; a layer whose weight the model reads by itself is put back as it was."""
    while True:
        try:
            with torch.no_grad():
                return tensors_of(call(twin, example)), plans
        except _WeightRead as read:
            name = next(n for n, m in twin.named_modules() if m is read.layer)
            _replace(twin, name, copy.deepcopy(model.get_submodule(name)).eval())
            reason = "the model reads its weight by itself"
            plans = [
                replace(p, kernel="dense", reason=reason) if p.name == name else p for p in plans
            ]


def _trace(model: nn.Module, example: Any) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The input of every linear layer on the example, and the model's output."""
    inputs: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if type(module) is nn.Linear:

            def keep(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                inputs[name] = args[0].detach()

            handles.append(module.register_forward_pre_hook(keep))
    try:
        with torch.no_grad():
            output = call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return inputs, tensors_of(output)


def _choose(
    name: str,
    layer: nn.Linear,
    mask: Tensor | None,
    inputs: Mapping[str, Tensor],
    threads: int | None,
) -> tuple[LayerPlan, SparseLinear | None]:
    """Measure the candidates of one layer on its own input."""
    x, weight = inputs[name], layer.weight.detach()
    if not bool(torch.isfinite(weight).all()):
        raise ModelError(f"{name}.weight: NaN or Inf; nothing was compiled")
    kept = int(torch.count_nonzero(weight if mask is None else mask))
    sparsity = 1 - kept / max(1, weight.numel())
    tokens = x.numel() // max(1, x.shape[-1])
    reason = ""
    if weight.dtype != torch.float32:
        reason = f"{weight.dtype} has no sparse kernel here"
    elif not available():
        reason = "the native kernels are not built"
    elif sparsity < _MIN_SPARSITY:
        reason = f"below {_MIN_SPARSITY:.0%} zeros"
    dense = median_ms(lambda: F.linear(x, layer.weight, layer.bias))
    if reason:
        return LayerPlan(name, "dense", sparsity, tokens, dense, None, reason), None
    sparse = _Linear(weight, layer.bias, threads)
    dense, taken = interleaved_ms(lambda: F.linear(x, layer.weight, layer.bias), lambda: sparse(x))
    if taken < _ADVANTAGE * dense:
        return LayerPlan(name, "sparse", sparsity, tokens, dense, taken), sparse
    return LayerPlan(name, "dense", sparsity, tokens, dense, taken, "dense is faster"), None


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
