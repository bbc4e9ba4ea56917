"""Turbo-VBI (Xia, Tsang & Lau 2023, Structured Bayesian Compression for Deep Neural Networks Based
on The Turbo-VBI Approach).

Prior of weight n, with support s in {0, 1} and precision rho:

    p(w | rho) = N(0, 1/rho),   p(rho | s=1) = Gamma(a, b),   p(rho | s=0) = Gamma(a0, b0),

b/a the variance of used weights, b0/a0 far less, and p(s) a Markov chain along the inputs of every
row (P(0->1) = p01, P(1->0) = p10), so that survivors come in runs. The posterior q(w) q(rho) q(s)
is found in rounds:

1. q(w) = N(mu, sigma^2), by the loop's own optimizer: loss + 1/(2N) sum <rho> (mu^2 + sigma^2)
   - ln sigma^2, with N samples and the weights drawn anew every step;
2. q(rho) and q(s) in closed form from <w^2> = mu^2 + sigma^2 and the prior odds pi of s;
3. the chains: from the evidence nu (the odds of q(s) over pi) sum-product along each row gives new
   odds pi, nu_n itself excluded (extrinsic messages: else evidence would be counted twice).

At the end a weight stays where q(s=1) >= 1/2, or the best ones at the sparsity asked for; the value
is mu. Only the abstract of the paper and the literature on Turbo-VBI were at hand: the updates are
the general ones, the layout of the chains and all defaults are ours.

In our quick setting (claim 181, 80 % sparse) the chain finds a clustered support better (F1 0.07
above independent supports, 0.03 to 0.12) and makes a digits network regular (runs 2.8 times as
long, 34 % fewer index bits), at 1.9 points of accuracy (0.9 to 2.9).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.patterns import Unstructured
from sparseworks.core.registry import MethodInfo
from sparseworks.models.views import View
from sparseworks.training.transforming import Transform, Transformed
from sparseworks.weights.dynamic.masks import check_fraction, select_masks, span
from sparseworks.weights.dynamic.posterior import (
    Factors,
    GaussianWeight,
    Hyper,
    chain_messages,
    precision_and_evidence,
)

__all__ = ["GaussianWeight", "Hyper", "TurboVBI", "chain_messages", "precision_and_evidence"]

Coupling = Literal["row", "grid", "none"]


@dataclass(frozen=True, kw_only=True)
class TurboVBI(Transform):
    """Learn weights, their precisions and a clustered support; add `job.penalty()` to the loss.

    The loss must be a mean over samples. Without `sparsity` the posterior decides how many weights
    stay.

    Args:
        samples: N, the number of training samples; needed.
        rounds: updates of precisions and support, evenly over the training from `start` to `end`.
        start: fraction of the training before the first round.
        end: fraction of the training of the last round.
        coupling: "row": chains along inputs (of a convolution: along the input channels of one
            kernel position); "grid": chains along outputs too, by loopy sweeps; "none": pi const.
        p01: P(a weight is used | the one before is not).
        p10: P(a weight is not used | the one before is).
        ratio: variance of unused weights over that of used ones, which is the mean square of the
            tensor at the first round over the prior share of used weights; 1/300 to 1/100 for
            "joint" (far less turns everything on), 1/1000 for "mean-field".
        shape: a = a0.
        sigma: first standard deviation, relative to the root mean square of the tensor.
        damping: share of the old log-odds that each round keeps.
        temperature: weight of the divergence at `end`; below 1 a posterior colder than Bayes',
            which keeps networks of more weights than samples from fitting nothing.
        factors: "joint" for q(rho, s), a better bound, or the "mean-field" q(rho) q(s) of the
            literature; see `precision_and_evidence`.
    """

    samples: int = 0
    rounds: int = 8
    start: float = 0.3
    end: float = 0.8
    coupling: Coupling = "row"
    p01: float = 0.05
    p10: float = 0.2
    ratio: float = 0.005
    shape: float = 1.0
    sigma: float = 0.1
    damping: float = 0.5
    temperature: float = 1.0
    factors: Factors = "joint"

    needs_sparsity: ClassVar[bool] = False
    info: ClassVar[MethodInfo] = MethodInfo(
        name="turbo-vbi",
        title="Structured Bayesian Compression for Deep Neural Networks Based on The Turbo-VBI "
        "Approach",
        authors="Xia et al.",
        year=2023,
        card="181",
        room="weights",
        kind="transform",
        needs=("training",),
        pattern="unstructured, in runs",
        budget="by the posterior (uniform)",
        cost="a draw of the weights every step; message passing a few times",
        summary="Bayesian training whose support is a Markov chain, so that survivors cluster",
    )

    def __post_init__(self) -> None:
        check_fraction("turbo-vbi", start=self.start, end=self.end, damping=self.damping)
        probable = 0 < self.p01 < 1 and 0 < self.p10 < 1 and 0 < self.ratio < 1
        if not probable or not self.shape > 0 or not self.sigma > 0 or self.damping == 1:
            raise InvalidArgument(
                f"turbo-vbi: p01={self.p01}, p10={self.p10}, ratio={self.ratio} must be in (0, 1), "
                f"shape={self.shape}, sigma={self.sigma} above 0, damping={self.damping} below 1"
            )
        if self.samples < 0 or self.rounds < 1 or self.end < self.start:
            raise InvalidArgument(
                f"turbo-vbi: samples={self.samples} and rounds={self.rounds} must be at least 1, "
                f"end={self.end} not before start={self.start}"
            )
        if self.coupling not in get_args(Coupling) or self.factors not in get_args(Factors):
            raise InvalidArgument(
                f"turbo-vbi: coupling={self.coupling!r} must be one of {get_args(Coupling)}, "
                f"factors={self.factors!r} one of {get_args(Factors)}"
            )

    def begin(self, job: Transformed) -> None:
        if self.samples < 1:
            raise InvalidArgument(
                "turbo-vbi: give samples=, the number of training samples, which scales the prior"
            )
        span(job, 0.0, 1.0)
        if not (isinstance(job.pattern, Unstructured) and job.pattern.scope == "tensor"):
            raise InvalidArgument(
                f"turbo-vbi: pattern {job.pattern}; the posterior chooses single weights, which "
                "only 'unstructured' allows"
            )
        for name, weight in job.parameters.items():
            variance = float(weight.detach().float().square().mean())
            if variance == 0:
                raise InvalidArgument(f"turbo-vbi: {name} is all zero; initialise or exclude it")
            part = GaussianWeight(
                weight.detach(),
                self.sigma * math.sqrt(variance),
                (job.seed, name),
                1.0 / variance,
                math.log(self.p01 / self.p10),
            )
            job.parametrize(name, part)

    def penalty(self, job: Transformed) -> Tensor | None:
        first, last = span(job, self.start, self.end)
        if job.step < first:
            return None
        rise = min(1.0, (job.step - first + 1) / max(1, last - first))
        parts = [_part(job, n).divergence(w) for n, w in job.parameters.items()]
        return torch.stack(parts).sum() * (self.temperature * rise / self.samples)

    def update(self, job: Transformed) -> None:
        for name in job.views:
            _part(job, name).step = job.step
        first, last = span(job, self.start, self.end)
        gap = (last - first) / max(1, self.rounds - 1)
        if job.step in {round(first + r * gap) for r in range(self.rounds)}:
            self._infer(job)

    def load_state_dict(self, job: Transformed, state: Mapping[str, Any]) -> None:
        for name in job.views:
            _part(job, name).step = job.step

    def finish(self, job: Transformed) -> None:
        self._infer(job)
        scores = {n: v.matrix(_part(job, n).support) for n, v in job.views.items()}
        if job.sparsity is not None:
            select_masks(job, scores, job.sparsity)
        else:
            for name in job.views:
                job.set_mask(name, _part(job, name).support >= 0)
        for name in job.views:
            _part(job, name).noisy = False

    @torch.no_grad()
    def _infer(self, job: Transformed) -> None:
        """One round: precisions, support, and new prior odds from the chains."""
        for name, view in job.views.items():
            part, weight = _part(job, name), view.parameter.detach().float()
            if float(part.scale) == 0:
                part.scale.copy_(weight.square().mean() * (1 + self.p10 / self.p01))
            scale = float(part.scale)
            hyper = Hyper(
                self.shape, self.shape * scale, self.shape, self.shape * scale * self.ratio
            )
            square = weight.square() + (2 * part.log_sigma.float()).exp()
            _, evidence = precision_and_evidence(square, part.prior, hyper, self.factors)
            if self.coupling != "none":
                heard = self._messages(view, evidence)
                part.prior.lerp_(heard, 1 - self.damping)
            precision, evidence = precision_and_evidence(square, part.prior, hyper, self.factors)
            part.precision.copy_(precision)
            part.support.copy_(part.prior + evidence)

    def _messages(self, view: View, evidence: Tensor) -> Tensor:
        nu = view.matrix(evidence)
        rows = chain_messages(nu.reshape(-1, view.run), self.p01, self.p10).view(nu.shape)
        if self.coupling == "grid":
            switch = (self.p01 + self.p10) / 2  # without a bias: the rows already have the density
            for _ in range(2):
                columns = chain_messages((nu + rows).T, switch, switch).T
                again = (nu + columns).reshape(-1, view.run)
                rows = chain_messages(again, self.p01, self.p10).view(nu.shape)
            rows = rows + columns
        return view.from_matrix(rows)


def _part(job: Transformed, name: str) -> GaussianWeight:
    part = job.part(name)
    assert isinstance(part, GaussianWeight)
    return part
