"""An exported graph without what is of no use to programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from sparseworks.engine.views import expression

__all__ = ["fixed_nodes", "folded", "tidied"]

_aten = torch.ops.aten
_SMALL = 1 << 16  # elements of a tensor that is computed beforehand
# of other libraries, by what of torch computes the same
_ALIKE = {"transformers.grouped_mm_fallback.default": _aten._grouped_mm.default}
_COPIES = (_aten.to.dtype, _aten.to.dtype_layout, _aten.to.device, _aten.type_as.default,
           _aten._to_copy.default, _aten.alias.default, _aten.detach.default)  # fmt: skip


def tidied(graph: torch.fx.Graph) -> None:
    """Take out checks and what nothing reads; what overwrites its input makes a new tensor."""
    for node in list(graph.nodes):
        if node.target is _aten._assert_tensor_metadata.default and not node.users:
            graph.erase_node(node)
            continue
        node.target = _ALIKE.get(str(node.target), node.target)
        schema = getattr(node.target, "_schema", None)
        name = "" if schema is None else schema.name.partition("::")[2]
        if schema is not None and schema.is_mutable and name.endswith("_") and name[-2:] != "__":
            packet = getattr(_aten, name[:-1], None)
            node.target = getattr(packet, schema.overload_name or "default", node.target)
        elif (node.target in _COPIES and not _changes(node)) or (
            node.target is _aten.dropout.default and not node.args[2]
        ):
            for user in [u for u in node.users if u.op != "output"]:
                user.replace_input_with(node, node.args[0])
            if not node.users:  # dropout is never taken for dead
                graph.erase_node(node)
    _sizes_of_inputs(graph)
    graph.eliminate_dead_code()


def _changes(node: Node) -> bool:
    """Whether a copy is of another type than what is copied."""
    one, other = node.meta["val"], node.args[0].meta["val"]  # type: ignore[union-attr]
    return bool((one.dtype, one.device) != (other.dtype, other.device))


def _sizes_of_inputs(graph: torch.fx.Graph) -> None:
    """Read sizes from the inputs, or write them out, so that nothing is made to be measured."""
    known: dict[Any, tuple[Node, int]] = {}
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, Tensor):
            for axis, size in enumerate(value.shape):
                known.setdefault(expression(size), (node, axis))
        elif node.target is _aten.sym_size.int:
            size = expression(value)
            if size.is_Integer:
                _written_out(node, int(size))
            elif size in known:
                node.args = known[size]


def _written_out(node: Node, size: int) -> None:
    """A number in the place of a node."""

    def swapped(n: Node) -> Any:
        return size if n is node else n

    for user in list(node.users):
        user.args, user.kwargs = map_arg((user.args, user.kwargs), swapped)


def fixed_nodes(graph: torch.fx.Graph, constants: Mapping[str, Tensor]) -> set[Node]:
    """What follows from constants and sizes alone: torch computes it once."""
    found: set[Node] = set()
    for node in graph.nodes:
        sized = node.target is _aten.sym_size.int
        known = all(n in found or n.name in constants for n in node.all_input_nodes)
        if node.op == "call_function" and (sized or known):
            found.add(node)
    return found


@torch.no_grad()
def folded(
    graph: torch.fx.Graph, fixed: set[Node], constants: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Constants, and small tensors that follow from them, by the names of their nodes."""
    found = dict(constants)
    for node in graph.nodes:
        value = node.meta.get("val")
        known = node in fixed and isinstance(value, Tensor) and node.all_input_nodes
        if not known or not all(n.name in found for n in node.all_input_nodes):
            continue
        small = all(isinstance(n, int) for n in value.shape) and value.numel() <= _SMALL
        if small or node.target is _aten.unsqueeze.default:  # no more memory
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: found[n.name])
            found[node.name] = node.target(*args, **kwargs)
    return found
