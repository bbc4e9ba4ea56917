"""A piece of a compiled model's graph: native programs, one for every size that was met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from sparseworks.core.errors import InvalidArgument
from sparseworks.engine.ir import Attention, Op
from sparseworks.engine.lowering import Piece
from sparseworks.engine.programs import Instance, build
from sparseworks.engine.recent import Recent
from sparseworks.engine.shared import Shared

__all__ = ["Part", "check_shape"]

_LANES = 16
_ALONE = 500_000  # multiply-adds below which waking a second thread takes longer than the work
_TOKENS = 128  # rows of a program whose rows do not depend on each other


@dataclass(eq=False)
class Part:
    """A piece of the graph as native programs, one for every size that was met.

    Args:
        kind: of its values, "image" or "tokens".
        ops: in order.
        inputs: names of what it reads.
        masks: names of attention masks among what it reads.
        biases: those of them that differ from head to head.
        outputs: names of what it makes.
        threads: of the native code.
        shared: what the programs of all sizes have in common.
        recent: the programs, which other parts of a model may keep theirs in.
        last: the program that ran last.
    """

    kind: str
    ops: Sequence[Op]
    inputs: list[str]
    masks: list[str]
    outputs: list[str]
    threads: int
    biases: list[str] = field(default_factory=list)
    shared: Shared = field(default_factory=Shared)
    recent: Recent = field(default_factory=Recent)
    last: Instance | None = None

    @classmethod
    def of(cls, piece: Piece, threads: int) -> Part:
        inputs, masks, outputs = map(list, (piece.inputs, piece.masks, piece.outputs))
        return cls(piece.kind, piece.ops, inputs, masks, outputs, threads, list(piece.biases))

    @property
    def attends(self) -> bool:
        return any(isinstance(op, Attention) for op in self.ops)

    def instance(self, sizes: Mapping[str, tuple[int, ...]], lanes: int) -> Instance:
        def make() -> tuple[Instance, int]:
            made = build(self.ops, sizes, lanes, self.threads, self.shared)
            return made, made.bytes

        self.last = found = self.recent.get((id(self), lanes, *sizes.values()), make)
        return found  # type: ignore[no-any-return]

    def run(
        self,
        given: dict[str, Tensor],
        masks: dict[str, Tensor],
        into: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> dict[str, Tensor]:
        """The outputs by name; of rows that do not depend on each other none is written `into`."""
        given = {n: t if t.is_contiguous() else t.contiguous() for n, t in given.items()}
        if self.kind == "image":
            return self._images(given, into)
        shapes = {t.shape[:-1] for t in given.values()}
        if self.attends or len(shapes) > 1:
            read = {n: _bias(m) if n in self.biases else _mask(m) for n, m in masks.items()}
            return self._tokens(given, read, into)
        (shape,) = shapes
        rows = {n: t.view(-1, t.shape[-1]) for n, t in given.items()}
        count = shape.numel()
        tiles = count // _TOKENS
        done = []
        if tiles:
            head = {n: t[: tiles * _TOKENS].view(tiles, _TOKENS, -1) for n, t in rows.items()}
            done.append(self._tokens(head, {}, {}))
        if count > tiles * _TOKENS:
            tail = {n: t[tiles * _TOKENS :][None] for n, t in rows.items()}
            done.append(self._tokens(tail, {}, {}))
        joined = {
            name: torch.cat([d[name].flatten(0, 1) for d in done])
            if len(done) > 1
            else done[0][name]
            for name in done[0]
        }
        return {name: t.view(*shape, t.shape[-1]) for name, t in joined.items()}

    def _tokens(
        self, given: dict[str, Tensor], masks: dict[str, Tensor], into: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        sizes = {name: (t.shape[1],) for name, t in given.items()}
        made = self.instance(sizes, 1)
        entries = max(t.shape[0] for t in given.values())  # some inputs are the same for all
        return self._call(made, given | masks, entries, into)

    def _images(self, given: dict[str, Tensor], into: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sixteen at once where there are enough, the others one by one."""
        entries = next(iter(given.values())).shape[0]
        sizes = {n: tuple(t.shape[2:]) or (1, 1) for n, t in given.items()}
        together = entries if entries % _LANES > _LANES // 2 else entries // _LANES * _LANES
        if together == 0 or together == entries:
            lanes = _LANES if together else 1
            return self._call(self.instance(sizes, lanes), given, entries, into)
        many, few = self.instance(sizes, _LANES), self.instance(sizes, 1)
        outputs = _outputs(many, entries, into)
        for made, part in ((many, slice(None, together)), (few, slice(together, None))):
            self._into(
                made,
                {n: t[part] for n, t in given.items()},
                {n: t[part] for n, t in outputs.items()},
            )
        return outputs

    def _call(
        self, made: Instance, given: dict[str, Tensor], entries: int, into: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        outputs = _outputs(made, entries, into)
        self._into(made, given, outputs)
        return outputs

    def columns(self, x: Tensor, channels: int) -> Tensor:
        """Of a part that takes the columns of a matrix: `[inputs, n]` to `[channels, n]`."""
        count = x.shape[1]
        tile = min(count, _TOKENS)
        made = self.instance({self.inputs[0]: (tile,)}, 1)
        y = torch.empty(channels, count)
        self._run(made, [x.contiguous(), y], -(-count // tile))
        return y

    def _into(
        self, made: Instance, given: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> None:
        tensors = [given[n] if n in given else outputs[n] for n in made.tensors]
        self._run(made, tensors, next(iter(outputs.values())).shape[0])

    def _run(self, made: Instance, tensors: list[Tensor], entries: int) -> None:
        alone = made.work * entries < _ALONE * made.lanes
        made.native.run(tensors, entries, 1 if alone else self.threads)


def _outputs(made: Instance, entries: int, into: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Memory of the outputs: what the caller gave, checked, or new."""
    found = {}
    for name, shape in made.shapes.items():
        found[name] = into[name] if name in into else torch.empty(entries, *shape)
        if name in into:
            check_shape(into[name], torch.Size((entries, *shape)))
    return found


def check_shape(out: Tensor, shape: torch.Size) -> None:
    """Refuse an `out=` of another shape."""
    if out.shape != shape:
        raise InvalidArgument(f"out= is {list(out.shape)}, the result {list(shape)}")


def _bias(bias: Tensor) -> Tensor:
    """What is added to scores [batch or 1, heads, queries, keys] as the native code reads it."""
    return bias.float().contiguous()


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
