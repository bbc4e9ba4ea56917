"""SLoRB, the side branch of AST (Huang et al. 2024, arXiv:2407.20584): N:M weights beside a small
dense branch that takes up what pruning removes,

    y = x (theta * M)^T + (x P^T) S^T,

P `[in / k, in]` with P[i, i k : (i + 1) k] = 1, S `[out, in / k]`. At first S is the mean of
(1 - M) * theta over each k inputs (zeros of kept entries count), so that inputs which are equal
within blocks of k pass as they did in the dense layer. S trains, P optionally; together they cost
1/k of the dense weight. M, theta and the decay are those of "ast".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.core.patterns import Pattern
from sparseworks.core.registry import MethodInfo
from sparseworks.training.delegated import Delegated, sparsified
from sparseworks.training.hooked import Run
from sparseworks.training.straight_through import masked_part
from sparseworks.training.transforming import Transformed
from sparseworks.weights.semistructured.adaptive import AST

__all__ = ["SLoRB", "BranchedLinear"]


class BranchedLinear(nn.Linear):
    """A linear layer with a branch: y = x W^T + b + (x P^T) S^T.

    Args:
        layer: whose weight and bias it takes over.
        mask: bool `[out, in]`; what it does not keep goes into S.
        block: k, which divides the inputs.
        pooled: P trains too.
    """

    def __init__(self, layer: nn.Linear, mask: Tensor, block: int, pooled: bool) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        weight = layer.weight.detach()
        blocks = layer.in_features // block
        lost = masked_part(weight, mask).view(-1, blocks, block)
        self.branch = nn.Parameter(lost.mean(2))
        sums = torch.eye(blocks, dtype=weight.dtype, device=weight.device)
        self.pooling = nn.Parameter(sums.repeat_interleave(block, 1), requires_grad=pooled)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.pooling), self.branch)


@dataclass(frozen=True, kw_only=True)
class SLoRB(Delegated):
    """AST with the side branch. The layers stay `BranchedLinear` after `finish`.

    Args:
        block: k.
        pooled: P trains too.
        decay, ramp, every, term: those of "ast".
    """

    pattern: str | Pattern = "2:4"
    block: int = 16
    pooled: bool = False
    decay: float = 1e-4
    ramp: float = 0.25
    every: int = 10
    term: Literal["adam", "gradient"] = "adam"

    recovery: ClassVar[Mapping[str, float]] = AST.recovery
    info: ClassVar[MethodInfo] = MethodInfo(
        name="slorb",
        title="Pruning Large Language Models with Semi-Structural Adaptive Sparse Training",
        authors="Huang et al.",
        year=2024,
        card="043",
        room="weights",
        command="sparseworks train MODEL --data DATA --method slorb --optimizer adamw --out OUT",
        kind="transform",
        needs=("training",),
        pattern="2:4 (any N:M; others by budget)",
        budget="that of N:M",
        tensors="linear layers",
        cost="that of ast; 1/k of the dense weight more to compute and to keep",
        summary="ast with a small dense branch for what pruning removes",
    )

    def __post_init__(self) -> None:
        if self.block < 1:
            raise InvalidArgument(f"slorb: block={self.block} must be at least 1")
        self._ast()

    def _ast(self) -> AST:
        return AST(decay=self.decay, ramp=self.ramp, every=self.every, term=self.term)

    def begin(self, job: Transformed) -> None:
        for name, view in job.views.items():
            if type(view.module) is not nn.Linear or view.shape[1] % self.block:
                raise ModelError(
                    f"slorb: {name} {list(view.shape)} is no plain linear layer whose inputs "
                    f"{self.block} divides; exclude it, or choose another block"
                )
        for name, view in job.views.items():
            layer = view.module
            assert isinstance(layer, nn.Linear)
            keep = job.pattern.keep(view.shape, job.sparsity or 0.0)
            mask = job.pattern.select(layer.weight.detach().abs(), keep)
            branched = BranchedLinear(layer, mask, self.block, self.pooled)
            job.replace(view.module_name, branched)
            job.views[name] = replace(view, module=branched)

    def start(self, job: Transformed) -> Run:
        return sparsified(job, self._ast())
