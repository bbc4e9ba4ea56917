"""Lottery jackpots (Zhang et al. 2021, Lottery Jackpots Exist in Pre-trained Models).

No weight of the trained model changes; only the mask B is searched. The layer computes with W * B
and real scores S get the straight-through gradient dL/dS = dL/d(W * B) * W, masked places included.

- Densities per tensor: one magnitude threshold over all tensors (`budget="uniform"`: all alike).
- First mask: the largest |W|; S = 1 where kept and 0.99 where masked, so few steps can reorder.
- After every step, per tensor: In = masked entries that are now among the top k of S, Out = kept
  ones that no longer are; of these n pairs only ceil(n r) change places, In from the largest S, Out
  from the smallest, r = (1 - t/T)^4 with t the steps taken before. Late in the search few entries
  move, because the first-order gains of many moves at once do not add up.

The released code leaves the restriction out (r = 1): `restrict=False`. Batch norm's running
statistics follow the mask; its weights and every bias are frozen with the rest.

In our quick setting (claim 007: 120 steps at 90 %) the restriction costs 2.5 points against the
search without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparseworks.core.budgets import Budget
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.patterns import Unstructured
from sparseworks.core.random import generator_for
from sparseworks.core.registry import MethodInfo
from sparseworks.core.selection import keep_top
from sparseworks.training.gates import StraightThroughMask
from sparseworks.training.transforming import Transform, Transformed
from sparseworks.weights.dynamic.masks import chosen_masks, magnitudes, span

_MASKED_SCORE = 0.99
_POWER = 4


@dataclass(frozen=True, kw_only=True)
class Jackpots(Transform):
    """Search an accurate sparse part of a trained model without training its weights.

    Args:
        first: the first mask: "magnitude", or "random" with the same densities.
        restrict: let the share of moves fall over the search.
    """

    first: str = "magnitude"
    restrict: bool = True

    budget: str | Mapping[str, float] | Budget = "global"
    info: ClassVar[MethodInfo] = MethodInfo(
        name="jackpots",
        title="Lottery Jackpots Exist in Pre-trained Models",
        authors="Zhang et al.",
        year=2021,
        card="007",
        room="weights",
        kind="transform",
        needs=("training",),
        pattern="unstructured",
        budget="global (uniform)",
        cost="a dense gradient and one selection per tensor every step",
        summary="a mask for a trained model by scores alone; no weight changes",
    )

    def __post_init__(self) -> None:
        if self.first not in ("magnitude", "random"):
            raise InvalidArgument(f"jackpots: first={self.first!r}; 'magnitude' or 'random'")

    def begin(self, job: Transformed) -> None:
        if not (isinstance(job.pattern, Unstructured) and job.pattern.scope == "tensor"):
            raise InvalidArgument(
                f"jackpots: pattern {job.pattern}; entries trade places one by one, which only "
                "'unstructured' allows"
            )
        if self.restrict:
            span(job, 0.0, 1.0)
        masks = dict(chosen_masks(job, magnitudes(job), job.sparsity or 0.0))
        for module in job.model.modules():
            for attribute in module._parameters:
                job.freeze(module, attribute)
        for name, mask in masks.items():
            if not bool(mask.any()):
                raise InvalidArgument(
                    f"jackpots: {name} would keep nothing at sparsity {job.sparsity}; lower it, "
                    "exclude the tensor, or give budget='uniform'"
                )
            if self.first == "random":
                drawn = torch.rand(mask.shape, generator=generator_for(job.seed, name))
                mask = keep_top(drawn, int(torch.count_nonzero(mask))).to(mask.device)
            weight = job.parameters[name].detach()
            fine = torch.promote_types(weight.dtype, torch.float32)  # 0.01 is little in bf16
            scores = torch.ones_like(weight, dtype=fine).masked_fill_(~mask, _MASKED_SCORE)
            job.parametrize(name, StraightThroughMask(scores, mask))

    def rate(self, job: Transformed) -> float:
        """r: the share of the moves that is carried out after this step."""
        if not self.restrict:
            return 1.0
        return max(0.0, 1.0 - (job.step - 1) / (job.steps or 1)) ** _POWER

    def update(self, job: Transformed) -> None:
        for name, mask in job.masks.items():
            scores = job.part(name, StraightThroughMask).scores.detach()
            job.set_mask(name, moved(mask, scores, self.rate(job)))


def moved(mask: Tensor, scores: Tensor, rate: float) -> Tensor:
    """The mask after ceil(rate n) of the n trades that the top k of the scores ask for.

    Args:
        mask: bool, k True.
        scores: of the same shape; at ties the entry that is kept already stays.
        rate: share of the trades, in [0, 1].

    Returns:
        A new mask with k True.
    """
    scores = scores.float()
    kept = int(torch.count_nonzero(mask))
    if kept in (0, mask.numel()):
        return mask
    edge = scores.flatten().kthvalue(mask.numel() - kept + 1).values
    above, tied = scores > edge, scores == edge
    prefer = mask.float().masked_fill(~tied, -torch.inf)
    target = above | keep_top(prefer, kept - int(torch.count_nonzero(above)))
    come, go = target & ~mask, mask & ~target
    count = math.ceil(rate * int(torch.count_nonzero(come)))
    come = keep_top(scores.masked_fill(~come, -torch.inf), count)
    go = keep_top((-scores).masked_fill(~go, -torch.inf), count)
    return (mask & ~go) | come
