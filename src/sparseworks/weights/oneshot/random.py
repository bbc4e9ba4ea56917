"""Random pruning: the baseline that every score must beat.

score_ij ~ U(0, 1), from a generator keyed by (seed, tensor name).

Source: Liu et al. 2022, The Unreasonable Effectiveness of Random Pruning (as a baseline; older than
any paper).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparseworks.core.random import generator_for
from sparseworks.core.registry import MethodInfo
from sparseworks.weights.oneshot.base import OneShot, Target


@dataclass(frozen=True)
class Random(OneShot):
    """Keep weights at random; the same seed and tensor name give the same mask."""

    info: ClassVar[MethodInfo] = MethodInfo(
        name="random",
        title="Random pruning (baseline)",
        authors="Liu et al.",
        year=2022,
        room="weights",
        kind="one-shot",
        cost="none",
        summary="uniform random scores",
    )

    def score(self, target: Target, weight: Tensor, evidence: Any) -> Tensor:
        generator = generator_for(target.seed, target.view.name)
        return torch.rand(weight.shape, generator=generator).to(weight.device)
