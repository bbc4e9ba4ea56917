"""What a kernel may do to its sums before it stores them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from sparseworks.core.errors import InvalidArgument

__all__ = ["activation_number", "apply_activation"]

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
