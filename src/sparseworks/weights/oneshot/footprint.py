"""How much memory pruning from disk takes, said before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sparseworks.core.evidence import Collector, Hessian
from sparseworks.io.blockwise import BlockwiseModel
from sparseworks.models.calls import Arguments, Batch
from sparseworks.models.views import View
from sparseworks.weights.oneshot.base import OneShot
from sparseworks.weights.oneshot.recovery import Recovery

__all__ = ["Footprint", "footprint"]


@dataclass(frozen=True)
class Footprint:
    """Bytes at most, beside what the process holds already and what the system maps of files.

    Args:
        block: the weights of the largest block.
        converted: weights outside of blocks, where they are not kept as they are on disk.
        gathering: the sums of all weights of a block, and one batch in it.
        solving: a weight in fp32 with its scores, mask and solution, and the sums of the weights of
            its block that are still to come; of the weight where that is most.
        hidden: inputs of a block for all batches, and further arguments of its call.
        kept: what the allocator does not give back at once, and code that is read on the way.
    """

    block: int
    converted: int
    gathering: int
    solving: int
    hidden: int
    kept: int = 250_000_000

    @property
    def total(self) -> int:
        working = max(self.gathering, self.solving)
        return self.block + self.converted + working + self.hidden + self.kept

    def __str__(self) -> str:
        parts = {
            "a block": self.block,
            "weights outside of blocks": self.converted,
            "its evidence": self.gathering if self.gathering >= self.solving else 0,
            "solving": self.solving if self.solving > self.gathering else 0,
            "block inputs": self.hidden,
            "else": self.kept,
        }
        said = ", ".join(f"{what} {size / 1e6:.0f}" for what, size in parts.items() if size)
        return f"at most {self.total / 1e6:.0f} MB beside the mapped files ({said})"


def footprint(
    model: BlockwiseModel,
    views: Sequence[View],
    method: OneShot,
    recovery: Recovery | None,
    batches: Sequence[Batch] | None,
    spill: bool,
    ranks: int,
) -> Footprint:
    """Of pruning these views, from shapes alone."""
    own = model.model.state_dict()

    def size(unit: str) -> int:
        return sum(own[n].numel() * own[n].element_size() for n in model.units.get(unit, ()))

    stored = {t.dtype for t in model.source.tensors.values() if t.dtype.is_floating_point}
    outside = sum(size(u) for u in model.units if u not in model.blocks)
    groups: dict[str, list[View]] = {}
    for view in views:
        groups.setdefault(model.unit_of(view.name), []).append(view)
    both = (method.collector, None if recovery is None else recovery.evidence)
    kinds: set[type[Collector]] = {k for k in both if k is not None}
    evidence = solving = 0
    for several in groups.values():  # visited in their order; sums go with the weight they are of
        sums = [_sums(v, kinds) for v in several]
        evidence = max(evidence, sum(sums))
        steps = [sum(sums[i:]) + _solving(v, Hessian in kinds) for i, v in enumerate(several)]
        solving = max(solving, *steps)
    hidden = forward = 0
    if batches is not None:
        text = model.model.config.get_text_config()
        width = getattr(text, "hidden_size", 0)
        item = model.dtype.itemsize
        inputs = [next(v for v in Arguments.of_batch(b).values if isinstance(v, Tensor))
                  for b in batches]  # fmt: skip
        tokens = [t.shape[0] * t.shape[1] if t.ndim == 2 else t.numel() for t in inputs]
        samples = [t.shape[0] for t in inputs]
        dense = 2 if method.propagate == "dense" else 1
        mine = sum(tokens) / ranks * (1 if not spill else 0)
        hidden = int(mine * width * item * dense)
        widest = max(max(v.shape[0] // v.groups, v.shape[1]) for v in views)
        heads = getattr(text, "num_attention_heads", 1)
        most = max(range(len(tokens)), key=tokens.__getitem__)
        length = tokens[most] // max(1, samples[most])
        attention = 2 * heads * length * length * samples[most] * 4
        # values between layers, and the inputs of a layer in fp32 for its evidence
        forward = tokens[most] * (widest * (4 * item + 8) + 8 * width * item) + attention
    return Footprint(
        block=max((size(u) for u in model.blocks), default=0),
        converted=outside if stored != {model.dtype} else 0,
        gathering=evidence + forward,
        solving=solving,
        hidden=hidden,
    )


def _sums(view: View, kinds: set[type[Collector]]) -> int:
    """Of each kind; weights that see the same inputs have them once, which is seen only later."""
    made = [kind(view.groups, view.shape[1], "meta") for kind in kinds]
    return sum(t.numel() * 4 for collector in made for t in collector.tensors())


def _solving(view: View, hessian: bool) -> int:
    """fp32 copies of a weight, its scores, their order (int64) and masks; of a Hessian one, which
    its factor replaces, and what that needs on the way."""
    rows, columns = view.shape
    matrix = rows * columns
    return matrix * 22 + (columns * columns * 4 * 9 // 4 if hessian else 0)
