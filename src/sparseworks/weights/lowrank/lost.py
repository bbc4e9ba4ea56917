"""LOST (Li et al. 2025, LOST: Low-rank and Sparse Pre-training for Large Language Models,
arXiv:2508.02668).

Every linear layer is a low-rank path beside a few dense input channels,

    y = gamma B f(A x) + (1 - gamma) W_s x[I] + b.

The initial weight W0 = U S V^T is split once: B = U_r sqrt(S_r) and A = sqrt(S_r) V_r^T; of the
rest W_c = U_(>r) S_(>r) V_(>r)^T the channels of the largest column norm

    q_j = ||W_c[:, j]||_2 = (sum_(k > r) s_k^2 V_jk^2)^(1/2),

|I| = K of them, start W_s = W_c[:, I]. Then all three train and I stays. A column is a dense
product with a gathered input: no scatter, no rebuilt weight, as random entries need.

The split of W0 and the columns are the paper's; that f is SiLU, gamma 0.7 and K about 1 % of the
inputs is not certain. At that gamma, and behind SiLU, y would be much smaller than x W0^T: with
`balance` the factors are scaled so that it has the same size for Gaussian inputs.

In our quick setting (claim 089: a Llama of width 96, 120 steps) its layers take about a third of
the time of SLTrain's and training less than half the memory of dense training, but the loss is
above SLTrain's and above low rank alone; the columns of a Gaussian start have nearly equal norms,
so that random channels do as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.random import generator_for
from sparseworks.core.registry import MethodInfo
from sparseworks.core.selection import keep_top
from sparseworks.models.views import View
from sparseworks.training.transforming import Transformed
from sparseworks.weights.lowrank.channels import ChannelLowRankLinear
from sparseworks.weights.lowrank.factoring import Factoring, rank_of
from sparseworks.weights.lowrank.layers import decomposed

__all__ = ["LOST", "residual_norms"]

_ACTIVATIONS = {"silu": nn.SiLU, "identity": None}
_PROBES = 256


@dataclass(frozen=True, kw_only=True)
class LOST(Factoring):
    """Train linear layers as a low-rank path and the input channels it represents worst.

    `sparsity`, where the call gives one, is that of the channels: 1 - K / in.

    Args:
        rank: r; below 1: a share of the smaller side.
        channels: K / in.
        share: instead of `channels`: parameters of the layer over those of the dense weight, which
            K then makes up as far as whole channels do.
        gamma: weight of the low-rank path.
        activation: f, "silu" or "identity".
        balance: scale the start to the output size of the dense layer.
        residual_rank: how many of the discarded singular values count; None: all.
        choice: "residual", or "random" channels.
        after: see `Factoring`; with "silu" nothing can be merged.
    """

    rank: float = 0.25
    channels: float = 0.01
    share: float | None = None
    gamma: float = 0.7
    activation: Literal["silu", "identity"] = "silu"
    balance: bool = True
    residual_rank: int | None = None
    choice: Literal["residual", "random"] = "residual"

    info: ClassVar[MethodInfo] = MethodInfo(
        name="lost",
        title="LOST: Low-rank and Sparse Pre-training for Large Language Models",
        authors="Li et al.",
        year=2025,
        card="089",
        room="weights",
        kind="transform",
        needs=("training",),
        command="sparseworks train MODEL --data DATA --method lost --sparsity 0.98 --optimizer "
        "adamw --out OUT",
        pattern="input channels, fixed",
        budget="uniform",
        tensors="linear layers",
        cost="one SVD per weight; r (out + in) + K out parameters and as many optimizer states",
        summary="low rank plus the input channels it misses most, from scratch",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rank > 0 or not 0 < self.channels <= 1 or not 0 < self.gamma < 1:
            raise InvalidArgument(
                f"lost: rank={self.rank} must be positive, channels={self.channels} in (0, 1], "
                f"gamma={self.gamma} in (0, 1)"
            )
        if self.activation not in _ACTIVATIONS or self.choice not in ("residual", "random"):
            raise InvalidArgument(
                f"lost: activation={self.activation!r} and choice={self.choice!r}; use 'silu' or "
                "'identity', 'residual' or 'random'"
            )
        if self.after == "merged" and self.activation != "identity":
            raise InvalidArgument(
                "lost: after='merged' needs activation='identity'; a path with SiLU is no matrix"
            )
        if (self.share is not None and not 0 < self.share <= 1) or (
            self.residual_rank is not None and self.residual_rank < 1
        ):
            raise InvalidArgument(
                f"lost: share={self.share} must be in (0, 1], "
                f"residual_rank={self.residual_rank} at least 1"
            )

    @torch.no_grad()
    def layer(self, job: Transformed, view: View) -> ChannelLowRankLinear:
        weight, rank = view.parameter.detach(), rank_of(self.rank, view.shape)
        if rank > min(view.shape):
            raise InvalidArgument(f"lost: rank={rank} is above {min(view.shape)} of {view.name}")
        count = self._count(job, view, rank)
        u, s, v = decomposed(weight)
        generator = generator_for(job.seed, view.name)
        q = residual_norms(s, v, rank, self.residual_rank)
        if self.choice == "random":
            q = torch.rand(q.shape, generator=generator).to(q.device)
        chosen = keep_top(q, count).nonzero().view(-1)
        last = None if self.residual_rank is None else rank + self.residual_rank
        rest = slice(rank, last)
        root = s[:rank].sqrt()
        up, down = u[:, :rank] * root, root[:, None] * v[:rank]
        columns = (u[:, rest] * s[rest]) @ v[rest][:, chosen]
        bias = view.module.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        kind = _ACTIVATIONS[self.activation]
        made = ChannelLowRankLinear(
            up.to(weight.dtype), down.to(weight.dtype), columns.to(weight.dtype), chosen, bias,
            self.gamma, None if kind is None else kind(),
        )  # fmt: skip
        if self.balance:
            _balance(made, weight, generator)
        return made

    def _count(self, job: Transformed, view: View, rank: int) -> int:
        """K."""
        out, width = view.shape
        if self.share is not None:
            left = int(self.share * out * width + 1e-6) - rank * (out + width)
            if left < out:
                raise InvalidArgument(
                    f"lost: share={self.share} of {view.name} leaves no channel beside rank {rank};"
                    " raise it or lower the rank"
                )
            return min(width, left // out)
        channels = self.channels if job.sparsity is None else 1 - job.sparsity
        return min(width, max(1, math.ceil(round(channels * width, 6))))


def residual_norms(s: Tensor, v: Tensor, rank: int, count: int | None = None) -> Tensor:
    """q `[in]`, column norms of what is left of U diag(s) v after its first `rank` components."""
    rest = slice(rank, None if count is None else rank + count)
    return (s[rest, None] * v[rest]).square().sum(0).sqrt()


def _balance(layer: ChannelLowRankLinear, weight: Tensor, generator: torch.Generator) -> None:
    """Scale B and W_s so that y is as large as the dense layer's."""
    x = torch.randn(_PROBES, layer.in_features, generator=generator)
    x = x.to(weight.device, weight.dtype)
    bias, layer.bias = layer.bias, None
    factor = (x @ weight.t()).float().std() / layer(x).float().std().clamp_min(1e-12)
    layer.bias = bias
    layer.up.mul_(factor)
    layer.columns.mul_(factor)
