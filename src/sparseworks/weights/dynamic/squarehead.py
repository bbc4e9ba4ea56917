"""SquareHead (Kurtic et al. 2023, Sparse Fine-tuning for Inference Acceleration of Large Language
Models, arXiv:2310.06927).

A model that was fine-tuned on a task is pruned in one shot (SparseGPT on data of the task), then
fine-tuned with its masks fixed, W <- W * M after every step, while each block learns what it gave
in the dense model (`training.distilling`):

    loss = h_ce CE + h_sq sum_l mean((f_l^s - f_l^t)^2) / (mean((f_l^t)^2) + eps) + h_kl KL

with h_ce = h_sq = 1 and h_kl = 0. The released code makes masks of the weights that are not 0, so
that a weight that is 0 by accident is frozen too; here masks are those of the model's record.

In our quick setting (claim 080: a byte decoder of width 64, tuned on little text in 70 steps)
SquareHead is 0.035 nats below cross-entropy alone at 80 % (0.025 to 0.045), 0.016 at 90 % (0.003
to 0.029), and the divergence of the logits is 0.006 below SquareHead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from sparseworks.core.registry import MethodInfo
from sparseworks.weights.dynamic.fixed import Fixed

__all__ = ["SquareHead"]


@dataclass(frozen=True)
class SquareHead(Fixed):
    """Fine-tune a pruned model beside its dense teacher; `recovery` names the loss."""

    recovery: ClassVar[Mapping[str, float]] = {"task": 1.0, "squarehead": 1.0}
    info: ClassVar[MethodInfo] = MethodInfo(
        name="squarehead",
        title="Sparse Fine-tuning for Inference Acceleration of Large Language Models",
        authors="Kurtic et al.",
        year=2023,
        card="080",
        room="weights",
        kind="hooked",
        needs=("training",),
        pattern="that of the record",
        budget="that of the record",
        cost="a mask per step; a forward of the teacher",
        summary="fine-tune with fixed masks; every block learns from its dense self",
        command="sparseworks train MODEL --data DATA --method squarehead --start SPARSE --out OUT",
    )
