"""Blocks of a stack on their own: what they are called with, and a call of one of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.core.errors import DataError
from sparseworks.models.blocks import Stack, first_tensor, replace_first
from sparseworks.models.calls import Batch, call, move
from sparseworks.models.modes import hooked
from sparseworks.models.residence import HiddenStates

__all__ = ["capture", "device_of", "placed", "run_block"]


class _Stop(Exception):
    """Ends a forward pass once the inputs of the first block are known."""


def device_of(model: nn.Module) -> torch.device:
    """Where a model's first weight is that is anywhere."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def run_block(
    block: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]], hidden: Tensor, device: Any
) -> Tensor:
    """What a block makes of hidden states."""
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


def capture(
    model: nn.Module,
    stack: Stack,
    batches: Mapping[int, Batch],
    store: HiddenStates,
) -> dict[int, Arguments]:
    """Inputs of the first block and the further arguments of every block, for each own batch."""
    captured: dict[int, Arguments] = {}
    device = device_of(model)
    for index, batch in batches.items():
        seen: Arguments = _SameForAll()

        def hook(position: int, seen: Arguments = seen, index: int = index) -> Any:
            def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                hidden = first_tensor(args)
                hidden = hidden if hidden is not None else first_tensor(kwargs)
                assert hidden is not None
                if position == 0:
                    store[index] = hidden
                empty = hidden.new_empty(0)  # a placeholder: the hidden states live in the store
                seen[position] = replace_first(args, kwargs, empty)
                if stack.same_arguments:
                    raise _Stop

            return before

        watched = stack.blocks[:1] if stack.same_arguments else stack.blocks
        hooks = (
            b.register_forward_pre_hook(hook(i), with_kwargs=True, prepend=True)
            for i, b in enumerate(watched)
        )
        with suppress(_Stop), hooked(hooks):
            call(model, move(batch, device))
        captured[index] = seen
    store.passed(0)
    return captured


@contextmanager
def placed(block: nn.Module, device: torch.device | str | None) -> Iterator[torch.device | None]:
    """The block on another device for a while."""
    if device is None:
        yield None
        return
    home = device_of(block)
    block.to(device)
    try:
        yield torch.device(device)
    finally:
        block.to(home)
