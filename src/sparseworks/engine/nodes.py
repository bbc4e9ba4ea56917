"""What nodes of an exported graph tell: their shapes, their batch, their arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

__all__ = [
    "batch_of",
    "filled",
    "fixes_pixels",
    "place_of",
    "same_sizes",
    "shape_of",
    "size_now",
]

_FIXING = {
    "conv_transpose2d", "group_norm", "instance_norm", "native_group_norm", "permute",
    "pixel_shuffle", "pixel_unshuffle", "roll", "upsample_bicubic2d", "upsample_bilinear2d",
}  # fmt: skip


def place_of(node: Node) -> int:
    """Where a node stands in its graph."""
    return next(i for i, n in enumerate(node.graph.nodes) if n is node)


def shape_of(node: Any) -> tuple[Any, ...] | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return None
    return tuple(value.shape)


def size_now(size: Any) -> int:
    """A size in the example."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else size


def same_sizes(one: tuple[Any, ...], two: tuple[Any, ...]) -> bool:
    """Whether operands of one operator have equal axes.

    Sizes that are equal in the example are so in all: torch, which would broadcast else, noted it.
    """
    return [size_now(n) for n in one] == [size_now(n) for n in two]


def batch_of(node: Node, kind: str) -> tuple[str, ...] | None:
    """What all values of a program have in common."""
    shape = shape_of(node) or ()
    if kind == "image":
        known = len(shape) in (2, 4) and isinstance(shape[1], int)
        return (str(shape[0]),) if known else None
    if len(shape) not in (2, 3) or not isinstance(shape[-1], int):
        return None
    return tuple(str(n) for n in shape[:-1])


def filled(node: Node, defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a node, with the defaults of those that were not given."""
    return (*node.args, *defaults[len(node.args) :])


def fixes_pixels(node: Node) -> bool:
    """Whether a program takes the operator in only where it knows heights and widths."""
    schema = getattr(node.target, "_schema", None)
    name = "" if schema is None else schema.name.partition("::")[2].rstrip("_")
    if name == "conv2d" and len(node.args) > 3:  # patches that do not overlap
        kernel = node.args[1].meta["val"].shape[2:]  # type: ignore[union-attr]
        return kernel[0] > 1 and list(kernel) == list(node.args[3])  # type: ignore[arg-type]
    if name == "adaptive_avg_pool2d":
        return list(node.args[1]) != [1, 1]  # type: ignore[arg-type]
    if name in ("linear", "addmm", "mm"):  # of all pixels of an image
        x = node.args[1 if name == "addmm" else 0].meta["val"]  # type: ignore[union-attr]
        return not isinstance(x.shape[-1], int)
    return name in _FIXING
