"""Layers whose weight is not a parameter, but computed from parameters in the forward pass.

Weight standardisation, weight and spectral norms, parametrizations: cutting an input changes what
the other inputs weigh, so to cut is not to zero. Sums, products and reshapes of parameters (masks,
scales, low-rank updates) are followed as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["Function", "weight_functions"]

_WEIGHTED = (
    "linear conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d"
)
_RECURRENT = "lstm gru rnn_tanh rnn_relu"  # of (input, states, weights, ..), or sizes after input
_CELLS = "lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell"
_FOLLOWED = (
    "mul add sub neg view reshape flatten unflatten squeeze unsqueeze _unsafe_view view_as "
    "reshape_as permute transpose t mT swapaxes cat concat stack slice split split_with_sizes "
    "chunk unbind select expand expand_as broadcast_to repeat repeat_interleave pad "
    "constant_pad_nd flip contiguous clone detach alias to _to_copy type_as float half bfloat16 "
    "matmul mm bmm where masked_fill zeros_like sized getitem"
)


@dataclass(frozen=True)
class Function:
    """The weight of a layer, as a function of parameters.

    Args:
        module: path of the layer.
        operations: what computes the weight, beside sums, products and reshapes.
    """

    module: str
    operations: tuple[str, ...]

    @property
    def why(self) -> str:
        return f"its weight is a function of its parameters ({', '.join(self.operations)})"

    def __str__(self) -> str:
        return f"{self.module or 'the model'}: {self.why}"


def weight_functions(
    graph: Any, parameters: set[str], buffers: set[str], base: Callable[[Any], str]
) -> tuple[tuple[Function, ...], set[Any]]:
    """What computes weights in an exported graph.

    Args:
        parameters: names of the placeholders that are parameters.
        buffers: of those that are buffers or constants.
        base: the name of an operation.

    Returns:
        the functions, and every node that a weight is made by.
    """
    fixed: set[Any] = set()  # nodes that no input of the model reaches
    learnt: set[Any] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            known = node.name in parameters or node.name in buffers
        else:
            known = node.op in ("call_function", "get_attr") and all(
                n in fixed for n in node.all_input_nodes
            )
        if known:
            fixed.add(node)
            if node.name in parameters or any(n in learnt for n in node.all_input_nodes):
                learnt.add(node)
    found: dict[str, Function] = {}
    inside: set[Any] = set()
    for node in graph.nodes:
        if node.op != "call_function" or node in fixed:
            continue
        made = [w for w in _weights(node, base) if w in learnt and w.op == "call_function"]
        steps = list(dict.fromkeys(step for weight in made for step in _before(weight)))
        if names := sorted({base(n.target).strip("_") for n in steps if not _followed(n, base)}):
            modules = list((node.meta.get("nn_module_stack") or {}).values())
            path = modules[-1][0] if modules else ""
            found[path] = Function(path, tuple(names))
            inside.update(steps)
    return tuple(found.values()), inside


def _weights(node: Any, base: Callable[[Any], str]) -> list[Any]:
    """The nodes that a layer takes as its weights; none of other operations."""
    name = base(node.target)
    if name in _WEIGHTED.split():
        return [node.kwargs.get("weight") or node.args[1]]
    if name in _RECURRENT.split():
        return [w for given in node.args[2:4] if isinstance(given, (list, tuple)) for w in given]
    return list(node.args[2:4]) if name in _CELLS.split() else []


def _before(node: Any) -> Iterator[Any]:
    """The operations that a node is computed by, itself among them."""
    seen, pending = {node}, [node]
    while pending:
        step = pending.pop()
        if step.op == "call_function":
            yield step
            pending += [n for n in step.all_input_nodes if n not in seen]
            seen.update(step.all_input_nodes)


def _followed(node: Any, base: Callable[[Any], str]) -> bool:
    if getattr(node.target, "__name__", "") == "getitem":
        return True
    name = base(node.target)
    if name == "div":
        return len(node.all_input_nodes) == 1  # by a number
    return name in _FOLLOWED.split() or name.startswith(("_assert", "sym_"))
