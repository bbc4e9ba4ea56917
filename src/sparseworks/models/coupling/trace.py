"""From a model and one batch to its coupling: torch.export, then one walk over the graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparseworks.core.errors import ModelError
from sparseworks.models.calls import Batch
from sparseworks.models.coupling.calls import Call, Cost
from sparseworks.models.coupling.exporting import exported
from sparseworks.models.coupling.functions import Function, weight_functions
from sparseworks.models.coupling.groups import Coupling, solve
from sparseworks.models.coupling.ops import HANDLERS, elementwise
from sparseworks.models.coupling.provenance import Atoms, Block, Provenance, frozen
from sparseworks.models.coupling.shapes import take
from sparseworks.models.coupling.tracking import SIZED, Size, Tracking

__all__ = ["CouplingError", "trace"]


class CouplingError(ModelError):
    """An operation whose effect on channels is not known; the message names it and its source."""


def trace(model: nn.Module, example: Batch) -> Coupling:
    """Which channels of which parameters must be cut together.

    Args:
        model: any module that torch.export can follow.
        example: `Arguments`, or one batch (Tensor, mapping, or (inputs, target)).

    Raises:
        ModelError: torch.export cannot follow the model.
        CouplingError: the graph holds an operation that is not known, with node and source line.
    """
    tracking = Tracking()
    program = exported(model, example, tracking)
    _, inside = _functions(program)
    if any(
        n.op == "call_function" and _handler(n) is None
        for n in program.graph.nodes
        if n not in inside
    ):
        program = _decomposed(program)
    return _walk(program, model, tracking)


def _functions(
    program: torch.export.ExportedProgram,
) -> tuple[tuple[Function, ...], set[Any]]:
    signature = program.graph_signature
    buffers = {*signature.inputs_to_buffers, *signature.inputs_to_lifted_tensor_constants}
    return weight_functions(program.graph, set(signature.inputs_to_parameters), buffers, _base)


def _decomposed(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Break up what is not known, and only that."""
    table: Any = torch.export.default_decompositions()
    for op in list(table.keys()):
        if _base(op) in HANDLERS:
            table.pop(op)
    with torch.no_grad():
        broken: torch.export.ExportedProgram = program.run_decompositions(table)
    return broken


def _base(target: Any) -> str:
    name = str(target).split(".")
    base = name[1] if len(name) > 1 else name[0]
    return base if base in HANDLERS else base.rstrip("_") if not base.startswith("__") else base


def _handler(node: Any) -> Any:
    target = node.target
    if getattr(target, "__name__", "") == "getitem" or _silent(node):
        return elementwise
    found = HANDLERS.get(_base(target))
    if found is None and torch.Tag.pointwise in getattr(target, "tags", ()):
        return elementwise
    return found


def _silent(node: Any) -> bool:
    """Checks and the like, that return nothing."""
    return str(node.target).startswith(("aten._assert", "aten.sym_", "aten._assert_scalar"))


def _walk(program: torch.export.ExportedProgram, model: nn.Module, tracking: Tracking) -> Coupling:
    atoms, costs = Atoms(), list[Cost]()
    known: dict[Any, Any] = {}
    sources: dict[str, Provenance] = {}
    signature = program.graph_signature
    named = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
    }
    constants = signature.inputs_to_lifted_tensor_constants
    tensors: dict[str, Any] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    canonical: dict[int, str] = {}  # tied tensors are one, under the first of their names
    for name, tensor in tensors.items():
        canonical.setdefault(id(tensor), name)
    functions, inside = _functions(program)
    for node in program.graph.nodes:
        if node in inside:
            # nothing that a weight is computed from can be cut, nor what that weight meets
            for source in node.all_input_nodes:
                if source not in inside and isinstance(known.get(source), Provenance):
                    atoms.freeze_all(known[source])
            fixed = [frozen(shape) for shape in _shapes(node)]
            known[node] = fixed[0] if len(fixed) == 1 else fixed
        elif node.op == "placeholder":
            shape = _shapes(node)
            if node.name in named and shape and node.users:
                name = canonical[id(tensors[named[node.name]])]
                if name not in sources:
                    sources[name] = atoms.source(shape[0])
                known[node] = sources[name]
            elif shape:
                constant = node.name in constants
                known[node] = Provenance(shape[0]) if constant else frozen(shape[0])
        elif node.op == "call_function":
            known[node] = _step(node, known, atoms, costs, tracking)
            if _base(node.target) == SIZED:
                known[node] = _told(known[node], tracking.calls[node.args[1]], atoms)
        elif node.op == "get_attr":
            shape = _shapes(node)
            known[node] = Provenance(shape[0]) if shape else None
        elif node.op == "output":
            for source in node.all_input_nodes:
                if isinstance(known.get(source), Provenance):
                    atoms.freeze_all(known[source])
    for prefix, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            # its forward derives the size of a head from the width it is given
            for name, _ in module.named_parameters():
                if (found := sources.get(f"{prefix}.{name}" if prefix else name)) is not None:
                    atoms.freeze_all(found)
    return replace(solve(model, atoms, costs, sources), functions=functions)


def _told(tensor: Provenance, sizes: Sequence[Size], atoms: Atoms) -> Provenance:
    """Note what numbers of the model count; an axis that was free is from now on one of its own."""
    free = {s.dim for s in sizes if tensor.block(s.dim) is None}
    fresh = [Block((d,), atoms.fresh(tensor.shape[d])) for d in sorted(free)]
    tensor = Provenance(tensor.shape, (*tensor.blocks, *fresh))
    for size in sizes:
        index = np.arange(tensor.shape[size.dim])[size.start : size.stop]
        atoms.told(take(tensor, size.dim, index), size.dim, size.formula)
    return tensor


def _step(
    node: Any, known: dict[Any, Any], atoms: Atoms, costs: list[Cost], tracking: Tracking
) -> Any:
    if getattr(node.target, "__name__", "") == "getitem":
        return known[node.args[0]][node.args[1]]
    if _silent(node):
        return None
    handler, shapes = _handler(node), _shapes(node)
    if handler is None or not shapes:
        raise CouplingError(_where(node, "its effect on channels is not known"))
    arguments = {k: _resolve(v, known) for k, v in _bound(node).items()}
    call = Call(atoms, arguments, shapes, costs, _base(node.target))
    call.held = lambda: _held(node, tracking)
    call.siblings = lambda key: [
        _bound(user)
        for user in node.args[0].users
        if user.target is node.target and _bound(user).get(key) is node.args[0]
    ]
    try:
        return handler(call)
    except CouplingError:
        raise
    except Exception as error:
        raise CouplingError(_where(node, f"{type(error).__name__}: {error}")) from error


def _held(node: Any, tracking: Tracking) -> bool:
    """Does the model tell by its own numbers how long every piece of a cut axis is?"""
    dim = _bound(node).get("dim") or 0
    rank = len(_bound(node)["self"].meta["val"].shape)

    def told(mark: Any, bounds: bool) -> bool:
        return _base(getattr(mark, "target", "")) == SIZED and any(
            size.dim == dim % rank and (size.stop is not None) == bounds
            for size in tracking.calls[mark.args[1]]
        )

    if _base(node.target) == "slice":
        return told(node.args[0], bounds=True)
    pieces = [u for u in node.users if any(told(mark, bounds=False) for mark in u.users)]
    return len(pieces) == len(_shapes(node))


def _bound(node: Any) -> dict[str, Any]:
    """Arguments by the names of the operation's schema."""
    names = [a.name for a in node.target._schema.arguments]
    return {**dict(zip(names, node.args)), **node.kwargs}


def _resolve(value: Any, known: dict[Any, Any]) -> Any:
    if isinstance(value, torch.fx.Node):
        return known[value]
    if isinstance(value, (list, tuple)):
        return [_resolve(v, known) for v in value]
    return value


def _shapes(node: Any) -> list[tuple[int, ...]]:
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    found = [v for v in values if isinstance(v, Tensor)]
    for tensor in found:
        if not all(isinstance(n, int) for n in tensor.shape):
            raise CouplingError(_where(node, "the size of its result depends on values"))
    return [tuple(v.shape) for v in found]


def _where(node: Any, why: str) -> str:
    stack = [s.strip() for s in (node.meta.get("stack_trace") or "").strip().split("\n")]
    source = " | ".join(stack[-2:]) if stack[0] else "source unknown"
    modules = list((node.meta.get("nn_module_stack") or {}).values())
    path = modules[-1][0] if modules else "the model"
    return (
        f"cannot follow {node.target} (node {node.name!r} in {path or 'the model'}; {source}): "
        f"{why}"
        "; rewrite that line with known operations, or keep it out of the traced forward"
    )
