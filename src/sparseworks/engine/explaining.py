"""What a compiled model does, in lines of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseworks.engine.experts import Experts
from sparseworks.engine.ir import Precision, Product
from sparseworks.engine.measuring import median_ms, one_thread
from sparseworks.engine.programs import Instance, lone_product
from sparseworks.engine.steps import Call

if TYPE_CHECKING:
    from sparseworks.engine.layers import LayerPlan
    from sparseworks.engine.part import Part
    from sparseworks.engine.plan import Plan

__all__ = ["Row", "layer_lines", "left_dense", "program_lines", "rows"]

_REPEATS = 20


class Row:
    """One product of a program on one item (a sequence, an image, 16 images), on one thread.

    Attributes:
        name: of the weight.
        shape: of the weight.
        kernel: "taps", or "shared taps" where four rows share theirs; in fp32, bf16 or int8.
        sparsity: fraction of zeros in the weight.
        milliseconds: of the product.
        gflops: multiply-adds, times two, a second.
        limit: of the same kernel with everything in the first cache.
        dense_ms: of torch's dense layer on the same item and thread.
    """

    def __init__(self, part: Part, made: Instance, index: int, seconds: float) -> None:
        op, work = made.products[index]
        weight = _own(op)
        self.name, self.shape = op.name, tuple(weight.shape)
        shared = made.groups[index] > 1
        rounded = op.precision != Precision.FP32
        self.kernel = "shared taps" if shared else "taps"
        self.kernel += f", {op.precision.name.lower()}" if rounded else ""
        self.limit = machine_limit(shared, op.precision)
        self.sparsity = 1 - float(torch.count_nonzero(weight)) / max(1, weight.numel())
        self.milliseconds = seconds * 1e3
        self.gflops = 2 * work / max(seconds, 1e-9) / 1e9
        self.dense_ms = _dense_ms(op, made.sizes[index], made.lanes)


def rows(part: Part) -> list[Row]:
    """The products of a part, in the size that was met last."""
    made = part.last
    if made is None:
        return []
    tensors = [torch.zeros(shape) for shape in made.tensor_shapes]
    seconds = made.native.profile(tensors, made.lanes, _REPEATS)
    return [Row(part, made, i, seconds[i]) for i in made.products if made.products[i][0].name]


def program_lines(plan: Plan) -> list[str]:
    """A table of the products, and what torch runs."""
    lines = ["of limit: of the same kernel with everything in the first cache"]
    for number, part in enumerate(plan.parts):
        table = rows(part)
        made = part.last
        item = f"{made.lanes} images" if made is not None and made.lanes > 1 else "one " + {
            "image": "image", "tokens": "sequence"
        }[part.kind]  # fmt: skip
        lines.append(f"program {number + 1}: {len(part.ops)} operations; times of {item}, 1 thread")
        width = max((len(r.name) for r in table), default=5)
        lines.append(
            f"  {'layer':<{width}}  {'shape':<18} kernel             sparsity       ms  GFLOP/s  "
            "of limit  dense ms"
        )
        lines += [
            f"  {r.name:<{width}}  {'x'.join(map(str, r.shape)):<18} {r.kernel:<17}  "
            f"{r.sparsity:8.3f} {r.milliseconds:8.3f} {r.gflops:8.1f}  {r.gflops / r.limit:7.0%}  "
            f"{r.dense_ms:8.3f}"
            for r in table
        ]
        total, dense = (sum(getattr(r, k) for r in table) for k in ("milliseconds", "dense_ms"))
        lines.append(f"  products: {total:.3f} ms, dense {dense:.3f} ms")
    experts = [s for s in plan.steps if isinstance(s, Experts)]
    lines += [bank.line() for bank in experts]
    others = sorted({s.target for s in plan.steps if isinstance(s, Call) and s not in experts})
    if others:
        lines.append(f"torch runs: {', '.join(others)}")
    return lines


def layer_lines(layers: Sequence[LayerPlan]) -> list[str]:
    """A line per linear layer: kernel, sparsity, time, and what dense would take."""
    width = max((len(p.name) for p in layers), default=5)
    lines = [f"{'layer':<{width}}  kernel       sparsity  tokens   ms      dense ms"]
    for p in layers:
        reason = f"  {p.reason}" if p.reason else ""
        lines.append(
            f"{p.name:<{width}}  {p.kernel:<11}  {p.sparsity:8.3f}  {p.tokens:6d}  "
            f"{p.milliseconds:6.3f}  {p.dense_ms:8.3f}{reason}"
        )
    total, dense = sum(p.milliseconds for p in layers), sum(p.dense_ms for p in layers)
    return [*lines, f"linear layers: {total:.2f} ms, dense {dense:.2f} ms"]


def left_dense(
    model: nn.Module, kind: str, run: Any, layers: Sequence[LayerPlan]
) -> dict[str, str]:
    """Name -> why zeros are not skipped, of every parameter of two or more axes where none are.

    Args:
        kind: "program", "layers" or "torch".
        run: the plan, of kind "program".
        layers: what was chosen for each linear layer, of the other kinds.
    """
    reason = "torch runs the model" if kind == "torch" else "torch runs what reads it"
    left = {n: reason for n, p in model.named_parameters() if p.ndim > 1}
    left |= {f"{p.name}.weight": p.reason for p in layers if p.reason}
    taken = {f"{p.name}.weight" for p in layers if kind == "layers" and p.kernel != "dense"}
    if kind == "program":
        ops = (op for part in run.parts for op in part.ops)
        taken |= {op.name for op in ops if isinstance(op, Product)}
        taken |= {s.bank for s in run.steps if isinstance(s, Experts)}
    return {name: why for name, why in left.items() if name not in taken}


def _own(op: Product) -> Tensor:
    """The weight as the layer has it."""
    if not any(op.border):
        return op.weight
    rows, columns = (slice(n, -n or None) for n in op.border)
    return op.weight[:, :, rows, columns]


def _dense_ms(op: Product, size: tuple[int, ...], lanes: int) -> float:
    """Torch's dense layer on one item and one thread."""
    columns = op.weight.shape[1] * op.groups
    with one_thread():
        if op.weight.ndim == 4:
            x = torch.zeros(lanes, columns, *size)
            weight, padding = _own(op), [op.padding - n * op.dilation for n in op.border]
            return median_ms(
                lambda: F.conv2d(x, weight, op.bias, op.stride, padding, op.dilation, op.groups)
            )
        count = lanes * math.prod(size)
        x = torch.zeros(count, columns)
        return median_ms(lambda: F.linear(x, op.weight, op.bias))


@cache
def machine_limit(shared: bool, precision: Precision) -> float:
    """GFLOP/s of one thread of a kernel when all that it reads is in the first cache."""
    generator = torch.Generator().manual_seed(0)
    columns = 112 * precision  # that many taps, whatever the precision
    weight = torch.randn(64, columns, generator=generator)
    if not shared:
        weight[torch.rand(64, columns, generator=generator) < 0.6 ** (1 / precision)] = 0.0
    made = lone_product(weight, "tokens", (96,), precision)
    tensors: list[Tensor] = [torch.zeros(1, 96, columns), torch.zeros(1, 96, 64)]
    seconds = made.native.profile(tensors, 1, 300)
    ((index, (_, work)),) = made.products.items()
    return 2 * work / float(seconds[index]) / 1e9
