"""MoE-LLaVA (Lin et al. 2024, MoE-LLaVA: Mixture of Experts for Large Vision-Language Models): the
third stage of a staged tuning. Stage I trains the projector of another modality alone, stage II the
whole dense model, both in an ordinary loop; then every second MLP becomes N copies of itself with

    p = softmax(W x),   first = argmax p,   second = argmax over the others of W x + Gumbel noise,
    y = sum over the two of p_i / (p_1 + p_2) E_i(x),   renormalised after drops

and only experts, routers and the MLPs that stay dense train on. An expert takes ceil(capacity * 2
tokens / N) tokens, first choices before second ones. The loss is N sum_i F_i P_i with F the share
of tokens whose first choice is i.

In our quick setting (claim 044: questions on small images, 72 steps in all) three stages end above
training everything at once by 0.23 nats (0.14 to 0.32); against dense MLPs in the last stage it is
open.

The noise is drawn in training only (DeepSpeed draws it in evaluation as well), and evaluation drops
nothing unless `eval_capacity` says so (2.0 in the released scripts).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.registry import MethodInfo
from sparseworks.experts.copying import Upcycling
from sparseworks.experts.evo_moe import gumbel
from sparseworks.experts.layers import MoE
from sparseworks.experts.losses import load_balance, z_loss
from sparseworks.experts.method import Job, Layers
from sparseworks.experts.mlps import Mlp, find_mlps
from sparseworks.experts.routers import TopK
from sparseworks.experts.routing import Routing, top

__all__ = ["MoELLaVA", "NoisySecond"]


class NoisySecond(TopK):
    """Top-2 whose second choice is drawn with Gumbel noise in training."""

    def forward(self, x: Tensor, attention: Tensor | None = None) -> Routing:
        z = self.logits(x)
        p = z.softmax(-1)
        if not self.training:
            return self.choose(p, z)
        first = top(p.detach(), 1)
        noisy = z.detach() + gumbel(z)
        chosen = first | top(noisy.masked_fill(first, -torch.inf), 1)
        weights = p * chosen
        return Routing(weights / weights.sum(-1, keepdim=True), chosen, p, z)


@dataclass(frozen=True)
class MoELLaVA(Upcycling):
    """Copies in every second layer under a top-2 router; attention and embeddings are frozen.

    Args:
        eval_capacity: as `capacity`, in evaluation; None: no token is dropped there.
        trains: "mlps": experts, routers and dense MLPs; "all": the whole model.
    """

    experts: int = 4
    capacity: float | None = 1.5
    layers: Layers = "alternate"
    eval_capacity: float | None = None
    trains: Literal["mlps", "all"] = "mlps"

    info: ClassVar[MethodInfo] = MethodInfo(
        name="moe-llava",
        title="MoE-LLaVA: Mixture of Experts for Large Vision-Language Models",
        authors="Lin et al.",
        year=2024,
        card="044",
        room="experts",
        kind="mixture",
        pattern="experts of a token",
        budget="top-2 of each token, with a capacity",
        tensors="every second MLP",
        cost="training of the MLPs",
        summary="every second MLP becomes copies under a top-2 router; only MLPs train on",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k != 2 or self.experts < 2:
            raise InvalidArgument(f"top_k={self.top_k}, experts={self.experts}: two of at least 2")
        if self.trains not in ("mlps", "all"):
            raise InvalidArgument(f"trains={self.trains!r}: use 'mlps' or 'all'")

    def layer(self, mlp: Mlp, generator: torch.Generator) -> MoE:
        down = mlp.weights[1]
        router = NoisySecond(
            self.experts, mlp.width, 2, generator=generator, dtype=down.dtype, device=down.device
        )
        return MoE(
            router, self.bank(mlp, generator), capacity=self.capacity,
            eval_capacity=self.eval_capacity, renormalize=True,
        )  # fmt: skip

    def begin(self, job: Job) -> None:
        if self.trains == "all":
            return
        kept = {id(p) for layer in job.layers.values() for p in layer.parameters()}
        if len(job.layers) > 0 and self.layers != "all":
            dense = find_mlps(job.model)
            kept |= {id(p) for mlp in dense for p in mlp.module.parameters()}
        job.freeze(p for p in job.model.parameters() if id(p) not in kept)

    def penalty(self, job: Job) -> Tensor | None:
        seen = [x.routing for x in job.layers.values() if x.routing is not None]
        if not seen:
            return None
        found = [self.balance * load_balance(r, first=True) + self.z * z_loss(r) for r in seen]
        return torch.stack(found).sum()
