"""The score under group pruning: w^2 / [H^-1]_jj^2, with H of the inputs (see `gqsa`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparseworks.core.evidence import Hessian
from sparseworks.core.registry import MethodInfo
from sparseworks.weights.oneshot.base import OneShot, Target
from sparseworks.weights.oneshot.obs import prepare_hessian

__all__ = ["HessianSaliency"]

_VANISHING = 1e-30  # mean squared inputs below this have lost their digits


@dataclass(frozen=True, kw_only=True)
class HessianSaliency(OneShot):
    """Keep the units of largest mean w^2 / [H^-1]_jj^2; the weights stay as they are.

    Args:
        damping: of H, relative to the mean of its diagonal.
    """

    damping: float = 0.01

    collector = Hessian
    info: ClassVar[MethodInfo] = MethodInfo(
        name="hessian-saliency",
        title="GQSA: Group Quantization and Sparsity for Accelerating Large Language Model "
        "Inference",
        authors="Zeng et al.",
        year=2024,
        room="weights",
        kind="one-shot",
        needs=("data",),
    )

    def score(self, target: Target, weight: Tensor, evidence: Hessian) -> Tensor:
        unseen = set(evidence.unseen_groups())
        scores = []
        for group, part in enumerate(weight):
            gram = evidence.hessian(group)
            if group in unseen or float(gram.diagonal().mean()) < _VANISHING:
                gram = torch.eye(gram.shape[0], device=gram.device)
            damped, _ = prepare_hessian(gram, self.damping)
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped)).diagonal()
            scores.append(part.square() / inverse.square())
        return torch.stack(scores)
