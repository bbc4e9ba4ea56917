"""Calibration block by block: evidence for each weight on inputs that already went through the
pruned weights before it.

Peak memory is the model where it lives, one block with its evidence, and the inputs of one block
for every batch (`hidden_bytes` says how large they are; `spill` puts them on disk).
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparseworks.core.errors import DataError
from sparseworks.core.evidence import Collector
from sparseworks.core.types import Progress
from sparseworks.models.blocks import Stack, find_stages, first_tensor, replace_first
from sparseworks.models.calls import Batch, batch_size, call, move, token_mask
from sparseworks.models.tap import EvidenceTap, calibration_mode, collect_into
from sparseworks.models.views import View

__all__ = ["Calibration", "collect", "replay", "stream"]

MakeCollectors = Callable[[View, torch.device], Sequence[Collector]]
Visit = Callable[[View, Sequence[Collector]], None]


@dataclass
class Calibration:
    """How evidence is streamed.

    Args:
        batches: re-iterable calibration batches.
        device: where blocks are computed; None: where they live.
        propagate: feed a block with the outputs of the "pruned" blocks before it, or "dense".
        spill: folder for the block inputs, instead of memory.
        progress: called with (done, total, what).
    """

    batches: Sequence[Batch]
    device: torch.device | str | None = None
    propagate: Literal["pruned", "dense"] = "pruned"
    spill: str | os.PathLike[str] | None = None
    progress: Progress | None = None
    hidden_bytes: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if isinstance(self.batches, Iterator):
            self.batches = list(self.batches)
        if len(self.batches) == 0:
            raise DataError("the calibration data is empty: at least one batch is needed")


class _Stop(Exception):
    """Ends a forward pass once the inputs of the first block are known."""


def collect(
    model: nn.Module, views: Sequence[View], calibration: Calibration, make: MakeCollectors
) -> dict[str, Sequence[Collector]]:
    """Evidence of all views at once, on the model as it is."""
    with calibration_mode(model):
        return _replay(model, views, calibration, make)


def replay(
    model: nn.Module,
    batches: Iterable[Batch],
    handles: Sequence[Any],
    padding: list[Tensor | None] | None = None,
) -> None:
    """Run batches through a model whose modules have hooks, and take those off in the end.

    Args:
        handles: of the hooks.
        padding: a list that holds, while a batch runs, the mask of its real tokens, or None.
    """
    device = _device(model)
    try:
        with calibration_mode(model):
            for batch in batches:
                if padding is not None:
                    padding[:] = [token_mask(batch)]
                call(model, _on(batch, device))
    finally:
        for handle in handles:
            handle.remove()


def stream(
    model: nn.Module,
    views: Sequence[View],
    calibration: Calibration,
    make: MakeCollectors,
    visit: Visit,
) -> list[str]:
    """Visit every view once, in execution order, with evidence from the inputs it really sees.

    `visit` may change the weight; the inputs of later blocks are computed through the change.

    Returns:
        Names of the views that the calibration data did not use.
    """
    with calibration_mode(model):
        first = _on(calibration.batches[0], _device(model))
        stages = find_stages(model, views, first)
        done = 0
        for stage in stages:
            if isinstance(stage, Stack):
                for finished in _stream_stack(model, stage, calibration, make, visit):
                    done += finished
                    size = f" (block inputs: {calibration.hidden_bytes / 1e6:.0f} MB)"
                    _report(calibration, done, len(views), stage.name + size)
            else:
                found = _replay(model, [stage], calibration, make)
                visit(stage, found[stage.name])
                done += 1
                _report(calibration, done, len(views), stage.name)
    used = {v.name for s in stages for v in (_all_views(s) if isinstance(s, Stack) else [s])}
    return [v.name for v in views if v.name not in used]


def _all_views(stack: Stack) -> list[View]:
    return [v for block in stack.views for v in block]


def _report(calibration: Calibration, done: int, total: int, what: str) -> None:
    if calibration.progress is not None:
        calibration.progress(done, total, what)


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _on(batch: Batch, device: torch.device) -> Batch:
    moved: Batch = move(batch, device)
    return moved


def _replay(
    model: nn.Module, views: Sequence[View], calibration: Calibration, make: MakeCollectors
) -> dict[str, Sequence[Collector]]:
    """Evidence of some views by full forward passes."""
    device = _device(model)
    collectors = {v.name: make(v, v.parameter.device) for v in views}
    with EvidenceTap(views, collect_into(collectors)) as tap:
        for batch in calibration.batches:
            tap.padding = token_mask(batch)
            call(model, _on(batch, device))
            _count(collectors, batch)
    _check(collectors)
    return collectors


def _count(collectors: Mapping[str, Sequence[Collector]], batch: Batch) -> None:
    for several in collectors.values():
        for collector in several:
            collector.samples += batch_size(batch)


def _check(collectors: Mapping[str, Sequence[Collector]]) -> None:
    for name, several in collectors.items():
        for collector in several:
            collector.check(name)


def _stream_stack(
    model: nn.Module, stack: Stack, calibration: Calibration, make: MakeCollectors, visit: Visit
) -> Iterator[int]:
    """Evidence and visits block by block; yields the number of views finished."""
    with _HiddenStore(calibration.spill) as store:
        arguments = _capture(model, stack, calibration, store)
        calibration.hidden_bytes = max(calibration.hidden_bytes, store.nbytes)
        yield 0  # says how large the inputs are before the work starts
        masks = [token_mask(b) for b in calibration.batches]
        last = max((i for i, views in enumerate(stack.views) if views), default=-1)
        for position, block in enumerate(stack.blocks[: last + 1]):
            views = stack.views[position]
            with _placed(block, calibration.device) as device:
                if views:
                    collectors = {v.name: make(v, v.parameter.device) for v in views}
                    dense: list[Tensor] = []
                    with EvidenceTap(views, collect_into(collectors)) as tap:
                        for i, batch in enumerate(calibration.batches):
                            tap.padding = masks[i]
                            output = _run(block, arguments[i][position], store[i], device)
                            _count(collectors, batch)
                            if calibration.propagate == "dense":
                                dense.append(output)
                    _check(collectors)
                    for view in views:
                        visit(view, collectors.pop(view.name))
                    if dense:
                        for i, output in enumerate(dense):
                            store[i] = output
                        yield len(views)
                        continue
                if position < last:
                    for i in range(len(calibration.batches)):
                        store[i] = _run(block, arguments[i][position], store[i], device)
            yield len(views)


def _run(
    block: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]], hidden: Tensor, device: Any
) -> Tensor:
    args, kwargs = replace_first(*arguments, hidden)
    if device is not None:
        args, kwargs = move(args, device), move(kwargs, device)
    output = first_tensor(block(*args, **kwargs))
    if output is None:
        raise DataError(f"{type(block).__name__} returned no tensor during calibration")
    return output


Arguments = dict[int, tuple[tuple[Any, ...], dict[str, Any]]]


class _SameForAll(dict):  # type: ignore[type-arg]
    """The arguments of the first block, for every block."""

    def __missing__(self, position: int) -> Any:
        return self[0]


def _capture(
    model: nn.Module, stack: Stack, calibration: Calibration, store: _HiddenStore
) -> list[Arguments]:
    """Inputs of the first block and the further arguments of every block, for each batch."""
    captured: list[Arguments] = []
    device = _device(model)
    for batch in calibration.batches:
        seen: Arguments = _SameForAll()

        def hook(position: int, seen: Arguments = seen) -> Any:
            def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                hidden = first_tensor(args)
                hidden = hidden if hidden is not None else first_tensor(kwargs)
                assert hidden is not None
                if position == 0:
                    store.append(hidden)
                empty = hidden.new_empty(0)  # a placeholder: the hidden states live in the store
                seen[position] = replace_first(args, kwargs, empty)
                if stack.same_arguments:
                    raise _Stop

            return before

        watched = stack.blocks[:1] if stack.same_arguments else stack.blocks
        handles = [
            b.register_forward_pre_hook(hook(i), with_kwargs=True) for i, b in enumerate(watched)
        ]
        try:
            call(model, _on(batch, device))
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
        captured.append(seen)
    return captured


@contextmanager
def _placed(block: nn.Module, device: torch.device | str | None) -> Iterator[torch.device | None]:
    """The block on another device for a while."""
    if device is None:
        yield None
        return
    home = _device(block)
    block.to(device)
    try:
        yield torch.device(device)
    finally:
        block.to(home)


class _HiddenStore:
    """Hidden states of each batch, in memory or in memory-mapped files of a folder."""

    def __init__(self, spill: str | os.PathLike[str] | None) -> None:
        self._folder = None if spill is None else tempfile.TemporaryDirectory(dir=spill)
        self._tensors: list[Tensor] = []

    def __enter__(self) -> _HiddenStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self._tensors.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def append(self, hidden: Tensor) -> None:
        self._tensors.append(self._keep(len(self._tensors), hidden))

    def __getitem__(self, index: int) -> Tensor:
        return self._tensors[index]

    def __setitem__(self, index: int, hidden: Tensor) -> None:
        self._tensors[index] = self._keep(index, hidden)

    def _keep(self, index: int, hidden: Tensor) -> Tensor:
        if self._folder is None:
            return hidden
        path = os.path.join(self._folder.name, f"{index}.{id(hidden)}")
        size = math.prod(hidden.shape)
        mapped = torch.from_file(path, shared=True, size=size, dtype=hidden.dtype)
        os.unlink(path)  # the mapping keeps it until the tensor goes
        mapped.copy_(hidden.detach().reshape(-1))
        return mapped.view(hidden.shape)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._tensors)
