"""EvoMoE (Nie et al. 2021, EvoMoE: An Evolutional Mixture-of-Experts Training Framework via
Dense-To-Sparse Gate, arXiv:2112.14397): experts spawned from one trained MLP, under a gate that
starts dense and ends at one expert.

    g = softmax((W x + Gumbel noise) / tau),   S = {i : g_i > 0.001},
    y = sum over S of w_i E_i(x),   w = softmax(W x)        (weights="gate": w = g)

without renormalisation. tau falls from `tau_start` to `tau_end` over a share `anneal` of the steps;
from a share `hard` of them on only the argmax of g stays, with weight softmax(W x)_i. The loss

    N^2 mean_i (mean_t w_ti * mean_t [i in S_t])

is N with all experts active and the mean weight of the top one with one: it pushes to sparsity.

In our quick setting (claim 041: a byte decoder, 300 steps) spawned experts, fresh ones under the
same gate, and Switch are not told apart at equal steps; at equal multiplications Switch is far
ahead, for all experts compute in much of the training.

Evaluation is top-1 on clean logits, without noise or drops (released code drops tokens there, and
keeps the noise with w = g; its switch to hard gating is at step 0 unless set). Train the dense
model first, for a fifth of all steps, say, then call `upcycle`: copies lose a random share
`diversify` of their weights each, so that they differ (from memory of the paper; the code has no
spawning).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.registry import MethodInfo
from sparseworks.experts.banks import Experts
from sparseworks.experts.layers import MoE
from sparseworks.experts.method import Job, MixtureMethod
from sparseworks.experts.mlps import Mlp
from sparseworks.experts.routers import Router
from sparseworks.experts.routing import Routing, top

__all__ = ["DenseToSparse", "EvoMoE", "gumbel", "sparsity_loss"]


def gumbel(like: Tensor) -> Tensor:
    """-log(-log u) of the shape of a tensor."""
    tiny = torch.finfo(like.dtype).tiny
    return -torch.empty_like(like).exponential_().clamp_min(tiny).log()


class DenseToSparse(Router):
    """The gate with a temperature.

    Args:
        threshold: above which an expert is active.
        weights: "clean": of softmax(z); "gate": of g.

    Attributes:
        tau: temperature.
        hard: one expert.
        soft_evaluation: evaluate what training computes, without noise; for diagnosis.
    """

    def __init__(
        self, experts: int, width: int, *, threshold: float = 1e-3, tau: float = 1.0,
        weights: Literal["clean", "gate"] = "clean", **more: Any,
    ) -> None:  # fmt: skip
        super().__init__(experts, width, **more)
        self.threshold, self.tau, self.weights = threshold, tau, weights
        self.hard = self.soft_evaluation = False

    def forward(self, x: Tensor, attention: Tensor | None = None) -> Routing:
        z = self.logits(x)
        p = z.softmax(-1)
        soft = self.training or self.soft_evaluation
        g = ((z + gumbel(z) if self.training else z) / (self.tau if soft else 1.0)).softmax(-1)
        one = self.hard or not soft
        chosen = top(g.detach(), 1) if one else g.detach() > self.threshold
        w = p if self.weights == "clean" or one else g
        return Routing(w * chosen, chosen, p, z)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, tau={self.tau:.3g}{', hard' if self.hard else ''}"


def sparsity_loss(routing: Routing) -> Tensor:
    """N^2 mean_i (mean_t w_ti * mean_t [i in S_t])."""
    n = routing.experts
    w, chosen = routing.weights.reshape(-1, n), routing.chosen.reshape(-1, n)
    return n * (w.mean(0) * chosen.to(w.dtype).mean(0)).sum()


@dataclass(frozen=True)
class EvoMoE(MixtureMethod):
    """Copies of a trained MLP under a gate that goes from dense to one expert.

    Args:
        balance: factor of the loss above.
        diversify: share of every copy's weights that start at 0.
        tau_start, tau_end: temperatures.
        anneal: share of the steps over which the temperature falls.
        hard: share of the steps after which one expert stays; None: never in training.
        schedule: "exponential" or "linear".
        threshold: of g, for being active.
        weights: "clean" or "gate".
    """

    balance: float = 0.01
    diversify: float = 0.1
    tau_start: float = 2.0
    tau_end: float = 0.1
    anneal: float = 0.6
    hard: float | None = 0.6
    schedule: Literal["exponential", "linear"] = "exponential"
    threshold: float = 1e-3
    weights: Literal["clean", "gate"] = "clean"

    info: ClassVar[MethodInfo] = MethodInfo(
        name="evomoe",
        title="EvoMoE: An Evolutional Mixture-of-Experts Training Framework via Dense-To-Sparse "
        "Gate",
        authors="Nie et al.",
        year=2021,
        card="041",
        room="experts",
        kind="mixture",
        pattern="experts of a token",
        budget="a threshold, then one expert",
        tensors="MLPs",
        cost="training; all experts at first",
        summary="experts from one MLP under a gate that goes from dense to one expert",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.tau_end <= self.tau_start or not 0 < self.anneal <= 1:
            raise InvalidArgument("0 < tau_end <= tau_start, and anneal in (0, 1]")
        if not 0 <= self.diversify < 1 or not 0 <= self.threshold < 1 / self.experts:
            raise InvalidArgument("diversify in [0, 1), threshold from 0 and below 1 / experts")
        if self.hard is not None and not 0 <= self.hard <= 1:
            raise InvalidArgument(f"hard={self.hard}: a share of the steps, or None")
        if self.schedule not in ("exponential", "linear") or self.weights not in ("clean", "gate"):
            raise InvalidArgument("schedule: exponential or linear; weights: clean or gate")

    def bank(self, mlp: Mlp, generator: torch.Generator) -> Experts:
        made = super().bank(mlp, generator)
        with torch.no_grad():
            for bank in made.weights[:2] if self.start == "copies" and self.diversify else ():
                if bank is not None:
                    kept = torch.rand(bank.shape, generator=generator) >= self.diversify
                    bank.mul_(kept.to(bank))
        return made

    def layer(self, mlp: Mlp, generator: torch.Generator) -> MoE:
        down = mlp.weights[1]
        router = DenseToSparse(
            self.experts, mlp.width, threshold=self.threshold, tau=self.tau_start,
            weights=self.weights, generator=generator, dtype=down.dtype, device=down.device,
        )  # fmt: skip
        return MoE(router, self.bank(mlp, generator))

    def temperature(self, progress: float) -> float:
        """tau at a share of the steps."""
        way = min(1.0, progress / self.anneal)
        if self.schedule == "linear":
            return self.tau_start + way * (self.tau_end - self.tau_start)
        return self.tau_start * math.exp(way * math.log(self.tau_end / self.tau_start))

    def begin(self, job: Job) -> None:
        self.restore(job)

    def update(self, job: Job) -> None:
        self.restore(job)

    def restore(self, job: Job) -> None:
        progress = job.progress if job.step else 0.0
        for layer in job.layers.values():
            gate = layer.gate
            assert isinstance(gate, DenseToSparse)
            gate.tau = self.temperature(progress)
            gate.hard = self.hard is not None and progress >= self.hard

    def penalty(self, job: Job) -> Tensor | None:
        if not self.balance:
            return None
        found = [sparsity_loss(x.routing) for x in job.layers.values() if x.routing is not None]
        return self.balance * torch.stack(found).sum() if found else None
