"""A compiled model: native programs, and torch for what no program takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from sparseworks.engine.graph import Captured
from sparseworks.engine.lowering import Piece, lower
from sparseworks.engine.programs import Instance, build

__all__ = ["Plan", "plan"]

_LANES = 16
_TOKENS = 128  # rows of a program whose rows do not depend on each other


@dataclass(eq=False)
class Part:
    """A piece of the graph as native programs, one for every size that was met."""

    piece: Piece
    threads: int
    instances: dict[Any, Instance] = field(default_factory=dict)

    def instance(self, sizes: dict[str, tuple[int, ...]], lanes: int) -> Instance:
        key = (lanes, *sizes.values())
        if key not in self.instances:
            self.instances[key] = build(self.piece.ops, sizes, lanes, self.threads)
        return self.instances[key]

    def run(self, given: dict[str, Tensor], masks: dict[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by name."""
        given = {name: t.contiguous() for name, t in given.items()}
        if self.piece.kind == "image":
            return self._images(given)
        if self.piece.attends:
            return self._tokens(given, {n: _mask(m) for n, m in masks.items()})
        shape = next(iter(given.values())).shape[:-1]
        rows = {n: t.view(-1, t.shape[-1]) for n, t in given.items()}
        count = shape.numel()
        tiles = count // _TOKENS
        done = []
        if tiles:
            head = {n: t[: tiles * _TOKENS].view(tiles, _TOKENS, -1) for n, t in rows.items()}
            done.append(self._tokens(head, {}))
        if count > tiles * _TOKENS:
            done.append(self._tokens({n: t[tiles * _TOKENS :][None] for n, t in rows.items()}, {}))
        joined = {
            name: torch.cat([d[name].flatten(0, 1) for d in done])
            if len(done) > 1
            else done[0][name]
            for name in done[0]
        }
        return {name: t.view(*shape, t.shape[-1]) for name, t in joined.items()}

    def _tokens(self, given: dict[str, Tensor], masks: dict[str, Tensor]) -> dict[str, Tensor]:
        sizes = {name: (t.shape[1],) for name, t in given.items()}
        made = self.instance(sizes, 1)
        entries = next(iter(given.values())).shape[0]
        return self._call(made, given | masks, entries)

    def _images(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sixteen at once where there are enough, the others one by one."""
        entries = next(iter(given.values())).shape[0]
        sizes = {n: tuple(t.shape[2:]) or (1, 1) for n, t in given.items()}
        together = entries if entries % _LANES > _LANES // 2 else entries // _LANES * _LANES
        if together == 0 or together == entries:
            lanes = _LANES if together else 1
            return self._call(self.instance(sizes, lanes), given, entries)
        many, few = self.instance(sizes, _LANES), self.instance(sizes, 1)
        outputs = {n: torch.empty(entries, *shape) for n, shape in many.shapes.items()}
        for made, part in ((many, slice(None, together)), (few, slice(together, None))):
            self._into(
                made,
                {n: t[part] for n, t in given.items()},
                {n: t[part] for n, t in outputs.items()},
            )
        return outputs

    def _call(self, made: Instance, given: dict[str, Tensor], entries: int) -> dict[str, Tensor]:
        outputs = {n: torch.empty(entries, *shape) for n, shape in made.shapes.items()}
        self._into(made, given, outputs)
        return outputs

    def _into(
        self, made: Instance, given: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> None:
        tensors = [given[n] if n in given else outputs[n] for n in made.tensors]
        entries = next(iter(outputs.values())).shape[0]
        made.native.run(tensors, entries, self.threads)


def _mask(mask: Tensor) -> Tensor:
    """A mask of attention [batch, 1, queries, keys] as the native code reads it.

    Returns:
        Nothing where it masks nothing; `[batch, keys]` where all queries have the same; else
        `[batch, keys, queries]`, queries rounded up to 16.
    """
    if mask.dtype == torch.bool:
        if bool(mask.all()):
            return torch.empty(0)
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    elif not bool(mask.any()):
        return torch.empty(0)
    mask = mask[:, 0].float()
    if bool((mask == mask[:, :1]).all()):
        return mask[:, 0].contiguous()
    queries = mask.shape[1]
    return torch.nn.functional.pad(mask.transpose(1, 2), (0, -queries % 16)).contiguous()


@dataclass(eq=False)
class _Step:
    """One operator that torch runs."""

    node: Node
    frees: list[str] = field(default_factory=list)


class Plan:
    """Runs a captured model.

    Args:
        captured: the graph.
        threads: of the native programs.
    """

    def __init__(self, captured: Captured, threads: int) -> None:
        self.captured = captured
        self.parts = [Part(p, threads) for p in lower(captured.graph, captured.constants)]
        self.steps = self._order()

    def _order(self) -> list[_Step | Part]:
        """Torch's operators and the programs, each after what it needs; what nobody needs is out."""
        made = {name: part for part in self.parts for name in part.piece.outputs}
        order: list[_Step | Part] = []
        seen: set[Any] = set()

        def need(node: Node) -> None:
            stack: list[tuple[Any, bool]] = [(node, False)]
            while stack:
                current, ready = stack.pop()
                thing: Any = current
                if isinstance(current, Node):
                    thing = made.get(current.name, current)
                if thing in seen and not ready:
                    continue
                if ready:
                    order.append(_Step(thing) if isinstance(thing, Node) else thing)
                    continue
                seen.add(thing)
                if isinstance(thing, Node):
                    if thing.op != "call_function":
                        continue
                    before = thing.all_input_nodes
                else:
                    before = [*thing.piece.inputs.values(), *thing.piece.masks.values()]
                stack.append((thing, True))
                stack.extend((n, False) for n in before)

        for output in self.captured.outputs:
            if isinstance(output, Node):
                need(output)
        return order

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        captured = self.captured
        values: dict[str, Any] = dict(captured.constants)
        values.update(zip(captured.inputs, captured.flat(args, kwargs), strict=True))

        def read(node: Node) -> Any:
            return values[node.name]

        for step in self.steps:
            if isinstance(step, _Step):
                node = step.node
                target: Callable[..., Any] = node.target  # type: ignore[assignment]
                values[node.name] = target(*map_arg(node.args, read), **map_arg(node.kwargs, read))
            else:
                given = {name: values[name] for name in step.piece.inputs}
                masks = {name: values[name] for name in step.piece.masks}
                values.update(step.run(given, masks))
        found = [values[o.name] if isinstance(o, Node) else o for o in captured.outputs]
        return captured.nested(found)


def plan(captured: Captured, threads: int) -> Plan | None:
    """A plan, or None where there is nothing that a native program could take."""
    made = Plan(captured, threads)
    return made if made.parts else None
