"""Experts of the sampling space (Luo, Xiang et al. 2023, Image Super-resolution Via Latent
Diffusion: A Sampling-space Mixture Of Experts And Frequency-augmented Decoder Approach,
arXiv:2310.12004): MLPs that are many in training and one afterwards.

Training: a random permutation of the positions, the same for the whole batch, is cut into N equal
parts, part i goes to expert i. After every optimizer step all experts move at once,

    w_i <- (1 - beta) w_i + beta / (N - 1) sum_(j != i) w_j,   beta = rate * min(1, step / ramp),

so that what they differ from their mean shrinks by 1 - beta N / (N - 1); beta = (N - 1) / N is the
mean. Evaluation and `finish` take one MLP with the mean weights; a file of it is read into a model
that was upcycled in the same way and finished.

Released code makes new parameters in each of these steps, which the optimizer does not know, so
that experts stop learning, merges with N - 1 / N for (N - 1) / N, and one after the other; here
weights are written in place, from the old ones. Positions that do not divide by N are spread as
evenly as they can be. Of the same paper: `time_stages` (a denoiser for each part of the diffusion
time) and `spectral` (a filter of frequencies for its decoder).

In the paper beta rises to 0.3 over 10,000 steps with 16 experts. In our quick setting (claim 133: a
small U-Net, 320 steps) nothing is decided but that the filter restores less of the high frequencies
than two convolutions of as many parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.registry import MethodInfo
from sparseworks.experts.banks import ACTIVATIONS, Experts
from sparseworks.experts.layers import MoE
from sparseworks.experts.load import Load
from sparseworks.experts.method import Job, MixtureMethod
from sparseworks.experts.mlps import Mlp
from sparseworks.experts.products import whole
from sparseworks.experts.routers import Router
from sparseworks.experts.routing import Routing

__all__ = ["MeanExperts", "RandomSplit", "SampledSpace", "average"]


class RandomSplit(Router):
    """Equal random parts of the positions in training, the first expert in evaluation.

    Without parameters of its own: `weight` is a buffer of zeros.
    """

    def __init__(self, experts: int, width: int, **more: Any) -> None:
        super().__init__(experts, width, **more)
        zeros = torch.zeros_like(self.weight.detach())
        del self.weight
        self.register_buffer("weight", zeros, persistent=False)

    def forward(self, x: Tensor, attention: Tensor | None = None) -> Routing:
        experts, length = self.weight.shape[0], x.shape[-2]
        places = torch.zeros(length, dtype=torch.long, device=x.device)
        if self.training:
            order = torch.randperm(length, device=x.device)
            places[order] = torch.arange(length, device=x.device) * experts // length
        chosen = torch.nn.functional.one_hot(places, experts).bool()
        chosen = chosen.expand(*x.shape[:-1], experts)
        weights = chosen.to(torch.promote_types(x.dtype, torch.float32))
        return Routing(weights, chosen, weights, weights)


class MeanExperts(Experts):
    """Experts in training; in evaluation the one whose weights are their mean."""

    def mean(self) -> MeanExperts:
        """That one, as a bank of its own."""
        made = MeanExperts(
            1, self.width, self.hidden, gated=self.gated, activation=self.activation,
            bias=self.up_bias is not None, dtype=self.down_proj.dtype, device=self.down_proj.device,
        )  # fmt: skip
        with torch.no_grad():
            for bank, own in zip(made.weights, self.weights, strict=True):
                if bank is not None and own is not None:
                    bank.copy_(own.mean(0, keepdim=True))
        return made.train(self.training)

    def forward(self, x: Tensor, routing: Routing, *, dense: bool = False) -> Tensor:
        if self.training:
            return super().forward(x, routing, dense=dense)
        first, last, *biases = self.weights
        one = (
            first.mean(0, keepdim=True), last.mean(0, keepdim=True),
            *(None if b is None else b.mean(0, keepdim=True) for b in biases),
        )  # fmt: skip
        return whole(x, x.new_ones(len(x), 1), one, ACTIVATIONS[self.activation], self.gated)  # type: ignore[arg-type]


@torch.no_grad()
def average(bank: Tensor, beta: float) -> None:
    """w_i <- (1 - beta) w_i + beta / (N - 1) sum_(j != i) w_j, in place.

    Args:
        bank: `[N, ...]`; of one expert it stays as it is.
    """
    n = len(bank)
    if n > 1 and beta:
        total = bank.sum(0, keepdim=True)
        bank.mul_(1 - beta * n / (n - 1)).add_(beta / (n - 1) * total)


@dataclass(frozen=True)
class SampledSpace(MixtureMethod):
    """N experts on random parts of the positions, drawn together and merged in the end.

    Args:
        rate: beta in the end.
        ramp: steps over which it rises.
    """

    experts: int = 16
    balance: float = 0.0
    rate: float = 0.3
    ramp: int = 10_000

    info: ClassVar[MethodInfo] = MethodInfo(
        name="ss-moe",
        title="Image Super-resolution Via Latent Diffusion: A Sampling-space Mixture Of Experts "
        "And Frequency-augmented Decoder Approach",
        authors="Luo et al.",
        year=2023,
        card="133",
        room="experts",
        kind="mixture",
        pattern="experts of random positions",
        budget="one of each position; one in all in the end",
        tensors="MLPs",
        cost="training",
        summary="random positions train one expert each; averaged step by step, merged in the end",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.rate <= 1 or self.ramp < 1:
            raise InvalidArgument(f"rate={self.rate} in [0, 1], ramp={self.ramp} from 1")

    def layer(self, mlp: Mlp, generator: torch.Generator) -> MoE:
        down, made = mlp.weights[1], self.bank(mlp, generator)
        bank = MeanExperts(
            self.experts, made.width, made.hidden, gated=made.gated, activation=made.activation,
            bias=made.up_bias is not None, dtype=down.dtype, device=down.device,
        )  # fmt: skip
        bank.load_state_dict(made.state_dict())
        router = RandomSplit(self.experts, mlp.width, dtype=down.dtype, device=down.device)
        return MoE(router, bank)

    def beta(self, step: int) -> float:
        """After a step."""
        return self.rate * min(1.0, step / self.ramp)

    def update(self, job: Job) -> None:
        for layer in job.layers.values():
            for bank in layer.experts.weights:
                if bank is not None:
                    average(bank, self.beta(job.step))

    def finish(self, job: Job) -> None:
        for layer in job.layers.values():
            assert isinstance(layer.experts, MeanExperts)
            layer.experts = layer.experts.mean()
            gate = RandomSplit(1, layer.experts.width)
            layer.gate = gate.to(layer.experts.down_proj).train(layer.training)
            layer.load = Load(1)
