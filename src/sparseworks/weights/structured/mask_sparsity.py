"""MaskSparsity: press only on the channels that are going to be cut.

Network slimming presses on every batch-norm scale, also on those that stay, which then under-fit.
Here a mask of channels is chosen first; training starts again from the dense weights with

    loss + s sum over marked channels of |gamma_c|,

a slope s sign(gamma) added after the backward pass. The scales of marked channels fall to zero, the
others are trained as ever, and the marked channels are cut almost without loss. What a cut channel
still says, act(beta), is folded into the next layer. The batch norms of a residual stream share one
mark, which they vote on (`scales.agreed`), and so they do on what is cut.

In our quick setting (claim 013: a ResNet-8 on digits, half the channels inside blocks) the cut
costs nothing, where cutting the dense network at once costs 17 points; after repair it is not
certainly above pressing on every scale (0.2 points, -0.0 to 0.5).

Source: Jiang et al. 2022, Pruning-aware Sparse Regularization for Network Pruning. The folding is
an addition.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.registry import MethodInfo
from sparseworks.models.calls import Batch
from sparseworks.models.coupling import Coupling, trace
from sparseworks.weights.structured.base import EpochBatches, Fitted, TrainAndCut
from sparseworks.weights.structured.recovery import finetune
from sparseworks.weights.structured.scales import (
    Keep,
    Scales,
    agreed,
    cut_folded,
    find_scales,
    press,
)

__all__ = ["MaskSparsity", "MaskSparsityResult"]


@dataclass(frozen=True)
class MaskSparsityResult(Fitted):
    """What training and cutting did.

    Args:
        widths: batch-norm scale -> channels before and after.
        marked: groups that were pressed on.
        cut: groups that were cut.
        largest_marked: largest |gamma| of a marked group before the cut.
        least_kept: 5th percentile of the mean |gamma| of the groups that stay.
    """

    marked: int
    cut: int
    largest_marked: float
    least_kept: float


@dataclass(frozen=True)
class MaskSparsity(TrainAndCut):
    """Mark, train with a penalty on the marked scales, cut.

    Args:
        keep: share of the channels that stay; "ot" does not ask it.
        allocation: "uniform", the same share of every layer; "global", one threshold on |gamma|; or
            "ot", per batch norm the smallest gamma^2 whose sum is at most 1e-4 of all of them.
        strength: s. The paper's 5e-4 is for 100 epochs of ImageNet; the fall of a scale is about
            lr s / (1 - momentum) a step, so short schedules need more.
        threshold: channels up to this |gamma| are cut; None: all marked ones, whatever they weigh.
        near: |gamma| under which the penalty is quadratic; 0: never.
        exclude: name patterns; families that touch one of these parameters stay whole.
        lr: peak learning rate.
    """

    keep: float = 0.5
    allocation: Literal["uniform", "global", "ot"] = "uniform"
    strength: float = 5e-4
    threshold: float | None = 0.01
    near: float = 0.0
    exclude: tuple[str, ...] = ()
    lr: float = 0.05

    info: ClassVar[MethodInfo] = MethodInfo(
        name="mask-sparsity",
        title="Pruning-aware Sparse Regularization for Network Pruning",
        authors="Jiang et al.",
        year=2022,
        room="weights/structured",
        kind="train-and-cut",
        card="013",
        needs=("data", "loss", "training"),
        pattern="coupled channels under batch norm",
        budget="uniform or global",
        cost="one training; one added slope per batch norm and step",
        summary="press only the scales of channels that will be cut to zero, then cut them",
    )

    def mark(self, coupling: Coupling, scales: tuple[Scales, ...]) -> Keep:
        """False for the groups that the batch norms agree to give up, those of small |gamma|."""
        keep = coupling.keep_all()
        tables = [s.table() for s in scales]
        every = torch.cat([t[~t.isnan()] for t in tables]).sort().values
        cut = len(every) - max(1, round(self.keep * len(every)))
        line = float(every[cut - 1]) if cut else -1.0
        for scale, table in zip(scales, tables):
            wishes = torch.stack([self._wishes(row, line) for row in table])
            keep[scale.family.roots[agreed(wishes, ~table.isnan()).numpy()]] = False
        return keep

    def _wishes(self, row: Tensor, line: float) -> Tensor:
        """What one batch norm by itself gives up; NaN: groups that it does not hold."""
        order = row.argsort(stable=True)  # NaN last
        order = order[: int((~row.isnan()).sum())]
        if self.allocation == "uniform":
            count = len(order) - max(1, round(self.keep * len(order)))
        elif self.allocation == "global":
            count = min(int((row <= line).sum()), len(order) - 1)
        else:
            energy = row[order].square()
            count = min(int((energy.cumsum(0) <= 1e-4 * energy.sum()).sum()), len(order) - 1)
        wishes = torch.zeros_like(row, dtype=torch.bool)
        wishes[order[:count]] = True
        return wishes

    def fit(
        self,
        model: nn.Module,
        example: Batch,
        batches: EpochBatches,
        *,
        epochs: int,
        steps_per_epoch: int,
        keep: Keep | None = None,
        fold_batches: int = 4,
        **training: Any,
    ) -> MaskSparsityResult:
        """Train in place from the dense weights and cut; fine-tune afterwards at a small rate.

        Args:
            model: trained, dense.
            example: one batch, to trace the model.
            batches: epoch number -> batches.
            epochs: passes.
            steps_per_epoch: batches of a pass.
            keep: True for group numbers of `trace(model, example)` that stay: any other criterion
                instead of |gamma|.
            fold_batches: batches over which the means of cut channels are taken.
            training: further arguments of `finetune`.

        Raises:
            InvalidArgument: an option out of range, or a `keep` of another model.
            ModelError: nothing here has batch-norm scales.
        """
        if not 0 < self.keep < 1 or self.strength < 0:
            raise InvalidArgument("keep= lies in (0, 1) and strength= is at least 0")
        if self.allocation not in ("uniform", "global", "ot"):
            raise InvalidArgument(f"allocation={self.allocation!r}: uniform, global or ot")
        coupling = trace(model, example)
        scales = find_scales(model, coupling, self.exclude)
        stay = self.mark(coupling, scales) if keep is None else np.asarray(keep, bool)
        if stay.shape != (coupling.count,):
            raise InvalidArgument(
                f"keep has {stay.shape} entries; this model has {coupling.count} group numbers"
            )

        def penalty(_: nn.Module) -> None:
            press(scales, self.strength, ~stay, self.near)

        finetune(
            model, batches, epochs=epochs, steps_per_epoch=steps_per_epoch, penalty=penalty,
            **{"lr": self.lr, **training},
        )  # fmt: skip
        final = self._final(coupling, scales, stay)
        marked = torch.cat([s.largest()[~torch.as_tensor(stay[s.family.roots])] for s in scales])
        kept = torch.cat([s.mean()[torch.as_tensor(stay[s.family.roots])] for s in scales])
        data = list(itertools.islice(batches(0), fold_batches))
        cut_folded(model, example, coupling, final, data)
        widths = {
            next(iter(s.entries)): (len(s.family), int(final[s.family.roots].sum())) for s in scales
        }
        return MaskSparsityResult(
            widths,
            int((~stay).sum()),
            int((~final).sum()),
            float(marked.max()) if len(marked) else 0.0,
            float(kept.quantile(0.05)) if len(kept) else 0.0,
        )

    def _final(self, coupling: Coupling, scales: tuple[Scales, ...], stay: Keep) -> Keep:
        """What is cut: what the batch norms agree is under the threshold, or the marked ones."""
        if self.threshold is None:
            return stay
        final = coupling.keep_all()
        for scale in scales:
            table = scale.table()
            gone = agreed(table <= self.threshold, ~table.isnan())
            final[scale.family.roots[gone.numpy()]] = False
        return final
