"""SLTrain (Han et al. 2024, SLTrain: a sparse plus low-rank approach for parameter and memory
efficient pretraining, NeurIPS, arXiv:2406.02214).

Every linear weight is

    W = scale B A + S,     S = v at a random support I that never moves,

B = 0 and A Kaiming-uniform at first, v uniform in +-1/sqrt(in). B A has the head of the spectrum;
a few random entries make W full rank with high probability. B, A and v train, |v| = int(density
out in). W is no tensor of the model: forward and backward build it in blocks of rows, and the
gradient G = dy^T x is kept only at the support.

The released code builds W and G whole in every layer and keeps the places as int64; the gradients
are the same. Its scale is alpha / r: 1/4 at 60M parameters, 1/16 at 130M and 350M, 1/64 at 1B,
1/128 at 7B, with r a quarter of the width, density 0.03 (7B: 0.05) and a learning rate of 3e-3
without decay.

In our quick setting (claim 087: a Llama of width 96, 240 steps, r 12) training takes 55 % less
memory than dense training, W has full rank, and the loss is below that of full rank, which so few
steps leave undertrained. From B = 0 low rank alone (density 0) does not train a gated MLP at all:
all its products are 0 and stay so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.random import generator_for
from sparseworks.core.registry import MethodInfo
from sparseworks.models.views import View
from sparseworks.training.transforming import Transformed
from sparseworks.weights.lowrank.factoring import Factoring, rank_of
from sparseworks.weights.lowrank.layers import SparseLowRankLinear, random_support

__all__ = ["SLTrain"]


@dataclass(frozen=True, kw_only=True)
class SLTrain(Factoring):
    """Train linear layers as a low-rank product and a random sparse matrix.

    `sparsity`, where the call gives one, is that of S: 1 - density.

    Args:
        rank: r; below 1: a share of the smaller side.
        density: share of the weight's entries that S has; 0: low rank alone.
        scale: of B A.
        learned_scale: tanh(scale), which trains.
        start: "random", from scratch; or "weights": B A is the truncated SVD of the weight that
            the layer has, S the rest of it at its places.
        after: see `Factoring`.
    """

    rank: float = 0.25
    density: float = 0.03
    scale: float = 0.25
    learned_scale: bool = False
    start: Literal["random", "weights"] = "random"

    info: ClassVar[MethodInfo] = MethodInfo(
        name="sltrain",
        title="SLTrain: a sparse plus low-rank approach for parameter and memory efficient "
        "pretraining",
        authors="Han et al.",
        year=2024,
        card="087",
        room="weights",
        kind="transform",
        needs=("training",),
        command="sparseworks train MODEL --data DATA --method sltrain --sparsity 0.97 --optimizer "
        "adamw --out OUT",
        pattern="random, fixed",
        budget="uniform",
        tensors="linear layers",
        cost="r (out + in) + density out in parameters and as many optimizer states",
        summary="low rank plus a fixed random support, from scratch",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rank > 0 or not 0 <= self.density < 1 or self.scale == 0:
            raise InvalidArgument(
                f"sltrain: rank={self.rank} must be positive, density={self.density} in [0, 1), "
                f"scale={self.scale} not 0"
            )
        if self.start not in ("random", "weights"):
            raise InvalidArgument(f"sltrain: start={self.start!r}; use 'random' or 'weights'")

    @torch.no_grad()
    def layer(self, job: Transformed, view: View) -> SparseLowRankLinear:
        weight = view.parameter
        out, width = view.shape
        density = self.density if job.sparsity is None else 1 - job.sparsity
        generator = generator_for(job.seed, view.name)
        places = random_support(out * width, int(round(density * out * width, 6)), generator)
        bias = view.module.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        made = SparseLowRankLinear(
            width, out, rank_of(self.rank, view.shape), places, scale=self.scale,
            learned_scale=self.learned_scale, bias=bias is not None, dtype=weight.dtype,
            device=weight.device,
        )  # fmt: skip
        made.bias = bias
        if self.start == "weights":
            made.start_from(weight)
            return made
        nn.init.zeros_(made.up)
        made.down.copy_(_uniform(made.down.shape, math.sqrt(1 / width), generator))
        made.values.copy_(_uniform(made.values.shape, 1 / math.sqrt(width), generator))
        return made


def _uniform(shape: torch.Size, bound: float, generator: torch.Generator) -> torch.Tensor:
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
