"""Compile a model layer by layer: every linear layer runs the kernel that was measured fastest.

The model is copied; linear layers whose sparse product beats torch's dense one on the example's
number of tokens get packed weights, all others stay as they are. What runs between the layers is
torch, unchanged.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.core.masks import masks
from sparseworks.kernels.native import available, instruction_set
from sparseworks.kernels.spmm import SparseRows, pack_rows, spmm
from sparseworks.models.calls import call
from sparseworks.models.views import find_prunable

__all__ = ["Compiled", "LayerPlan", "SparseLinear", "compile"]

_REPEATS = 7
_MIN_SPARSITY = 0.4  # below this a dense product always wins; it is not even measured
_ADVANTAGE = 0.97  # sparse must take less than this share of dense


class _WeightRead(Exception):
    """The model looked at the weight of a layer that has none any more."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__("the weight of a compiled layer was read")
        self.layer = layer


class SparseLinear(nn.Module):
    """y = W x + b with W packed by rows; inference only.

    Args:
        packed: the weight.
        bias: `[rows]` or None.
        threads: of the native kernel; None: as many as torch uses.
    """

    start: Tensor
    column: Tensor
    value: Tensor
    bias: Tensor | None

    def __init__(self, packed: SparseRows, bias: Tensor | None, threads: int | None) -> None:
        super().__init__()
        self.in_features, self.out_features = packed.columns, packed.rows
        self.threads = threads
        self.register_buffer("start", packed.start)
        self.register_buffer("column", packed.column)
        self.register_buffer("value", packed.value)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @property
    def weight(self) -> Tensor:
        raise _WeightRead(self)

    def forward(self, x: Tensor) -> Tensor:
        packed = SparseRows(self.start, self.column, self.value, self.in_features)
        return spmm(packed, x, self.bias, self.threads)

    def extra_repr(self) -> str:
        total = self.in_features * self.out_features
        sparsity = 1 - self.value.numel() / max(1, total)
        return f"{self.in_features}, {self.out_features}, sparsity={sparsity:.3f}"


@dataclass(frozen=True)
class LayerPlan:
    """What was chosen for one layer.

    Args:
        name: of the module.
        kernel: "sparse rows" or "dense".
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


class Compiled:
    """A compiled model: call it as the model it was made from.

    Attributes:
        layers: what was chosen for each linear layer.
        error: largest relative difference from the model on the example,
            max |y - y'| / max |y|.
    """

    def __init__(self, model: nn.Module, layers: tuple[LayerPlan, ...], error: float) -> None:
        self.model, self.layers, self.error = model, layers, error

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def explain(self) -> str:
        """A line per linear layer: kernel, sparsity, time, and what dense would take."""
        width = max((len(p.name) for p in self.layers), default=5)
        lines = [
            f"{'layer':<{width}}  kernel       sparsity  tokens   ms      dense ms  ({_machine()})"
        ]
        for p in self.layers:
            reason = f"  {p.reason}" if p.reason else ""
            lines.append(
                f"{p.name:<{width}}  {p.kernel:<11}  {p.sparsity:8.3f}  {p.tokens:6d}  "
                f"{p.milliseconds:6.3f}  {p.dense_ms:8.3f}{reason}"
            )
        total = sum(p.milliseconds for p in self.layers)
        dense = sum(p.dense_ms for p in self.layers)
        lines.append(
            f"linear layers: {total:.2f} ms, dense {dense:.2f} ms; "
            f"relative error on the example {self.error:.1e}"
        )
        return "\n".join(lines)


def _machine() -> str:
    return f"{instruction_set()}, {torch.get_num_threads()} threads"


def compile(model: nn.Module, example: Any, *, threads: int | None = None) -> Compiled:
    """Make a sparse model skip its zeros where that is measured to be faster.

    Args:
        model: fp32 on the CPU; left as it is. A mask record, where there is one, says which
            weights are kept, else the zeros do.
        example: one batch as the model takes it (Tensor, mapping, or (inputs, target)); the layers
            are measured on its number of tokens. Other sizes run too.
        threads: of the native kernels; None: as many as torch uses.

    Returns:
        A callable with `explain()`.

    Raises:
        ModelError: not an fp32 model on the CPU, or weights that are not finite.
        InvalidArgument: the example does not fit the model, or a forced instruction set is missing.
    """
    odd = next((n for n, p in model.named_parameters() if p.device.type != "cpu"), None)
    if odd is not None:
        raise ModelError(f"{odd} is not on the CPU; compile takes models on the CPU")
    instruction_set()
    twin = copy.deepcopy(model).eval()
    inputs, expected = _trace(twin, example)
    record = masks(model)
    plans = []
    for view in find_prunable(twin, include="*"):
        if type(view.module) is not nn.Linear or view.module_name not in inputs:
            continue
        mask = record[view.name] if record is not None and view.name in record else None
        plan, sparse = _choose(view.module_name, view.module, mask, inputs, threads)
        plans.append(plan)
        if sparse is not None:
            _replace(twin, view.module_name, sparse)
    found, plans = _settle(twin, model, example, plans)
    return Compiled(twin, tuple(plans), _difference(expected, found))


def _settle(
    twin: nn.Module, model: nn.Module, example: Any, plans: list[LayerPlan]
) -> tuple[list[Tensor], list[LayerPlan]]:
    """Run the example; a layer whose weight the model reads by itself is put back as it was."""
    while True:
        try:
            with torch.no_grad():
                return _tensors(call(twin, example)), plans
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
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise InvalidArgument(f"the example does not fit the model: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    return inputs, _tensors(output)


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
    elif weight.shape[1] > 1 << 16:
        reason = "more than 65,536 inputs"
    dense = _median_ms(lambda: F.linear(x, layer.weight, layer.bias))
    if reason:
        return LayerPlan(name, "dense", sparsity, tokens, dense, None, reason), None
    sparse = SparseLinear(pack_rows(weight, mask), layer.bias, threads)
    dense, taken = _interleaved_ms(lambda: F.linear(x, layer.weight, layer.bias), lambda: sparse(x))
    if taken < _ADVANTAGE * dense:
        return LayerPlan(name, "sparse rows", sparsity, tokens, dense, taken), sparse
    return LayerPlan(name, "dense", sparsity, tokens, dense, taken, "dense is faster"), None


@torch.no_grad()
def _median_ms(run: Callable[[], Any]) -> float:
    return _interleaved_ms(run)[0]


@torch.no_grad()
def _interleaved_ms(*runs: Callable[[], Any]) -> list[float]:
    """Medians of several candidates, measured in turn so that a noisy machine is fair to all."""
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(_REPEATS):
        for i, run in enumerate(runs):
            start = time.perf_counter()
            run()
            times[i].append((time.perf_counter() - start) * 1e3)
    return [statistics.median(t) for t in times]


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return [t for part in output for t in _tensors(part)]
    return []


def _difference(expected: list[Tensor], found: list[Tensor]) -> float:
    return max(
        (
            float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))
            for a, b in zip(expected, found)
            if a.numel()
        ),
        default=0.0,
    )
