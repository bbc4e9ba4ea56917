"""A Bayesian posterior over weights: Gaussian weights, their precisions, supports in chains.

What they are for is in `turbo_vbi`, which gives the model and the source.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sparseworks.core.random import generator_for

__all__ = ["Factors", "GaussianWeight", "Hyper", "chain_messages", "precision_and_evidence"]

Factors = Literal["joint", "mean-field"]


@dataclass(frozen=True)
class Hyper:
    """Gamma(a, b) of used weights and Gamma(a0, b0) of unused ones; variances near b/a, b0/a0."""

    a: float
    b: float
    a0: float
    b0: float

    def log_normalizers(self) -> tuple[float, float]:
        """ln b^a / Gamma(a) of both."""
        return (
            self.a * math.log(self.b) - math.lgamma(self.a),
            self.a0 * math.log(self.b0) - math.lgamma(self.a0),
        )


def chain_messages(evidence: Tensor, p01: float, p10: float) -> Tensor:
    """Extrinsic log-odds of every state of stationary two-state chains, one chain a row.

    With forward and backward messages f_n and g_n in log-odds, b = f_n + nu_n, c = g_n + nu_n,

        f_{n+1} = ln [((1 - p10) e^b + p01) / (p10 e^b + 1 - p01)],
        g_{n-1} = ln [((1 - p10) e^c + p10) / (p01 e^c + 1 - p01)],

    the result is f_n + g_n: what all the others and the prior say of s_n, without nu_n.

    Args:
        evidence: nu, log-odds `[chains, length]`.
        p01: P(s_{n+1} = 1 | s_n = 0), in (0, 1).
        p10: P(s_{n+1} = 0 | s_n = 1), in (0, 1).
    """
    stay, rest = math.log1p(-p10), math.log1p(-p01)
    on, off = math.log(p01), math.log(p10)

    def step(x: Tensor, up: float, down: float) -> Tensor:
        """ln [((1 - p10) e^x + e^up) / (e^down e^x + 1 - p01)]."""
        x = x.clamp(-40.0, 40.0)  # beyond that the result no longer moves, but rounding would
        above = torch.logaddexp(x + stay, torch.full_like(x, up))
        return above - torch.logaddexp(x + down, torch.full_like(x, rest))

    forward, backward = torch.empty_like(evidence), torch.empty_like(evidence)
    length = evidence.shape[1]
    forward[:, 0] = on - off
    backward[:, -1] = 0.0
    for n in range(1, length):
        forward[:, n] = step(forward[:, n - 1] + evidence[:, n - 1], on, off)
        m = length - n
        backward[:, m - 1] = step(backward[:, m] + evidence[:, m], off, on)
    return forward + backward


def precision_and_evidence(
    square: Tensor, prior: Tensor, hyper: Hyper, factors: Factors = "joint", sweeps: int = 10
) -> tuple[Tensor, Tensor]:
    """<rho> and the evidence nu (log-odds of q(s) without the prior's).

    "joint" takes q(rho, s) = q(s) q(rho | s), in closed form: nu = ln t(a, b) / t(a0, b0) with
    t(a, b) = b^a Gamma(a + 1/2) / Gamma(a) (b + <w^2>/2)^-(a + 1/2), and <rho> the mean of
    (a + 1/2) / (b + <w^2>/2) over q(s). "mean-field" takes q(rho) q(s), alternately from
    <s> = 0: rho ~ Gamma(<a> + 1/2, <b> + <w^2>/2), nu = ln [b^a / Gamma(a)] - ln [b0^a0 /
    Gamma(a0)] + (a - a0) <ln rho> - (b - b0) <rho>; from <s> = 1 it would stay there, since
    rho follows s and nu then calls even a zero weight used.

    Args:
        square: <w^2>.
        prior: log-odds of pi, of the same shape.
        hyper: of the two Gamma distributions.
        factors: of the posterior.
        sweeps: alternations of "mean-field".
    """
    half = 0.5 * square
    used, unused = hyper.log_normalizers()
    if factors == "joint":
        up, down = hyper.a + 0.5, hyper.a0 + 0.5
        gammas = math.lgamma(up) - math.lgamma(down)
        evidence = used - unused + gammas - up * (hyper.b + half).log()
        evidence = evidence + down * (hyper.b0 + half).log()
        on = torch.sigmoid(prior + evidence)
        return on * up / (hyper.b + half) + (1 - on) * down / (hyper.b0 + half), evidence
    on = torch.zeros_like(prior)
    for _ in range(sweeps):
        shape = on * hyper.a + (1 - on) * hyper.a0 + 0.5
        rate = on * hyper.b + (1 - on) * hyper.b0 + half
        precision, log_precision = shape / rate, torch.digamma(shape) - rate.log()
        evidence = used - unused + (hyper.a - hyper.a0) * log_precision
        evidence = evidence - (hyper.b - hyper.b0) * precision
        on = torch.sigmoid(prior + evidence)
    return precision, evidence


class GaussianWeight(nn.Module):
    """w = mu + sigma * eps while training, mu in evaluation; eps is a function of (seed, step).

    Args:
        weight: mu at first.
        sigma: standard deviation at first.
        key: seed and name of the private random numbers.
        precision: <rho> at first.
        prior: log-odds of pi at first.
    """

    precision: Tensor
    prior: Tensor
    support: Tensor
    scale: Tensor  # b/a, the variance of used weights; 0 before the first round

    def __init__(
        self, weight: Tensor, sigma: float, key: tuple[int, str], precision: float, prior: float
    ) -> None:
        super().__init__()
        self.log_sigma = nn.Parameter(torch.full_like(weight, math.log(sigma)))
        single = torch.zeros_like(weight, dtype=torch.float32)  # half precision would tie odds
        self.register_buffer("precision", single + precision)
        self.register_buffer("prior", single + prior)
        self.register_buffer("support", single)
        self.register_buffer("scale", single.new_zeros(()))
        self.key, self.step, self.noisy = key, 0, True

    def forward(self, weight: Tensor) -> Tensor:
        if not (self.training and self.noisy):
            return weight
        generator = generator_for(*self.key, self.step)
        drawn = torch.randn(weight.shape, generator=generator).to(weight)
        return weight + self.log_sigma.exp() * drawn

    def divergence(self, weight: Tensor) -> Tensor:
        """1/2 sum <rho> (mu^2 + sigma^2) - ln sigma^2, the KL divergence up to a constant."""
        log_sigma = self.log_sigma.float()
        square = weight.float().square() + (2 * log_sigma).exp()
        return 0.5 * (self.precision * square).sum() - log_sigma.sum()
