"""BlockFFN (Song et al. 2025, BlockFFN: Towards End-Side Acceleration-Friendly Mixture-of-Experts
with Chunk-Level Activation Sparsity, arXiv:2507.08771): many small experts, as many of them active
as a ReLU lets through, and the same ones for neighbouring tokens.

    a = ReLU(W_r x),   A = gain * a / rms(a),   y = sum_i A_i W_out,i silu(W_in,i x)

with the mean square over all N entries, zeros included; a_i = 0 is an inactive expert, and no top-k
is needed. Two losses act on the router:

    locality   mean of BCE with logit kappa z_t and target sigmoid(kappa z_(t-1)), kappa = 100,
    chunks     mean over chunks of L tokens of P_i = 1 - exp(sum_t log(1 - p_ti + 1e-5)),
               p = a / (sum a + 1e-5).

The target has a gradient too. Which neighbour supplies it is our choice; locality is summed and
chunks are summed over layers. The factor of the second loss adapts: constant for `warmup` steps,
then every `window` steps it is multiplied by the ratio of the loss in this window to the last one
(a ratio in (1, 1.025) becomes 1.025), at most 4 times the first, reached linearly over a window.

In our quick setting (claim 138: a byte decoder, 300 steps, factors of the paper) losses buy their
sparsity of chunks by sending every token to the same experts: CLS_8 is within a point of that of
single tokens, and a third of the experts is alive. The locality loss does so by itself; without it
tokens differ more. Watch `chunk_sparsity(chosen, 1)` beside that of chunks.

Training computes all experts, as one wide MLP; `finish` leaves a layer that skips the inactive
ones, with the same function. There is no start at which this is the function of a dense MLP:
"split" only gives the experts its neurons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.registry import MethodInfo
from sparseworks.experts.banks import Experts
from sparseworks.experts.layers import MoE
from sparseworks.experts.method import Job, MixtureMethod
from sparseworks.experts.mlps import Mlp
from sparseworks.experts.routers import Router
from sparseworks.experts.routing import Routing

__all__ = ["BlockFFN", "ReLURouter", "chunk_loss", "locality_loss"]

_EPS = 1e-5


class ReLURouter(Router):
    """A = gain * RMSNorm(ReLU(W x)); experts with A = 0 are not chosen."""

    def __init__(self, experts: int, width: int, **more: Any) -> None:
        super().__init__(experts, width, **more)
        self.gain = nn.Parameter(torch.ones_like(self.weight[:, 0]))

    def forward(self, x: Tensor, attention: Tensor | None = None) -> Routing:
        z = self.logits(x)
        a = z.relu()
        scale = a.square().mean(-1, keepdim=True).clamp_min(1e-20).rsqrt()
        p = a / (a.sum(-1, keepdim=True) + _EPS)
        return Routing(self.gain.to(z.dtype) * a * scale, a > 0, p, z)


def locality_loss(logits: Tensor, kappa: float = 100.0) -> Tensor:
    """Neighbours are active alike: BCE of kappa z_t against sigmoid(kappa z_(t-1)).

    Args:
        logits: `[..., tokens, N]`, before the ReLU.
    """
    own, before = kappa * logits[..., 1:, :], kappa * logits[..., :-1, :]
    return (F.softplus(own) - own * before.sigmoid()).mean()


def chunk_loss(p: Tensor, length: int) -> Tensor:
    """Mean probability that an expert is used in a chunk.

    Args:
        p: `[..., tokens, N]`; the last chunk is filled up with zeros.
        length: L.
    """
    tokens = p.shape[-2]
    filled = F.pad(p, (0, 0, 0, -tokens % length))
    chunks = filled.reshape(*p.shape[:-2], -1, length, p.shape[-1])
    return (1 - (1 - chunks + _EPS).log().sum(-2).exp()).mean()


@dataclass(frozen=True)
class BlockFFN(MixtureMethod):
    """Small experts under a ReLU, with losses that keep them on or off for runs of tokens.

    Args:
        experts: N.
        start: "fresh" experts, not gated, with SiLU; or "split": parts of the MLP that was there.
        hidden: e, of fresh experts; None: the MLP's neurons divided by N.
        locality: factor of the first loss.
        chunks: factor of the second, at the start.
        length: L.
        kappa: sharpness of the first.
        warmup, window: steps of the adaptive factor.
    """

    experts: int = 32
    start: str = "fresh"
    balance: float = 0.0
    hidden: int | None = None
    locality: float = 2e-3
    chunks: float = 5e-2
    length: int = 64
    kappa: float = 100.0
    warmup: int = 1000
    window: int = 100

    info: ClassVar[MethodInfo] = MethodInfo(
        name="blockffn",
        title="BlockFFN: Towards End-Side Acceleration-Friendly Mixture-of-Experts with "
        "Chunk-Level Activation Sparsity",
        authors="Song et al.",
        year=2025,
        card="138",
        room="experts",
        kind="mixture",
        pattern="experts of a token and of a chunk",
        budget="what a ReLU lets through",
        tensors="MLPs",
        cost="training from scratch",
        summary="small experts under a ReLU; losses keep them off for runs of tokens",
    )
    starts: ClassVar[tuple[str, ...]] = ("fresh", "split")

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.locality, self.chunks) < 0 or min(self.length, self.window) < 1:
            raise InvalidArgument("locality= and chunks= from 0, length= and window= from 1")
        if self.hidden is not None and (self.hidden < 1 or self.start == "split"):
            raise InvalidArgument(f"hidden={self.hidden}: from 1, of fresh experts only")

    def layer(self, mlp: Mlp, generator: torch.Generator) -> MoE:
        down = mlp.weights[1]
        made = {"generator": generator, "dtype": down.dtype, "device": down.device}
        if self.start == "split":
            bank = mlp.split(self.experts, generator)
        else:
            hidden = self.hidden or max(1, mlp.hidden // self.experts)
            bank = Experts(self.experts, mlp.width, hidden, gated=False, **made)  # type: ignore[arg-type]
        return MoE(ReLURouter(self.experts, mlp.width, **made), bank, dense=True)

    def penalty(self, job: Job) -> Tensor | None:
        found: list[Tensor] = []
        chunks: list[Tensor] = []
        for layer in job.layers.values():
            if layer.routing is None:
                continue
            if self.locality and layer.routing.logits.shape[-2] > 1:
                found.append(self.locality * locality_loss(layer.routing.logits, self.kappa))
            if self.chunks:
                chunks.append(chunk_loss(layer.routing.probabilities, self.length))
        usual = super().penalty(job)
        found += [] if usual is None else [usual]
        if chunks:
            total = torch.stack(chunks).sum()
            job.own["seen"] = float(total.detach())
            found.append(self.factor(job) * total)
        return torch.stack(found).sum() if found else None

    def factor(self, job: Job) -> float:
        """Of the chunk loss, at this step."""
        own = job.own
        if "to" not in own:
            return self.chunks
        way = min(1.0, (job.step - own["since"]) / self.window)
        return float(own["from"] + way * (own["to"] - own["from"]))

    def update(self, job: Job) -> None:
        own = job.own
        if "seen" not in own:
            return
        own["sum"] = own.get("sum", 0.0) + own.pop("seen")
        own["count"] = own.get("count", 0) + 1
        if own["count"] < self.window:
            return
        mean, last = own["sum"] / own["count"], own.get("mean")
        own |= {"sum": 0.0, "count": 0, "mean": mean}
        if last is None or job.step <= self.warmup or last <= 0:
            return
        ratio = mean / last
        ratio = 1.025 if 1 < ratio < 1.025 else ratio
        now = self.factor(job)
        own |= {"from": now, "to": min(4 * self.chunks, ratio * now), "since": job.step}

    def finish(self, job: Job) -> None:
        for layer in job.layers.values():
            layer.dense = False
