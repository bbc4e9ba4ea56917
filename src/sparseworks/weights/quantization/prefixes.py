"""Losses of a model whose first blocks stay as they are: those are not computed again.

While only weights of block d and of what follows change, the blocks before it return what block
d - 1 returned when they ran last. That this is the same function is not taken from names: the
blocks must run once a batch, each on what the one before it returned, and the loss of the unchanged
model must stay the same to the last bit; where it does not, every block computes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

from torch import nn

from sparseworks.models.blocks import first_tensor
from sparseworks.models.calls import Batch, Loss
from sparseworks.models.modes import hooked

__all__ = ["PrefixLosses"]


class PrefixLosses:
    """Mean losses over batches. Make it, and call `skip`, with the unchanged model.

    Args:
        model: in evaluation mode.
        batches: whose losses count alike.
        loss: of (model, batch).
        blocks: in the order in which they run; (): all is computed each time.

    Attributes:
        dense: the mean loss of the unchanged model.
        skipped: how many blocks are not computed.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Batch], loss: Loss, blocks: Sequence[nn.Module]
    ) -> None:
        self.model, self.batches, self.loss = model, batches, loss
        self.blocks, self.skipped = list(blocks), 0
        self._known: list[Any] = []  # a batch: the output of the last block that is skipped
        self._next: list[Any] = []  # the same of the block after it
        self.dense = self._recorded()

    def skip(self, count: int) -> None:
        """Compute the first `count` blocks no more; never fewer than before."""
        while self.skipped < min(count, len(self.blocks)):
            self._known, self.skipped = self._next, self.skipped + 1
            if self._recorded() != self.dense:
                self._known, self.skipped, self.blocks = [], 0, []

    def mean(self) -> float:
        """Of the model as it is now."""
        total = 0.0
        for i, batch in enumerate(self.batches):
            with ExitStack() as stack:
                for block in self.blocks[: self.skipped]:
                    stack.enter_context(_returning(block, self._known[i]))
                total += float(self.loss(self.model, batch))
        return total / len(self.batches)

    def _recorded(self) -> float:
        """`mean`, with what the first block that computes returned. The chain ends before a block
        that does not run on what the one before it returned; blocks out of order are none."""
        self._next, first, end = [], self.skipped, len(self.blocks)
        ran: list[int] = []
        broken, last = [end], [cast(Any, None)]

        def before(place: int) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                given = first_tensor(args)
                given = first_tensor(kwargs) if given is None else given
                ran.append(place)
                if place > first and (given is None or given is not last[0]):
                    broken.append(place)

            return hook

        def after(place: int) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                last[0] = first_tensor(output)
                if place == first:
                    self._next.append(output)

            return hook

        handles = itertools.chain(
            (self.blocks[i].register_forward_pre_hook(before(i), with_kwargs=True)
             for i in range(first, end)),
            (self.blocks[i].register_forward_hook(after(i)) for i in range(first, end)),
        )  # fmt: skip
        with hooked(handles):
            mean = self.mean()
        in_order = ran == list(range(first, end)) * len(self.batches)
        self.blocks = self.blocks[: min(broken)] if in_order else []
        if not in_order:
            self._known, self.skipped = [], 0
        return mean


@contextmanager
def _returning(block: nn.Module, output: Any) -> Iterator[None]:
    """A block that computes nothing."""
    own = block.__dict__.get("forward")
    block.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own
