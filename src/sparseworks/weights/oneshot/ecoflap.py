"""ECoFLaP (Sung, Yoon & Bansal 2023, ECoFLaP: Efficient Coarse-to-Fine Layer-Wise Pruning for
Vision-Language Models, ICLR 2024, arXiv 2310.02998): the sparsity of every block by the size of the
loss gradient, from forward passes alone; then any local pruner.

For every matrix W_l, every batch, and z ~ N(0, I),

    S_l += |L(W_l + eps z) - L(W_l - eps z)| / (2 eps),

the size of the derivative along z, 0.8 ||grad_l|| in expectation. A block's score is the sum over
its matrices. Every block keeps N_b (1 - s_max) first, s_max = s + reach; the rest of the budget
goes to the blocks in proportion to their scores; a full block drops out and the others share again.

The official code restores by adding eps z again; here the weights are kept and copied back, so they
return bit for bit. A perturbation that a weight's precision does not see gives 0; `eps` is absolute
as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from sparseworks.core.allocation import Sizes, filled
from sparseworks.core.budgets import Budget
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.patterns import count_dropped
from sparseworks.core.random import generator_for
from sparseworks.core.registry import MethodInfo, Need
from sparseworks.models.tap import calibration_mode
from sparseworks.weights.oneshot.gradients import checked_loss
from sparseworks.weights.oneshot.sensitivity import Blocks, Measured, Sensitivity
from sparseworks.weights.oneshot.wanda import Wanda

__all__ = ["ECoFLaP", "ZerothOrder"]


@dataclass(frozen=True, kw_only=True)
class ZerothOrder(Sensitivity):
    """The budget of ECoFLaP; two forward passes a batch and matrix.

    Args:
        eps: size of the perturbation.
        batches: how many of the calibration batches are used.
        reach: s_max - s, how far a block's sparsity may rise above the whole.
    """

    eps: float = 1e-3
    batches: int = 32
    reach: float = 0.1

    name: ClassVar[str] = "ecoflap"
    needs: ClassVar[tuple[Need, ...]] = ("data",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.eps > 0 and self.batches >= 1 and self.reach >= 0):
            raise InvalidArgument("budget ecoflap: eps= above 0, batches= from 1, reach= from 0")

    @torch.no_grad()
    def measure(self, on: Measured, blocks: Blocks) -> dict[str, float]:
        assert on.batches is not None
        used = [b for b, _ in zip(on.batches, range(self.batches))]
        found = dict.fromkeys(blocks, 0.0)
        with calibration_mode(on.model):
            for block, views in blocks.items():
                for view in views:
                    weight = view.parameter
                    before = weight.detach().clone()
                    try:
                        for i, batch in enumerate(used):
                            generator = generator_for(on.seed, view.name, i)
                            z = torch.randn(before.shape, generator=generator).to(before)
                            losses = []
                            for sign in (1.0, -1.0):
                                weight.copy_(before + sign * self.eps * z)
                                losses.append(float(checked_loss(on.model, batch, on.loss)))
                            found[block] += abs(losses[0] - losses[1]) / (2 * self.eps)
                    finally:
                        weight.copy_(before)
        return found

    def keep(
        self, sensitivity: Mapping[str, float], sizes: Sizes, sparsity: float
    ) -> Mapping[str, float]:
        total = sum(sizes.values())
        most = min(1.0, sparsity + self.reach)
        least = {g: n * (1 - most) for g, n in sizes.items()}
        return filled(sensitivity, sizes, total - count_dropped(total, sparsity), least)


@dataclass(frozen=True)
class ECoFLaP(Wanda):
    """Wanda with the sparsity of every block by its zeroth-order gradient.

    The budget's own options are said with it: `budget="ecoflap:batches=8,reach=0.2"`.
    """

    budget: str | Mapping[str, float] | Budget = field(default="ecoflap", kw_only=True)

    info: ClassVar[MethodInfo] = MethodInfo(
        name="ecoflap",
        title="ECoFLaP: Efficient Coarse-to-Fine Layer-Wise Pruning for Vision-Language Models",
        authors="Sung et al.",
        year=2023,
        card="183",
        room="weights",
        kind="one-shot",
        needs=("data", "loss"),
        pattern="row (any that takes densities)",
        budget="ecoflap",
        cost="two forward passes a matrix and batch of 32, and those of Wanda",
        summary="Wanda; blocks that the loss feels more, by random perturbations, keep more",
    )
