"""A model as a graph of operators that inputs of many sizes run through, by torch.export."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import Parameter
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from sparseworks.core.errors import InvalidArgument
from sparseworks.engine.binding import Binding
from sparseworks.engine.guards import guards_of, holds, written
from sparseworks.engine.nodes import fixes_pixels
from sparseworks.engine.steps import Ref
from sparseworks.models.calls import Arguments, signature_of

__all__ = ["Captured", "Signature", "capture"]

_CHECKED = 64  # sets of sizes that need not be checked again


@dataclass
class Signature:
    """What a compiled model takes and returns.

    Args:
        binding: which arguments a call gives, and how it may write them.
        inputs: names of the caller's tensors, in flat order.
        outputs: names (`Ref`) or constants, in flat order.
        in_spec: how the tuple of the arguments is nested.
        out_spec: how the outputs are.
        accepts: of each input, its dtype and axes (a number, or the name of what may change), or
            the value itself where it is not a tensor.
        guards: conditions on the axes that may change.
        checked: shapes and dtypes of calls that fitted.
    """

    binding: Binding
    inputs: list[str]
    outputs: list[Any]
    in_spec: Any
    out_spec: Any
    accepts: list[Any]
    guards: list[Any] = field(default_factory=list)
    checked: set[Any] = field(default_factory=set, compare=False, repr=False)

    def __post_init__(self) -> None:
        self.plain = self.in_spec.num_nodes == 1 + self.in_spec.num_leaves

    def flat(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The caller's tensors in order.

        Raises:
            InvalidArgument: other arguments than the example's, or not nested, shaped or typed as
                they were.
        """
        values = self.binding.values(args, kwargs)
        if not self.plain:
            try:
                values = self.in_spec.flatten_up_to(tuple(values))
            except ValueError as error:
                raise InvalidArgument(
                    f"the arguments are not nested as in the example: {error}"
                ) from None
        try:
            kinds = tuple([(v.shape, v.dtype) for v in values])
        except AttributeError:  # not tensors alone: the values count
            kinds = None
        if kinds not in self.checked:
            sizes: dict[str, int] = {}
            for name, value, accepted in zip(self.inputs, values, self.accepts, strict=True):
                self._check(name, value, accepted, sizes)
            self._check_guards(sizes)
            if kinds is not None and len(self.checked) < _CHECKED:
                self.checked.add(kinds)
        return values

    def _check(self, name: str, value: Any, accepted: Any, sizes: dict[str, int]) -> None:
        if not isinstance(accepted, dict):
            if isinstance(value, Tensor) or value != accepted:
                raise InvalidArgument(f"{name}: the model was compiled for {accepted!r}")
            return
        axes = accepted["axes"]
        if not isinstance(value, Tensor) or str(value.dtype) != accepted["dtype"]:
            found = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise InvalidArgument(f"{name}: a tensor of {accepted['dtype']} is needed, not {found}")
        fits = len(axes) == value.ndim and all(
            n == (a if isinstance(a, int) else sizes.setdefault(a, n))
            for n, a in zip(value.shape, axes, strict=True)
        )
        if not fits:
            shape = ", ".join("any" if isinstance(a, str) else str(a) for a in axes)
            raise InvalidArgument(
                f"{name} has shape {list(value.shape)}, the model was compiled for [{shape}]"
            )

    def _check_guards(self, sizes: dict[str, int]) -> None:
        broken = next((g for g in self.guards if not holds(g, sizes)), None)
        if broken is None:
            return
        names = {
            axis: f"{name}.shape[{i}]"
            for name, accepted in zip(self.inputs, self.accepts, strict=True)
            if isinstance(accepted, dict)
            for i, axis in enumerate(accepted["axes"])
            if isinstance(axis, str)
        }
        raise InvalidArgument(
            f"the model was compiled for sizes with {written(broken, names)}, unlike these: for "
            "others it may compute something else; compile it with an example of such a size"
        )

    def nested(self, values: Mapping[str, Any]) -> Any:
        """Outputs as the model returns them."""
        found = [values[o.name] if isinstance(o, Ref) else o for o in self.outputs]
        return pytree.tree_unflatten(found, self.out_spec)


@dataclass
class Captured:
    """An exported model.

    Args:
        graph: of operators.
        constants: parameters and buffers by the name of their node.
        outputs: nodes, or constants.
        signature: what the caller gives and gets.
        names: of the constants in the model, by the name of their node.
    """

    graph: torch.fx.Graph
    constants: dict[str, Tensor]
    outputs: list[Any]
    signature: Signature
    names: dict[str, str]


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Captured:
    """Export a model in eval mode; every axis of its inputs may change where the model allows it.

    Raises:
        Exception: whatever torch.export raises on models that it cannot follow.
    """
    binding, given = Binding.of(model, Arguments(args, kwargs))
    args, kwargs = pytree.tree_map(_doubled(given), (given.args, given.kwargs))
    images = any(_is_image(x) for x in pytree.tree_leaves((args, kwargs)))
    try:
        program = _exported(model, args, dict(kwargs), pixels=images)
        if images and any(fixes_pixels(node) for node in program.graph.nodes):
            program = _exported(model, args, dict(kwargs), pixels=False)
    except Exception:  # torch.export raises whatever the model makes it raise
        if not images:
            raise
        program = _exported(model, args, dict(kwargs), pixels=False)
    signature = program.graph_signature
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    held = {**program.constants, **program.state_dict}
    constants = {node: held[target] for node, target in names.items()}
    output = next(n for n in program.graph.nodes if n.op == "output")
    kept = len(signature.user_outputs)
    outputs = list(output.args[0])[len(output.args[0]) - kept :]
    return Captured(
        program.graph,
        {name: tensor.detach() for name, tensor in constants.items()},
        outputs,
        Signature(
            binding,
            [s.arg.name for s in signature.input_specs if s.kind.name == "USER_INPUT"],
            [Ref(o.name) if isinstance(o, torch.fx.Node) else o for o in outputs],
            pytree.tree_flatten(tuple(given.values))[1],
            program.call_spec.out_spec,
            [_accepted(s.arg, program.graph) for s in signature.input_specs
             if s.kind.name == "USER_INPUT"],
        ),
        names,
    )  # fmt: skip


def _exported(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], pixels: bool
) -> torch.export.ExportedProgram:
    """
    Args:
        pixels: heights and widths of images may change.
    """

    def axes(x: Any) -> Any:
        return _dynamic(x, pixels)

    shapes = pytree.tree_map(axes, (args, kwargs))
    with warnings.catch_warnings(), torch.no_grad(), _keywords_named(model, kwargs):
        warnings.simplefilter("ignore")
        program = torch.export.export(
            model, args, kwargs, dynamic_shapes=_named(model, *shapes), strict=False
        )
        if any(_overwrites(node) for node in program.graph.nodes):
            program = program.run_decompositions({})  # in place becomes out of place
    if pixels:
        guards_of(program.graph)  # raises where the conditions on them cannot be kept
    return program


def _overwrites(node: torch.fx.Node) -> bool:
    """Whether an operator changes a tensor that others read, or a view of one."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return False
    changed = [
        argument
        for argument, formal in zip(node.args, schema.arguments)
        if formal.alias_info is not None and formal.alias_info.is_write
    ]
    return not node.users or any(_shared(n) for n in changed if isinstance(n, torch.fx.Node))


def _shared(node: torch.fx.Node) -> bool:
    returns = getattr(getattr(node.target, "_schema", None), "returns", None)
    own = returns is not None and all(r.alias_info is None for r in returns)
    return not own or len(node.users) > 1


def _accepted(argument: Any, graph: torch.fx.Graph) -> Any:
    node = next((n for n in graph.nodes if n.name == argument.name), None)
    value = None if node is None else node.meta.get("val")
    if not isinstance(value, Tensor):
        return getattr(argument, "value", None)
    axes = [n if isinstance(n, int) else str(n) for n in value.shape]
    return {"dtype": str(value.dtype), "axes": axes}


def _doubled(given: Arguments) -> Any:
    """A batch of one is repeated: torch.export would take its size for a constant."""
    tensors = [t for t in pytree.tree_leaves(given.values) if isinstance(t, Tensor) and t.ndim]
    single = bool(tensors) and all(t.shape[0] == 1 for t in tensors)

    def twice(x: Any) -> Any:
        return torch.cat([x, x]) if single and isinstance(x, Tensor) and x.ndim else x

    return twice


def _is_image(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.ndim == 4


def _dynamic(x: Any, pixels: bool) -> Any:
    """Batch, tokens and pixels may change; channels are what the weights expect."""
    if not isinstance(x, Tensor):
        return None
    if x.dtype == torch.bool:  # a mask
        return dict.fromkeys(range(x.ndim), Dim.AUTO)
    if pixels and _is_image(x):
        return dict.fromkeys((0, 2, 3), Dim.AUTO)
    tokens = x.ndim == 3 if x.is_floating_point() else x.ndim == 2
    return dict.fromkeys(range(min(x.ndim, 2 if tokens else 1)), Dim.AUTO)


@contextmanager
def _keywords_named(model: nn.Module, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Let forward name what `**kwargs` get: torch.export gives those no axes that change."""
    signature, own = signature_of(model), vars(model).get("forward")
    named = [p for p in signature.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    known = {p.name for p in named}
    named += [Parameter(k, Parameter.KEYWORD_ONLY) for k in kwargs if k not in known]
    if len(named) == len(known):
        yield
        return
    call = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    forward.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
    model.forward = forward
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def _named(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Shapes by the names of forward's parameters, as torch.export wants them."""
    return dict(signature_of(model).bind(*args, **kwargs).arguments)
