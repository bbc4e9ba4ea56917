"""A compiled model: native programs, and torch for what no program takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from sparseworks.core.errors import InvalidArgument
from sparseworks.engine.experts import Experts, with_experts
from sparseworks.engine.graph import Captured, Signature
from sparseworks.engine.guards import guards_of
from sparseworks.engine.ir import Precision, Product
from sparseworks.engine.lowering import Piece, lower
from sparseworks.engine.measuring import one_thread
from sparseworks.engine.origin import Origin
from sparseworks.engine.part import Part, check_shape
from sparseworks.engine.recent import LIMIT, Recent
from sparseworks.engine.steps import Call, Ref, of_node

__all__ = ["Plan", "make_plan"]

# operators that are worth more than one thread of torch
_HEAVY = ("conv", "linear", "mm", "matmul", "einsum", "attention", "sort")
_HELD = 100  # bytes of Python's about a value
_INT8_COLUMNS = (2**31 - 1) // (255 * 127)  # whose sum cannot overflow


class Plan:
    """Runs a model: native programs, and torch for what lies between.

    What depends on the sizes of the inputs alone (programs, positions, masks of ones) is made once
    for each set of sizes. Weights are packed once and working memory is had once for all of them.

    Args:
        signature: what the caller gives and gets.
        steps: in order.
        constants: tensors that torch's operators read, by name.
        cache_bytes: of what is kept for sizes that were met; least recently used ones go first.
    """

    def __init__(
        self,
        signature: Signature,
        steps: list[Call | Part],
        constants: dict[str, Tensor],
        cache_bytes: int = LIMIT,
    ) -> None:
        threads = next(s.threads for s in steps if isinstance(s, Part))
        steps = with_experts(steps, constants, threads)
        self.signature, self.steps, self.constants = signature, steps, constants
        calls = [s for s in steps if isinstance(s, Call)]
        fixed = _of_sizes(calls, constants, signature)
        # torch's threads would spin beside ours for nothing
        often = [c.target for c in calls if c.name not in fixed]
        self.light = not any(any(h in target for h in _HEAVY) for target in often)
        self.first = [c for c in calls if c.name in fixed]
        self.rest = [s for s in steps if not (isinstance(s, Call) and s.name in fixed)]
        self.frees = _frees(self.rest, signature)
        self.read = {o.name for o in signature.outputs if isinstance(o, Ref)}
        self.read |= {name for s in self.rest for name in _reads(s)}
        # most for programs; the rest is large sometimes, and quickly made
        self.cache_bytes = cache_bytes
        self.of_sizes = Recent(cache_bytes // 4)
        self.recent = Recent(cache_bytes - self.of_sizes.limit)
        for part in self.parts:
            part.recent, part.shared.arena = self.recent, self.parts[0].shared.arena
            part.shared.prepare(part.ops)
        for experts in (s for s in steps if isinstance(s, Experts)):
            for expert in experts.experts:  # their programs are many and small, and stay
                expert.rows.shared.arena = self.parts[0].shared.arena
                expert.rows.shared.prepare(expert.rows.ops)
        self.__signature__ = signature.binding.signature
        self.own_out = "out" in self.__signature__.parameters
        self.origin: Origin | None = None  # warns where the model's weights have changed

    @property
    def parts(self) -> list[Part]:
        return [s for s in self.steps if isinstance(s, Part)]

    def __call__(self, *args: Any, out: Tensor | None = None, **kwargs: Any) -> Any:
        if self.origin is not None:
            self.origin.check()
        if self.own_out and out is not None:
            kwargs["out"], out = out, None
        flat = self.signature.flat(args, kwargs)
        given = dict(zip(self.signature.inputs, flat, strict=True))
        into = {} if out is None else self._into(out, flat)
        # no decorator: it would pass the arguments on once more
        with torch.no_grad(), one_thread() if self.light else nullcontext():
            values = {**self._sized(given), **given}
            for step, free in zip(self.rest, self.frees, strict=True):
                if isinstance(step, Call):
                    values[step.name] = step(values)
                else:
                    read = {name: values[name] for name in step.inputs}
                    masks = {name: values[name] for name in step.masks}
                    values.update(step.run(read, masks, into))
                for name in free:
                    del values[name]
            for name, tensor in into.items():
                if values[name] is not tensor:
                    check_shape(tensor, values[name].shape)
                    values[name] = tensor.copy_(values[name])
        return self.signature.nested(values)

    def __deepcopy__(self, memo: Any) -> Plan:
        return self  # nothing of a plan changes, and calls may share it

    def _into(self, out: Tensor, given: Sequence[Any]) -> dict[str, Tensor]:
        """The one output of the model by its name, with memory that can be written."""
        names = {o.name for o in self.signature.outputs if isinstance(o, Ref)}
        if len(names) != 1:
            raise InvalidArgument(f"out= is for models that return one tensor, not {len(names)}")
        plain = out.dtype == torch.float32 and out.device.type == "cpu" and out.is_contiguous()
        held = {t.untyped_storage().data_ptr() for t in given if isinstance(t, Tensor)}
        if not plain or out.requires_grad or out.untyped_storage().data_ptr() in held:
            raise InvalidArgument(
                "out= is contiguous fp32 on the CPU without gradient, apart from the inputs"
            )
        return {names.pop(): out}

    def _sized(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Constants, and what depends on sizes alone."""

        def make() -> tuple[dict[str, Any], int]:
            values = {**self.constants, **given}
            held = {_memory(t) for t in values.values() if isinstance(t, Tensor)}
            for step in self.first:
                values[step.name] = step(values)
            kept = {n: v for n, v in values.items() if n in self.read and n not in given}
            made = {_memory(t) for t in kept.values() if isinstance(t, Tensor)} - held
            return kept, _HELD * len(kept) + sum(count for _, count in made)

        shapes = tuple([t.shape for t in given.values() if isinstance(t, Tensor)])
        return self.of_sizes.get(shapes, make)  # type: ignore[no-any-return]


def _memory(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor's memory begins, and its bytes."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _of_sizes(
    calls: Sequence[Call], constants: Mapping[str, Tensor], signature: Signature
) -> set[str]:
    """Steps whose results follow from the sizes of the inputs."""
    names = [c.target.split(".")[-2] if c.target.count(".") > 1 else "" for c in calls]
    if any(n.endswith("_") and not n.endswith("__") for n in names):
        return set()  # an operator in place might change what is kept
    outputs = {o.name for o in signature.outputs if isinstance(o, Ref)}
    found: set[str] = set()
    for call in calls:
        size = call.target == "aten.sym_size.int"
        known = all(r.name in found or r.name in constants for r in call.reads())
        random = any(word in call.target for word in ("rand", "dropout", "bernoulli", "normal"))
        sized = known or (size and call.args[0].name in signature.inputs)
        if sized and not random and call.name not in outputs:  # a caller may change an output
            found.add(call.name)
    return found


def _reads(step: Call | Part) -> list[str]:
    """Names of what a step reads."""
    if isinstance(step, Call):
        return [r.name for r in step.reads()]
    return [*step.inputs, *step.masks]


def _frees(steps: Sequence[Call | Part], signature: Signature) -> list[list[str]]:
    """What nothing reads any more after each step."""
    kept = {o.name for o in signature.outputs if isinstance(o, Ref)}
    frees: list[list[str]] = []
    for step in reversed(steps):
        makes = [step.name] if isinstance(step, Call) else step.outputs
        names = {*_reads(step), *makes}
        frees.append(sorted(names - kept))
        kept |= names
    return frees[::-1]


def make_plan(
    captured: Captured,
    threads: int,
    precision: Precision = Precision.FP32,
    cache_bytes: int = LIMIT,
) -> Plan | None:
    """A plan of a captured model, or None where there is nothing that a program could take.

    Args:
        precision: of products, where they can have it; all else is fp32.
        cache_bytes: of what is kept for sizes that were met.
    """
    pieces = lower(captured.graph, captured.constants)
    if not pieces:
        return None
    for op in (op for piece in pieces for op in piece.ops if isinstance(op, Product)):
        op.name = captured.names.get(op.name, op.name)
        op.precision = precision if _fits(op, precision) else Precision.FP32
    made: dict[str, tuple[Piece, Part]] = {}
    for piece in pieces:
        part = Part.of(piece, threads)
        made.update(dict.fromkeys(piece.outputs, (piece, part)))
    steps = _ordered(captured.outputs, made)
    # what the rules took for granted counts as well
    signature = replace(captured.signature, guards=_guards(captured.graph), checked=set())
    needed = {r.name for s in steps if isinstance(s, Call) for r in s.reads()}
    needed |= {n for s in steps if isinstance(s, Part) for n in (*s.inputs, *s.masks)}
    needed |= {o.name for o in signature.outputs if isinstance(o, Ref)}
    constants = {n: t for n, t in captured.constants.items() if n in needed}
    plan = Plan(signature, steps, constants, cache_bytes)
    for experts in (s for s in plan.steps if isinstance(s, Experts)):
        experts.bank = captured.names.get(experts.bank, experts.bank)
    return plan


def _guards(graph: torch.fx.Graph) -> list[Any]:
    with suppress(NotImplementedError):  # of sizes of sequences: the operators will tell
        return guards_of(graph)
    return []


def _fits(op: Product, precision: Precision) -> bool:
    """Whether a product can have a precision: no copy, full words, and sums that int32 can hold."""
    channels = op.weight.shape[1]
    if op.name == "" or (op.groups > 1 and channels % precision):
        return False
    return precision != Precision.INT8 or (channels >= 3 and op.weight[0].numel() <= _INT8_COLUMNS)


def _ordered(outputs: Sequence[Any], made: Mapping[str, tuple[Piece, Part]]) -> list[Call | Part]:
    """Torch's operators and the programs, each after what it needs; what nobody needs is out."""
    order: list[Call | Part] = []
    seen: set[Any] = set()
    stack: list[tuple[Node, bool]] = [(n, False) for n in reversed(outputs) if isinstance(n, Node)]
    while stack:
        node, ready = stack.pop()
        piece, part = made.get(node.name, (None, None))
        thing = node if part is None else part
        if ready:
            order.append(of_node(node) if part is None else part)
            continue
        if thing in seen or (part is None and node.op != "call_function"):
            continue
        seen.add(thing)
        before = (
            node.all_input_nodes
            if piece is None
            else [*piece.inputs.values(), *piece.masks.values()]
        )
        stack.append((node, True))
        stack.extend((n, False) for n in before)
    return order
