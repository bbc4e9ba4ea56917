"""What products of a packed matrix with a batch have in common: their inputs, and what they may do
to their sums before they store them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparseworks.core.errors import InvalidArgument
from sparseworks.kernels.native import instruction_set, module

__all__ = ["Inputs", "activation_number", "apply_activation", "check_inputs", "dense_product",
           "product"]  # fmt: skip

# in the order of the native enumeration
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": functional.relu,
    "relu6": functional.relu6,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "hardswish": functional.hardswish,
    "hardsigmoid": functional.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def activation_number(name: str) -> int:
    """The native number of an activation.

    Raises:
        InvalidArgument: not one of them.
    """
    if name not in _ACTIVATIONS:
        raise InvalidArgument(f"the activation {name!r} is not one of {', '.join(_ACTIVATIONS)}")
    return list(_ACTIVATIONS).index(name)


def apply_activation(x: Tensor, name: str) -> Tensor:
    """The activation in torch."""
    activation_number(name)
    return _ACTIVATIONS[name](x)


def dense_product(
    weight: Tensor,
    x: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """activation(x W^T + b + residual) in torch: x is rounded to W's dtype, sums are fp32."""
    y = functional.linear(x.to(weight.dtype).float(), weight.float(), bias)
    if residual is not None:
        y = y + residual.float()
    return apply_activation(y, activation).to(dtype or x.dtype)


@dataclass(frozen=True)
class Inputs:
    """What the native call takes, and the result `y` that it fills.

    Args:
        given: x, bias, residual, number of the activation, y: contiguous matrices, bf16 seen as
            16-bit integers.
        y: `[..., rows]`.
    """

    given: tuple[object, ...]
    y: Tensor


def check_inputs(
    op: str,
    shape: tuple[int, int],
    x: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    dtype: torch.dtype | None,
) -> Inputs:
    """The inputs of y = activation(x W^T + bias + residual) with W of `shape` rows, columns.

    Raises:
        InvalidArgument: shapes, dtypes or activations that do not fit.
    """
    rows, columns = shape
    kinds = (torch.float32, torch.bfloat16)
    out = dtype or x.dtype
    if x.ndim == 0 or x.shape[-1] != columns or x.dtype not in kinds or out not in kinds:
        raise InvalidArgument(
            f"{op}: x is {x.dtype} {list(x.shape)} and the result {out}; the matrix takes fp32 or "
            f"bf16 [..., {columns}]"
        )
    made = (*x.shape[:-1], rows)
    if residual is not None and (residual.shape != made or residual.dtype != out):
        raise InvalidArgument(
            f"{op}: the residual is {residual.dtype} {list(residual.shape)}, not {out} {list(made)}"
        )
    if bias is not None and (bias.shape != (rows,) or bias.dtype != torch.float32):
        raise InvalidArgument(
            f"{op}: the bias is {bias.dtype} {list(bias.shape)}, not fp32 [{rows}]"
        )
    number = activation_number(activation)
    y = torch.empty(made, dtype=out)
    given = (
        _plain(x, columns),
        None if bias is None else bias.detach().contiguous(),
        None if residual is None else _plain(residual, rows),
        number,
        _plain(y, rows),
    )
    return Inputs(given, y)


def product(
    op: str,
    packed: Any,
    unpack: Callable[[Any], Tensor],
    run: Callable[..., Any],
    x: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    dtype: torch.dtype | None,
    threads: int | None,
) -> Tensor:
    """Y = activation(X W^T + b + residual) by native code, or in torch where there is none.

    Args:
        op: what errors name.
        packed: W, with `rows` and `columns`.
        unpack: the dense matrix of it.
        run: called with the native module, what `Inputs.given` holds, and the threads.
        x, bias, activation, residual, dtype, threads: as every product takes them.
    """
    shape = packed.rows, packed.columns
    inputs = check_inputs(op, shape, x, bias, activation, residual, dtype)
    native = module()
    if native is None or x.device.type != "cpu":
        return dense_product(unpack(packed), x, bias, activation, residual, dtype)
    instruction_set()  # refuses a forced set that is not there
    run(native, *inputs.given, torch.get_num_threads() if threads is None else threads)
    return inputs.y


def _plain(t: Tensor, columns: int) -> Tensor:
    t = t.detach().reshape(-1, columns).contiguous()
    return t.view(torch.uint16) if t.dtype == torch.bfloat16 else t
