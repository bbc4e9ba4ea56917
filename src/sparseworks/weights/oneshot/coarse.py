"""The coarse half of CFSP as a budget for any score (Wang et al. 2024, CFSP: An Efficient
Structured Pruning Framework for LLMs with Coarse-to-Fine Activation Information, COLING 2025, arXiv
2409.13199): blocks that turn the hidden states further keep more.

    I_b = mean over tokens of arccos(cos(x_in, x_out)) / pi,
    z_b = sigmoid(a (I_b - mean I)),     density_b = (1 - s) z_b / mean z,

the mean of z over the weights. Where a density would exceed 1 the block is dense and the others
share the rest in the same proportions; the official code shrinks all deviations instead.

The official code sums I over tokens and divides by 1e4, at 128 samples of 1024 tokens: on the mean
over tokens that is the slope a = 131072 / 1e4 = 13.1, whatever the amount of data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from sparseworks.core.allocation import Sizes, rescaled
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.patterns import count_dropped
from sparseworks.core.registry import Need
from sparseworks.models.changes import Change, block_changes
from sparseworks.weights.oneshot.sensitivity import Blocks, Measured, Sensitivity

__all__ = ["SLOPE", "CoarseToFine", "sigmoid_shares"]

SLOPE = 128 * 1024 / 1e4


def sigmoid_shares(changes: Mapping[str, float], slope: float) -> dict[str, float]:
    """z_b = sigmoid(slope (I_b - mean I))."""
    mean = sum(changes.values()) / len(changes)
    return {b: 1 / (1 + math.exp(-slope * (i - mean))) for b, i in changes.items()}


@dataclass(frozen=True, kw_only=True)
class CoarseToFine(Sensitivity):
    """The budget of CFSP's coarse step.

    Args:
        slope: a, of the sigmoid.
        change: how a block's change is measured: angular, cosine, mse, mae.
        per: only "block": a tensor alone has no input and output of one shape.
    """

    slope: float = SLOPE
    change: Change = "angular"

    name: ClassVar[str] = "cfsp"
    needs: ClassVar[tuple[Need, ...]] = ("data",)

    per: Literal["block"] = "block"

    def __post_init__(self) -> None:
        if self.per != "block" or not self.slope >= 0:
            raise InvalidArgument("budget cfsp: per='block' only, slope= from 0")

    def measure(self, on: Measured, blocks: Blocks) -> dict[str, float]:
        assert on.batches is not None
        alone = [b for b, views in blocks.items() if b == views[0].name]
        found = block_changes(
            on.model, [b for b in blocks if b not in alone], on.batches, self.change
        )
        mean = sum(found.values()) / len(found) if found else 0.0
        return {b: found.get(b, mean) for b in blocks}  # outside of blocks: the mean

    def keep(
        self, sensitivity: Mapping[str, float], sizes: Sizes, sparsity: float
    ) -> Mapping[str, float]:
        total = sum(sizes.values())
        shares = sigmoid_shares({g: sensitivity[g] for g in sizes}, self.slope)
        return rescaled(shares, sizes, total - count_dropped(total, sparsity))
