"""DSnoT (Zhang et al. 2024, Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs,
ICLR 2024, arXiv 2310.08915): the mask of every row is repaired by swaps, without any training.

With x the inputs of a layer, m_c = E[x_c] and v_c = Var[x_c] over the calibration tokens, the mean
error of row r and what a swap does to it are

    e_r = sum_c (W_rc - W'_rc) m_c,      e_r <- e_r - W_rg m_g + W'_rp m_p,

g grown, p pruned. Up to `cycles` times, all rows at once:
    grow   of the pruned, the largest W_rc m_c / v_c^gamma where e_r > 0, the least where e_r < 0;
    prune  of the kept whose own term has the sign opposite to e_r, the least |W_rc| ||x_c||;
           N:M: in the group of the grown weight, the least |W_rc| ||x_c||, whatever its sign.
A weight moves once at most. A row is done when |e_r| <= threshold, when nothing on its side is
left, and with N:M when the sign of e_r changes. Every swap keeps the number of weights of the row.
Of the swaps made, a row keeps those up to the best:

    end="square"  least e_r^2 + sum_c (W_rc - W'_rc)^2 v_c, the squared error of independent inputs;
    end="mean"    least |e_r|.

Differences from the official code: it keeps all swaps, which match means at the price of variance:
on a 6M-parameter Llama of width 256 that costs more than it gains, so the square is the default and
end="mean", cycles=50 the nearest to the code. There the 50 swaps are for rows of 4096 inputs and
more; None scales them with the row. e_r is per token (there summed over a sequence of 2048: its
threshold 0.1 is 0.1 / 2048 here). Weights that a method compensated (SparseGPT) stay as they are
and grown ones come back with their dense value. The code leaves MLPs as they are (skip="*mlp*").
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.evidence import InputMoments
from sparseworks.core.patterns import NM, Pattern, Unstructured
from sparseworks.core.registry import MethodInfo
from sparseworks.models.roles import matches
from sparseworks.weights.oneshot.base import OneShot, Solution, Target

__all__ = ["DSnoT", "swapped"]

_SWAPS = 50 / 4096  # of a row's inputs: the 50 of the official code in its smallest model
End = Literal["mean", "square"]
_VANISHING = 1e-12  # of the largest variance: below, inputs are constants


@dataclass(frozen=True)
class DSnoT(OneShot):
    """Wanda's or magnitude's mask, repaired; as `recovery="dsnot"`, any method's.

    Args:
        initial: score of the mask that is repaired: "wanda" or "magnitude" (as a method only).
        cycles: swaps of a row at most; None: 50 for every 4096 inputs, at least 1.
        threshold: mean output error of a row, per token, that needs no repair.
        gamma: power of the input's variance against which growing is weighed.
        end: which swaps of a row stay: up to the least squared error or the least "mean" error.
        skip: name pattern of tensors that keep the initial mask.
        propagate: calibrate a block on the outputs of the "pruned" blocks before it, or "dense".
    """

    initial: Literal["wanda", "magnitude"] = "wanda"
    cycles: int | None = None
    threshold: float = 0.1 / 2048
    gamma: float = 1.0
    end: End = "square"
    skip: str = ""
    propagate: Literal["pruned", "dense"] = "pruned"

    pattern: str | Pattern = field(default="row", kw_only=True)
    collector = InputMoments
    evidence: ClassVar[type[InputMoments]] = InputMoments
    info: ClassVar[MethodInfo] = MethodInfo(
        name="dsnot",
        title="Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs",
        authors="Zhang et al.",
        year=2024,
        card="020",
        room="weights",
        kind="one-shot",
        needs=("data",),
        pattern="row (unstructured, N:M)",
        cost="two forward passes over the calibration data, three sorts a row",
        summary="swap pruned and kept weights until the mean output error cancels; also recovery=",
    )

    def __post_init__(self) -> None:
        if self.initial not in ("wanda", "magnitude"):
            raise InvalidArgument(f"dsnot: initial={self.initial!r}; 'wanda' or 'magnitude'")
        if self.end not in get_args(End):
            raise InvalidArgument(f"dsnot: end={self.end!r}; 'square' or 'mean'")
        if (self.cycles or 0) < 0 or self.threshold < 0:
            raise InvalidArgument("dsnot: cycles= and threshold= are at least 0")
        if self.propagate not in ("pruned", "dense"):
            raise InvalidArgument(f"dsnot: propagate={self.propagate!r}; 'pruned' or 'dense'")

    def check(self, pattern: Pattern) -> None:
        if not isinstance(pattern, (Unstructured, NM)):
            raise InvalidArgument(
                f"dsnot swaps single weights, which pattern {pattern} does not allow; use "
                "unstructured, row or N:M"
            )

    def score(self, target: Target, weight: Tensor, evidence: InputMoments) -> Tensor:
        if self.initial == "magnitude":
            return weight.abs()
        return weight.abs() * _norms(evidence)[:, None, :]

    def solve(self, target: Target, weight: Tensor, evidence: InputMoments) -> Solution:
        self.check(target.pattern)
        return self.recover(target, weight, super().solve(target, weight, evidence), evidence)

    def recover(
        self, target: Target, dense: Tensor, solution: Solution, seen: InputMoments
    ) -> Solution:
        if self.skip and matches(target.view.name, self.skip):
            return solution
        rows = dense.shape[0] // target.view.groups
        norms, variance = _norms(seen), seen.variance
        unseen = set(seen.unseen_groups())
        cycles = self.cycles
        if cycles is None:
            cycles = max(1, round(_SWAPS * dense.shape[1]))
        masks = []
        for group in range(target.view.groups):
            part = slice(group * rows, (group + 1) * rows)
            if group in unseen:
                masks.append(solution.mask[part])
                continue
            masks.append(
                swapped(
                    dense[part],
                    solution.weight[part],
                    solution.mask[part],
                    seen.mean[group],
                    variance[group],
                    norms[group],
                    allowed=None if target.allowed is None else target.allowed[part],
                    m=target.pattern.m if isinstance(target.pattern, NM) else None,
                    cycles=cycles,
                    threshold=self.threshold,
                    gamma=self.gamma,
                    end=self.end,
                )
            )
        mask = torch.cat(masks)
        weight = torch.where(solution.mask, solution.weight, dense)  # what has grown is dense
        return replace(solution, weight=torch.where(mask, weight, 0.0), mask=mask, error=None)


def _norms(seen: InputMoments) -> Tensor:
    """||x_c|| as Wanda has it, `[groups, in]`; 1 in groups that saw no token."""
    norm = seen.norm.clone()
    for group in seen.unseen_groups():
        norm[group] = 1.0
    return norm


def swapped(
    dense: Tensor,
    weight: Tensor,
    mask: Tensor,
    mean: Tensor,
    variance: Tensor,
    norm: Tensor,
    *,
    allowed: Tensor | None = None,
    m: int | None = None,
    cycles: int = 50,
    threshold: float = 0.1 / 2048,
    gamma: float = 1.0,
    end: End = "mean",
) -> Tensor:
    """The repaired mask `[out, in]`: as many kept in every row, what `end` judges never worse.

    Args:
        dense: `[out, in]`, the weights to imitate.
        weight: `[out, in]`, the pruned ones, 0 where masked.
        mask: bool `[out, in]`, True = kept.
        mean, variance, norm: `[in]`, of the inputs.
        allowed: bool, False where nothing may grow.
        m: of an N:M pattern, whose groups keep their number; None: rows keep it.
        cycles, threshold, gamma, end: see `DSnoT`.
    """
    grows, goes = (dense * mean).double(), (weight * mean).double()  # terms of e_r
    error = (grows - goes).sum(1)
    loses, costs = dense.double().square() * variance, weight.double().square() * variance
    spent = torch.zeros_like(error)  # what swaps added to the variance of the error
    rows = torch.arange(len(error), device=error.device)
    absent = ~mask if allowed is None else ~mask & allowed
    spread = variance.clamp_min(float(variance.max()) * _VANISHING).clamp_min(1e-30).pow(gamma)
    worth = torch.where(absent, dense * mean / spread, -torch.inf)
    order = worth.argsort(1, descending=True)
    first, last = torch.zeros_like(rows), absent.sum(1) - 1
    metric = weight.abs() * norm
    kept = mask.clone()
    lists = [_Ascending(metric, mask & (goes < 0)), _Ascending(metric, mask & (goes > 0))]

    def judged() -> Tensor:
        return error.abs() if end == "mean" else error.square() + spent

    best, length = judged(), torch.zeros_like(rows)
    swaps: list[tuple[Tensor, Tensor]] = []
    open_ = error.abs() > threshold
    for cycle in range(cycles):
        above = error > 0
        open_ = open_ & (first <= last)
        grown = order[rows, torch.where(above, first, last).clamp_min(0)]
        open_ &= torch.where(above, grows[rows, grown] > 0, grows[rows, grown] < 0)
        if m is None:
            there = torch.where(above, lists[0].left, lists[1].left)
            pruned = torch.where(above, lists[0].head, lists[1].head)
        else:
            there, pruned = _least_of_group(metric, kept, grown, m)
        open_ &= there
        if not bool(open_.any()):
            break
        new = error + goes[rows, pruned] - grows[rows, grown]
        swaps.append((torch.where(open_, grown, -1), torch.where(open_, pruned, -1)))
        kept[rows[open_], pruned[open_]] = False
        first += open_ & above
        last -= (open_ & ~above).long()
        lists[0].step(open_ & above)
        lists[1].step(open_ & ~above)
        flipped = (new > 0) != above
        error = torch.where(open_, new, error)
        spent = spent + open_ * (costs[rows, pruned] - loses[rows, grown])
        better = open_ & (judged() < best)
        best = torch.where(better, judged(), best)
        length = torch.where(better, cycle + 1, length)
        open_ = open_ & (new.abs() > threshold)
        if m is not None:
            open_ &= ~flipped
    result = mask.clone()
    for cycle, (grown, pruned) in enumerate(swaps):
        done = (length > cycle) & (grown >= 0)
        result[rows[done], grown[done]] = True
        result[rows[done], pruned[done]] = False
    return result


class _Ascending:
    """In every row some columns in ascending order of a metric, and a place in that order."""

    def __init__(self, metric: Tensor, among: Tensor) -> None:
        self._order = torch.where(among, metric, torch.inf).argsort(1)
        self._count = among.sum(1)
        self._place = torch.zeros_like(self._count)

    @property
    def left(self) -> Tensor:
        return self._place < self._count

    @property
    def head(self) -> Tensor:
        place = self._place.clamp_max(self._order.shape[1] - 1)
        return self._order.gather(1, place[:, None])[:, 0]

    def step(self, where: Tensor) -> None:
        self._place += where


def _least_of_group(metric: Tensor, kept: Tensor, grown: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Of every row's group of m columns: is one still kept from the start, and which is least."""
    columns = (grown // m * m)[:, None] + torch.arange(m, device=grown.device)
    values = torch.where(kept.gather(1, columns), metric.gather(1, columns), torch.inf)
    least = values.argmin(1)
    return values.amin(1).isfinite(), columns.gather(1, least[:, None])[:, 0]
