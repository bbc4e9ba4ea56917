"""The repeated blocks of a model one after the other, each with the inputs it really has.

What a method that rebuilds a model block by block needs: inputs that went through the blocks as
the caller left them, and what the dense block makes of these, or of the dense inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparseworks.models.blocks import Stack, find_stages
from sparseworks.models.calls import Batch, first_sample, token_mask
from sparseworks.models.matrix import View
from sparseworks.models.residence import HiddenStates
from sparseworks.models.stacked import capture, run_block
from sparseworks.models.tap import calibration_mode

__all__ = ["BlockAtWork", "walk_blocks"]

Inputs = Literal["compressed", "dense"]


@dataclass(frozen=True)
class BlockAtWork:
    """One block, while those before it are done.

    Args:
        name: of the block.
        block: the module.
        views: its weights.
        inputs: hidden states of every batch.
        targets: what the dense block makes of them.
        tokens: bool `[batch, tokens]` of every batch, False at padding; None: nothing is padded.
    """

    name: str
    block: nn.Module
    views: tuple[View, ...]
    inputs: Sequence[Tensor]
    targets: Sequence[Tensor]
    tokens: Sequence[Tensor | None]
    arguments: Sequence[Any]

    def output(self, batch: int) -> Tensor:
        """What the block makes of a batch now."""
        return run_block(self.block, self.arguments[batch], self.inputs[batch], None)

    def error(self, output: Tensor, batch: int) -> Tensor:
        """Mean squared distance from the target, of real tokens."""
        gap = (output.float() - self.targets[batch].float()).square()
        tokens = self.tokens[batch]
        return gap.mean() if tokens is None or gap.shape[:2] != tokens.shape else gap[tokens].mean()


def walk_blocks(
    model: nn.Module,
    dense: nn.Module,
    views: Sequence[View],
    batches: Sequence[Batch],
    inputs: Inputs = "compressed",
) -> Iterator[BlockAtWork]:
    """The blocks in the order of use; the caller may change each before it asks for the next one.

    Args:
        model: whose blocks are to change; in evaluation mode, its caches off (`calibration_mode`).
        dense: the same model as it was.
        views: of the model; weights outside of blocks are left out.
        batches: of calibration.
        inputs: of the dense block for its targets: those of the "compressed" one, or "dense" ones.
    """
    with calibration_mode(model):
        stages = find_stages(model, views, first_sample(batches[0]))
    padding = [token_mask(b) for b in batches]
    for stack in stages:
        if not isinstance(stack, Stack):
            continue
        store, whole = HiddenStates(None), HiddenStates(None)
        with torch.no_grad(), calibration_mode(model):
            arguments = capture(model, stack, dict(enumerate(batches)), store)
        own = range(len(batches))
        for i in own:
            whole[i] = store[i]
        last = max(i for i, v in enumerate(stack.views) if v)
        for position, block in enumerate(stack.blocks[: last + 1]):
            twin = dense.get_submodule(stack.names[position])
            given = [arguments[i][position] for i in own]
            with torch.no_grad():
                source = store if inputs == "compressed" else whole
                targets = [run_block(twin, given[i], source[i], None) for i in own]
            if stack.views[position]:
                yield BlockAtWork(
                    stack.names[position], block, stack.views[position],
                    [store[i] for i in own], targets, padding, given,
                )  # fmt: skip
            with torch.no_grad():
                for i in own:
                    store[i] = run_block(block, given[i], store[i], None)
                    if inputs == "dense":
                        whole[i] = targets[i]
