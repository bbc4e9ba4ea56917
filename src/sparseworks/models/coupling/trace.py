"""From a model and one batch to its coupling: torch.export, then one walk over the graph."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.core.errors import ModelError
from sparseworks.models.calls import Arguments, Batch
from sparseworks.models.coupling.calls import Call, Cost
from sparseworks.models.coupling.groups import Coupling, solve
from sparseworks.models.coupling.ops import HANDLERS, elementwise
from sparseworks.models.coupling.provenance import Atoms, Provenance, frozen
from sparseworks.models.hooks import refresh
from sparseworks.models.recurrence import relist

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
    program = _exported(model, example)
    unknown = {
        n.target for n in program.graph.nodes if n.op == "call_function" and _handler(n) is None
    }
    if unknown:
        program = _decomposed(program)
    return _walk(program, model)


def _exported(model: nn.Module, example: Batch) -> torch.export.ExportedProgram:
    given = Arguments.of_batch(example)
    try:
        with _quiet(model), torch.no_grad():
            return torch.export.export(model, given.args, dict(given.kwargs), strict=False)
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise ModelError(
            f"{type(model).__name__}: torch.export cannot follow the forward pass "
            f"({type(error).__name__}: {first[:300]}); channels can only be cut where it can"
        ) from error


@contextlib.contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no key-value cache, no fused fast path; put back afterwards.

    The export leaves its own stand-ins in the lists that recurrent layers keep of their weights,
    and warns that it did: they take their parameters again.
    """
    training = {m: m.training for m in model.modules()}
    configs: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    caches = [c for c in configs if getattr(c, "use_cache", False)]
    fast = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    for config in caches:
        config.use_cache = False
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"The tensor attributes? .*_flat_weights")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for config in caches:
            config.use_cache = True
        for module, was in training.items():
            module.training = was
            refresh(module)  # what hooks computed in the export has no values
        relist(model.modules())


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


def _walk(program: torch.export.ExportedProgram, model: nn.Module) -> Coupling:
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
    for node in program.graph.nodes:
        if node.op == "placeholder":
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
            known[node] = _step(node, known, atoms, costs)
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
    return solve(model, atoms, costs, sources)


def _step(node: Any, known: dict[Any, Any], atoms: Atoms, costs: list[Cost]) -> Any:
    if getattr(node.target, "__name__", "") == "getitem":
        return known[node.args[0]][node.args[1]]
    if _silent(node):
        return None
    handler, shapes = _handler(node), _shapes(node)
    if handler is None or not shapes:
        raise CouplingError(_where(node, "its effect on channels is not known"))
    arguments = {k: _resolve(v, known) for k, v in _bound(node).items()}
    call = Call(atoms, arguments, shapes, costs, _base(node.target))
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
