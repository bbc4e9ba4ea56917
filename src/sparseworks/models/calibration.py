"""Calibration block by block: evidence for each weight on inputs that already went through the
pruned weights before it.

Peak memory is the model where it lives, one block with its evidence, and the inputs of one block
for every batch (`hidden_bytes` says how large they are; `spill` puts them on disk).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparseworks.core.errors import DataError
from sparseworks.core.evidence import Collector
from sparseworks.core.types import Progress
from sparseworks.models.blocks import Stack, find_stages
from sparseworks.models.calls import Batch, call, few_tokens, first_sample, move, token_mask
from sparseworks.models.modes import hooked
from sparseworks.models.ranks import Evidence, Ranks
from sparseworks.models.recurrence import products_shown
from sparseworks.models.residence import Residence
from sparseworks.models.stacked import capture, device_of, placed, run_block
from sparseworks.models.tap import EvidenceTap, calibration_mode
from sparseworks.models.views import View

__all__ = ["Calibration", "collect", "replay", "stream"]

_FEW = 32  # tokens

MakeCollectors = Callable[[View, torch.device], Sequence[Collector]]
Visit = Callable[[View, Sequence[Collector]], None]
Settle = Callable[[Sequence[View], Mapping[str, int]], None]


@dataclass
class Calibration:
    """How evidence is streamed.

    Args:
        batches: re-iterable calibration batches.
        device: where blocks are computed; None: where they live.
        propagate: feed a block with the outputs of the "pruned" blocks before it, or "dense".
        spill: folder for the block inputs, instead of memory.
        progress: called with (done, total, what).
        ranks: processes that share the batches.
        home: where the weights are while others are at work.
    """

    batches: Sequence[Batch]
    device: torch.device | str | None = None
    propagate: Literal["pruned", "dense"] = "pruned"
    spill: str | os.PathLike[str] | None = None
    progress: Progress | None = None
    ranks: Ranks = field(default_factory=Ranks)
    home: Residence = field(default_factory=Residence)
    hidden_bytes: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if isinstance(self.batches, Iterator):
            self.batches = list(self.batches)
        if len(self.batches) == 0:
            raise DataError("the calibration data is empty: at least one batch is needed")


def collect(
    model: nn.Module, views: Sequence[View], calibration: Calibration, make: MakeCollectors
) -> Mapping[str, Sequence[Collector]]:
    """Evidence of all views at once, on the model as it is."""
    with calibration_mode(model, shown=False):
        return _replay(model, views, calibration, make, everywhere=True).collectors


def replay(
    model: nn.Module,
    batches: Iterable[Batch],
    hooks: Iterable[Any],
    padding: list[Tensor | None] | None = None,
) -> None:
    """Run batches through a model whose modules have hooks, and take those off in the end.

    Args:
        hooks: their handles, as `hooked` takes them.
        padding: a list that holds, while a batch runs, the mask of its real tokens, or None.
    """
    with hooked(hooks), calibration_mode(model):
        device = device_of(model)
        for batch in batches:
            if padding is not None:
                padding[:] = [token_mask(batch)]
            call(model, _on(batch, device))


def stream(
    model: nn.Module,
    views: Sequence[View],
    calibration: Calibration,
    make: MakeCollectors,
    visit: Visit,
    settle: Settle = lambda views, owner: None,
) -> list[str]:
    """Visit every view once, in execution order, with evidence from the inputs it really sees.

    `visit` may change the weight; the inputs of later blocks are computed through the change.
    Of several ranks each visits the views whose evidence it has; then `settle` is called on all of
    them with the views of a block and the rank that visited each, to make their weights equal.

    Returns:
        Names of the views that the calibration data did not use.
    """
    home = calibration.home
    with calibration_mode(model, shown=False):  # a mode would see all calls in `visit` too
        example = calibration.batches[0]
        if home.lazy:  # for the order of its products alone
            example = few_tokens(first_sample(example), _FEW)
        first = _on(example, device_of(model))
        with products_shown():
            stages = find_stages(model, views, first)
        done = 0
        for stage in stages:
            if isinstance(stage, Stack):
                for finished in _stream_stack(model, stage, calibration, make, visit, settle):
                    done += finished
                    size = f" (block inputs: {calibration.hidden_bytes / 1e6:.0f} MB)"
                    _report(calibration, done, len(views), stage.name + size)
            else:
                with home.resident(stage.module_name, stage.module):
                    if not home.finished(stage.module_name):
                        found = _replay(model, [stage], calibration, make)
                        _visit([stage], found, visit, settle)
                done += 1
                _report(calibration, done, len(views), stage.name)
    used = {v.name for s in stages for v in (_all_views(s) if isinstance(s, Stack) else [s])}
    return [v.name for v in views if v.name not in used]


def _all_views(stack: Stack) -> list[View]:
    return [v for block in stack.views for v in block]


def _visit(views: Sequence[View], found: Evidence, visit: Visit, settle: Settle) -> None:
    collectors = dict(found.collectors)
    found.collectors.clear()  # each goes when the last weight that needs it is visited
    for view in views:
        if found.owned(view):
            visit(view, collectors.pop(view.name))
    settle(views, found.owner)


def _report(calibration: Calibration, done: int, total: int, what: str) -> None:
    if calibration.progress is not None:
        calibration.progress(done, total, what)


def _on(batch: Batch, device: torch.device) -> Batch:
    moved: Batch = move(batch, device)
    return moved


def _gather(
    views: Sequence[View],
    calibration: Calibration,
    make: MakeCollectors,
    run: Callable[[int], object],
    mask: Callable[[int], Tensor | None],
    everywhere: bool = False,
    idle: View | None = None,
) -> Evidence:
    """Evidence of some views, which are at hand.

    Args:
        run: computes a batch.
        mask: of the real tokens of a batch.
        idle: the view whose product comes last, where nothing else needs that.
    """
    if calibration.ranks.size > 1:  # which go through all batches together
        idle = None
    share = True
    while True:
        found = Evidence(
            views, make, calibration.batches, calibration.ranks, everywhere, share=share
        )
        with products_shown(), EvidenceTap(views, found.listen(), idle) as tap:
            for i in calibration.ranks.rounds(len(calibration.batches)):
                if i is not None:
                    tap.begin(mask(i))
                    run(i)
                found.end_of_round()
                if found.broken or tap.misled:
                    break
        if not (found.broken or tap.misled):
            break
        share, idle = share and not found.broken, None
    found.finish()
    _check({v.name: found.collectors[v.name] for v in views if found.owned(v)})
    return found


def _replay(
    model: nn.Module,
    views: Sequence[View],
    calibration: Calibration,
    make: MakeCollectors,
    everywhere: bool = False,
) -> Evidence:
    """Evidence of some views by full forward passes."""
    device = device_of(model)
    batches = calibration.batches

    def run(i: int) -> None:
        call(model, _on(batches[i], device))

    return _gather(views, calibration, make, run, lambda i: token_mask(batches[i]), everywhere)


def _check(collectors: Mapping[str, Sequence[Collector]]) -> None:
    for name, several in collectors.items():
        for collector in several:
            collector.check(name)


def _stream_stack(
    model: nn.Module,
    stack: Stack,
    calibration: Calibration,
    make: MakeCollectors,
    visit: Visit,
    settle: Settle,
) -> Iterator[int]:
    """Evidence and visits block by block; yields the number of views finished."""
    home = calibration.home
    own = calibration.ranks.own(len(calibration.batches))
    with home.hidden(stack.name, calibration.spill) as store:
        with products_shown():
            arguments = capture(model, stack, {i: calibration.batches[i] for i in own}, store)
        calibration.hidden_bytes = max(calibration.hidden_bytes, store.nbytes)
        yield 0  # says how large the inputs are before the work starts
        masks = [token_mask(b) for b in calibration.batches]
        last = max((i for i, views in enumerate(stack.views) if views), default=-1)
        begin = store.resume(_finished(stack, home))
        for position, block in enumerate(stack.blocks[: last + 1]):
            views = stack.views[position]
            if position < begin:
                yield len(views)
                continue
            store.forget(position)
            old = home.finished(stack.names[position])
            as_it_was = old and calibration.propagate == "dense"
            with (
                home.resident(stack.names[position], block, as_it_was),
                placed(block, calibration.device) as device,
            ):
                dense: dict[int, Tensor] = {}

                def run(
                    i: int, at: int = position, block: nn.Module = block, device: Any = device
                ) -> Tensor:
                    return run_block(block, arguments[i][at], store[i], device)

                def note(i: int, dense: dict[int, Tensor] = dense, run: Any = run) -> None:
                    output = run(i)
                    if calibration.propagate == "dense":
                        dense[i] = output

                if views and not old:
                    unused = _outputs_unused(views, calibration, make)
                    idle = stack.last[position] if unused else None
                    found = _gather(views, calibration, make, note, masks.__getitem__, idle=idle)
                    _visit(views, found, visit, settle)
                    del found
                if dense:
                    for i, output in dense.items():
                        store[i] = output
                elif position < last:
                    with products_shown():
                        for i in own:
                            store[i] = run(i)
                if dense or position < last:
                    store.passed(position + 1)
            yield len(views)


def _outputs_unused(views: Sequence[View], calibration: Calibration, make: MakeCollectors) -> bool:
    """Whether a pass that gathers evidence is for the inputs of products alone."""
    kinds = (k for v in views for k in make(v, torch.device("meta")))
    return calibration.propagate == "pruned" and not any(k.reads_power for k in kinds)


def _finished(stack: Stack, home: Residence) -> int:
    """How many blocks at the start of a stack an earlier call has done."""
    for position, views in enumerate(stack.views):
        if views and not home.finished(stack.names[position]):
            return position
    return len(stack.views)
