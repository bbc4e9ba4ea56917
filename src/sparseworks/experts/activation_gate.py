"""The activation dense-to-sparse gate (Nguyen, Akbarian, Ho 2024, Is Temperature Sample Efficient
for Softmax Gaussian Mixture of Experts?, ICML 2024, arXiv:2401.13875).

    p = softmax((sigma(W x) + b) / tau),   S = {i : p_i > least},   w = p / sum_S p on S

with one learned temperature tau > 0: gradual sparsity where tau falls. Without sigma, multiplying
W, b and tau by one number changes nothing: W and tau cannot be told apart, and their estimates
hardly improve with more data. A sigma that is not homogeneous (tanh, sigmoid, gelu) tells them
apart; "identity" and "relu" do not. The theory is that of Gaussian mixtures (`gaussian_mixtures`);
that b is divided by tau as well, and the threshold, are our choice. No code was published.

In our simulation (claim 136: two experts, n to 16,000) the error of W and tau falls as n^-0.49 with
tanh and does not fall without sigma or with ReLU, while the density is found at n^-0.5 by all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.registry import MethodInfo
from sparseworks.experts.gaussian_mixtures import GATES
from sparseworks.experts.layers import MoE
from sparseworks.experts.method import MixtureMethod
from sparseworks.experts.mlps import Mlp
from sparseworks.experts.routers import Router
from sparseworks.experts.routing import Routing, top

__all__ = ["ActivatedRouter", "ActivationGate"]


class ActivatedRouter(Router):
    """softmax((sigma(W x) + b) / tau); an expert of `least` or less is not computed.

    Args:
        activation: sigma, a name of `GATES`.
        tau: the first temperature; its logarithm is learned.
    """

    def __init__(
        self, experts: int, width: int, *, activation: str, tau: float, least: float, **more: Any
    ) -> None:
        super().__init__(experts, width, **more)
        self.activation, self.least = activation, least
        like = self.weight.detach()
        self.bias = nn.Parameter(torch.zeros_like(like[:, 0]))
        self.log_tau = nn.Parameter(torch.full_like(like[0, 0], math.log(tau)))

    def forward(self, x: Tensor, attention: Tensor | None = None) -> Routing:
        z = F.linear(x, self.weight.to(x.dtype))
        z = GATES[self.activation](z.to(torch.promote_types(z.dtype, torch.float32)))
        z = (z + self.bias.to(z.dtype)) / self.log_tau.to(z.dtype).exp()
        p = z.softmax(-1)
        chosen = (p > self.least) | top(p.detach(), 1)
        weights = p * chosen
        return Routing(weights / weights.sum(-1, keepdim=True), chosen, p, z)


@dataclass(frozen=True)
class ActivationGate(MixtureMethod):
    """A dense gate with a learned temperature, sparse where its probabilities fall to `least`.

    Args:
        activation: sigma: identity, relu, gelu, sigmoid or tanh.
        tau: the first temperature.
        least: probability up to which an expert is not computed.
    """

    balance: float = 0.0
    activation: str = "tanh"
    tau: float = 1.0
    least: float = 1e-3

    info: ClassVar[MethodInfo] = MethodInfo(
        name="activation-gate",
        title="Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts?",
        authors="Nguyen et al.",
        year=2024,
        card="136",
        room="experts",
        kind="mixture",
        pattern="experts of a token",
        budget="what a learned temperature leaves",
        tensors="MLPs",
        cost="training on, all experts at first",
        summary="a softmax gate over an activation function, with a learned temperature",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation not in GATES:
            raise InvalidArgument(f"activation={self.activation!r}; there are {', '.join(GATES)}")
        if self.tau <= 0 or not 0 <= self.least < 1:
            raise InvalidArgument(f"tau={self.tau} above 0, least={self.least} in [0, 1)")

    def layer(self, mlp: Mlp, generator: torch.Generator) -> MoE:
        down = mlp.weights[1]
        router = ActivatedRouter(
            self.experts, mlp.width, activation=self.activation, tau=self.tau, least=self.least,
            generator=generator, dtype=down.dtype, device=down.device,
        )  # fmt: skip
        return MoE(router, self.bank(mlp, generator))
