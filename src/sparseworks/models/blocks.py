"""The repeated blocks of a model, found by looking at one forward pass.

A *stack* is a ModuleList or Sequential whose children run once each, in order, every child fed
with what the one before returned: the layers of a decoder or encoder, the stages of a CNN. Whether
that holds is observed, not guessed from names. Weights outside of stacks are stages of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sparseworks.models.calls import Batch, call
from sparseworks.models.tap import EvidenceTap
from sparseworks.models.views import View

__all__ = ["Stack", "Stage", "find_stages", "first_tensor", "replace_first"]


@dataclass(frozen=True)
class Stack:
    """Blocks that run one after the other.

    Args:
        name: of the container.
        blocks: its children that hold weights to prune, and those between them.
        views: the views of each block.
        same_arguments: every block gets the same further arguments (masks, positions).
        last: of each block the view whose product came after those of all its others, once; None
            where there was none such.
    """

    name: str
    blocks: tuple[nn.Module, ...]
    names: tuple[str, ...]
    views: tuple[tuple[View, ...], ...]
    same_arguments: bool
    last: tuple[View | None, ...]


Stage = Stack | View
_START = "start of "


def first_tensor(value: Any) -> Tensor | None:
    """The hidden states in a block's arguments or output: its first tensor."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        named = value.get("hidden_states")
        if isinstance(named, Tensor):
            return named
        return next((v for v in value.values() if isinstance(v, Tensor)), None)
    if isinstance(value, (tuple, list)):
        return next((v for v in value if isinstance(v, Tensor)), None)
    return None


def replace_first(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a block with other hidden states."""
    for i, value in enumerate(args):
        if isinstance(value, Tensor):
            return (*args[:i], hidden, *args[i + 1 :]), dict(kwargs)
    key = "hidden_states" if isinstance(kwargs.get("hidden_states"), Tensor) else None
    key = key or next(k for k, v in kwargs.items() if isinstance(v, Tensor))
    return args, {**kwargs, key: hidden}


@dataclass
class _Observed:
    """What one container's children did in the observed pass."""

    name: str
    children: list[tuple[str, nn.Module]]
    order: list[int] = field(default_factory=list)
    inputs: list[Tensor | None] = field(default_factory=list)
    outputs: list[Tensor | None] = field(default_factory=list)
    arguments: list[tuple[Any, ...]] = field(default_factory=list)

    @property
    def chained(self) -> bool:
        if self.order != list(range(len(self.children))) or None in self.inputs:
            return False
        pairs = zip(self.outputs[:-1], self.inputs[1:])
        return all(
            o is not None and i is not None and o.data_ptr() == i.data_ptr() and o.shape == i.shape
            for o, i in pairs
        )

    @property
    def same_arguments(self) -> bool:
        return all(
            len(a) == len(self.arguments[0])
            and all(x is y or _equal_plain(x, y) for x, y in zip(a, self.arguments[0]))
            for a in self.arguments
        )


def _equal_plain(a: Any, b: Any) -> bool:
    plain = (bool, int, float, str, type(None))
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)) and len(a) == len(b):
        return all(x is y or _equal_plain(x, y) for x, y in zip(a, b))
    return isinstance(a, plain) and isinstance(b, plain) and a == b


def _others(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """All arguments but the hidden states."""
    hidden = first_tensor(args) if first_tensor(args) is not None else first_tensor(kwargs)
    rest = [a for a in args if a is not hidden]
    return (*rest, *(v for _, v in sorted(kwargs.items()) if v is not hidden))


def _candidates(model: nn.Module, views: Iterable[View]) -> list[_Observed]:
    """Containers with two or more composite children that hold weights, outermost first."""
    owners = {v.module_name for v in views}

    def holds(prefix: str) -> bool:
        return any(o == prefix or o.startswith(prefix + ".") for o in owners)

    found = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        children = [(f"{name}.{k}" if name else k, c) for k, c in module.named_children()]
        composite = [n for n, c in children if holds(n) and any(True for _ in c.children())]
        if len(composite) >= 2:
            found.append(_Observed(name, children))
    return found


def find_stages(model: nn.Module, views: Iterable[View], batch: Batch) -> list[Stage]:
    """Stacks and single weights in the order in which one forward pass uses them.

    Call it inside `calibration_mode`. Weights that the pass does not use are left out.
    """
    views = list(views)
    candidates = _candidates(model, views)
    first_use: dict[str, int] = {}
    uses: list[str] = []

    def note(view: View, inputs: Tensor, groups: range, outputs: Tensor | None) -> None:
        first_use.setdefault(view.name, len(first_use))
        uses.append(view.name)

    def started(seen: _Observed) -> None:
        first_use.setdefault(_START + seen.name, len(first_use))

    handles: list[Any] = []
    for seen in candidates:
        for position, (_, child) in enumerate(seen.children):
            handles += _observe(seen, position, child, started)
    try:
        with EvidenceTap(views, note):
            call(model, batch)
    finally:
        for handle in handles:
            handle.remove()

    chosen = _choose([c for c in candidates if c.chained], views)
    staged: list[tuple[int, Stage]] = []
    inside: set[str] = set()
    for seen in chosen:
        per_block = [
            tuple(v for v in views if _within(v.module_name, name)) for name, _ in seen.children
        ]
        names = {v.name for block in per_block for v in block}
        inside |= names
        stack = Stack(
            seen.name,
            tuple(c for _, c in seen.children),
            tuple(n for n, _ in seen.children),
            tuple(per_block),
            seen.same_arguments,
            tuple(_last(own, uses) for own in per_block),
        )
        staged.append((first_use[_START + seen.name], stack))
    staged += [
        (first_use[v.name], v) for v in views if v.name in first_use and v.name not in inside
    ]
    return [stage for _, stage in sorted(staged, key=lambda pair: pair[0])]


def _last(views: Sequence[View], uses: Sequence[str]) -> View | None:
    """The view of a block that was used after all others, which were all used, and once."""
    counts = Counter(uses)
    named = {v.name: v for v in views}
    latest = next((named[n] for n in reversed(uses) if n in named), None)
    whole = latest is not None and latest.groups == 1 and all(counts[n] for n in named)
    return latest if latest is not None and whole and counts[latest.name] == 1 else None


def _observe(
    seen: _Observed, position: int, child: nn.Module, started: Callable[[_Observed], None]
) -> Iterator[Any]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        started(seen)
        seen.order.append(position)
        hidden = first_tensor(args)
        seen.inputs.append(hidden if hidden is not None else first_tensor(kwargs))
        seen.arguments.append(_others(args, kwargs))

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.outputs.append(first_tensor(output))

    yield child.register_forward_pre_hook(before, with_kwargs=True)
    yield child.register_forward_hook(after, with_kwargs=True)


def _within(name: str, parent: str) -> bool:
    return name == parent or name.startswith(parent + ".")


def _choose(chained: list[_Observed], views: list[View]) -> list[_Observed]:
    """Of nested stacks the inner ones where they hold nearly all of the outer one's weights.

    A stage of a hierarchical model (Swin) is such a case: its blocks are what repeats.
    """

    def weight(prefix: str) -> int:
        return sum(v.parameter.numel() for v in views if _within(v.module_name, prefix))

    chosen: list[_Observed] = []
    for seen in chained:
        if any(c is seen or not c.name or _within(seen.name, c.name) for c in chosen):
            continue
        prefix = seen.name + "." if seen.name else ""
        inner = [c for c in chained if c is not seen and c.name.startswith(prefix)]
        outer_weight = weight(seen.name) if seen.name else sum(v.parameter.numel() for v in views)
        repeated = [c for c in inner if len({type(m) for _, m in c.children}) == 1]
        if repeated and sum(weight(c.name) for c in repeated) >= 0.8 * outer_weight:
            chosen += repeated
        else:
            chosen.append(seen)
    return chosen
