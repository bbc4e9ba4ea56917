"""Gaussian mixtures of linear experts under a softmax gate with a temperature, for the theory of
such gates (Nguyen, Akbarian, Ho 2024): their density, samples, maximum likelihood, Fisher matrix.

    p(y | x) = sum_i pi_i(x) N(y | a_i x + b_i, nu_i),
    pi(x) = softmax_i((sigma(beta1_i x) + beta0_i) / tau),   beta1_k = beta0_k = 0.

Where sigma(c z) = c sigma(z) for c > 0, (beta1, beta0, tau) and c times all three have the same
density: the Fisher matrix is exactly singular along them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparseworks.core.errors import InvalidArgument, ModelError

__all__ = ["GATES", "GaussianMixture", "fisher", "fit", "total_variation", "voronoi"]

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": torch.relu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
_FIELDS = ("beta1", "beta0", "tau", "a", "b", "nu")


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """Parameters, and sigma by its name.

    Args:
        beta1: `[k - 1, d]`, the last is 0.
        beta0: `[k - 1]`, the last is 0.
        tau: one number above 0.
        a, b: `[k, d]`, `[k]`, of the experts.
        nu: `[k]`, variances.
    """

    beta1: Tensor
    beta0: Tensor
    tau: Tensor
    a: Tensor
    b: Tensor
    nu: Tensor
    gate: str = "identity"

    def __post_init__(self) -> None:
        if self.gate not in GATES:
            raise InvalidArgument(f"gate={self.gate!r}; there are {', '.join(GATES)}")

    def vector(self) -> Tensor:
        """All parameters in one row, by `_FIELDS`."""
        return torch.cat([getattr(self, f).flatten() for f in _FIELDS])

    def with_vector(self, values: Tensor) -> GaussianMixture:
        """Of this shape, with other values."""
        shapes = [getattr(self, f).shape for f in _FIELDS]
        parts = torch.split(values, [math.prod(s) for s in shapes])
        named: dict[str, Any] = {f: p.view(s) for f, p, s in zip(_FIELDS, parts, shapes)}
        return replace(self, **named)

    def logits(self, x: Tensor) -> Tensor:
        """Of the gate, `[n, k]`, for x `[n, d]`."""
        beta1, beta0 = F.pad(self.beta1, (0, 0, 0, 1)), F.pad(self.beta0, (0, 1))
        return (GATES[self.gate](x @ beta1.T) + beta0) / self.tau

    def log_density(self, x: Tensor, y: Tensor) -> Tensor:
        """log p(y | x) `[n]`."""
        gap = y[:, None] - x @ self.a.T - self.b
        normal = -0.5 * (gap.square() / self.nu + torch.log(2 * torch.pi * self.nu))
        return torch.logsumexp(self.logits(x).log_softmax(1) + normal, 1)

    def sample(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """y for every row of x."""
        chosen = torch.multinomial(self.logits(x).softmax(1), 1, generator=generator).squeeze(1)
        noise = torch.randn(len(x), generator=generator, dtype=x.dtype)
        mean = (x * self.a[chosen]).sum(1) + self.b[chosen]
        return mean + noise * self.nu[chosen].sqrt()


def fit(start: GaussianMixture, x: Tensor, y: Tensor, steps: int = 200) -> GaussianMixture:
    """Maximum likelihood by L-BFGS from a start, with log tau and log nu; nothing is regularised.

    Raises:
        ModelError: the likelihood is not finite in the end.
    """
    positive = torch.cat(
        [torch.full((getattr(start, f).numel(),), f in ("tau", "nu")) for f in _FIELDS]
    )
    begun = start.vector()
    values = torch.where(positive, begun.abs().log(), begun).requires_grad_()

    def current() -> GaussianMixture:
        return start.with_vector(torch.where(positive, values.exp(), values))

    optimizer = torch.optim.LBFGS(
        [values], max_iter=steps, tolerance_grad=1e-9, tolerance_change=1e-12, history_size=20,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -current().log_density(x, y).mean()
        torch.autograd.backward(loss)
        return loss

    last = optimizer.step(closure)  # type: ignore[no-untyped-call]
    if not math.isfinite(last.item()) or not bool(torch.isfinite(values).all()):
        raise ModelError("the likelihood is not finite; start nearer to the truth")
    return start.with_vector(torch.where(positive, values.exp(), values).detach())


def fisher(mixture: GaussianMixture, x: Tensor, y: Tensor) -> Tensor:
    """Mean outer product of the scores at samples (x, y), in the order of `vector`."""

    def one(values: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return mixture.with_vector(values).log_density(x[None], y[None])[0]

    scores: Tensor = torch.func.vmap(torch.func.grad(one), (None, 0, 0))(mixture.vector(), x, y)
    return scores.T @ scores / len(x)


def total_variation(p: GaussianMixture, q: GaussianMixture, x: Tensor, points: int = 801) -> float:
    """Mean over x of half the integral of |p(y | x) - q(y | x)| over y."""
    wide = torch.cat([(x @ m.a.T + m.b).flatten() for m in (p, q)])
    reach = 6 * float(torch.cat([p.nu, q.nu]).max().sqrt())
    y = torch.linspace(float(wide.min()) - reach, float(wide.max()) + reach, points, dtype=x.dtype)
    rows = x.repeat_interleave(points, 0)
    gap = [m.log_density(rows, y.repeat(len(x))).exp().view(len(x), points) for m in (p, q)]
    return float(0.5 * (gap[0] - gap[1]).abs().sum(1).mean() * (y[1] - y[0]))


def voronoi(fitted: GaussianMixture, true: GaussianMixture) -> float:
    """The loss D of the paper between a fit and the truth, both with the last beta at 0.

    Each fitted component belongs to the true one that is nearest in (beta1, a, b, nu). Exponents
    are 1 in cells of one, and in larger cells 2 of beta1, tau and a, 4 of b, 2 of nu: these were
    taken over from Gaussian mixtures without gates.
    """
    one, two = (_components(m) for m in (fitted, true))
    points = [torch.cat([c[0], c[2], c[3][:, None], c[4][:, None]], 1) for c in (one, two)]
    cells = torch.cdist(points[0], points[1]).argmin(1)
    total = 0.0
    for j in range(len(two[0])):
        inside = (cells == j).nonzero().squeeze(1)
        mass = (one[1][inside] / fitted.tau).exp()
        total += float((mass.sum() - (two[1][j] / true.tau).exp()).abs())
        r = 1 if len(inside) <= 1 else 2
        far = (one[0][inside] - two[0][j]).norm(dim=1) ** r
        far = far + (fitted.tau - true.tau).abs() ** r
        far = far + (one[2][inside] - two[2][j]).norm(dim=1) ** r
        far = far + (one[3][inside] - two[3][j]).abs() ** (1 if r == 1 else 4)
        far = far + (one[4][inside] - two[4][j]).abs() ** (1 if r == 1 else 2)
        total += float((mass * far).sum())
    return total


def _components(m: GaussianMixture) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(beta1, beta0, a, b, nu) of all, the last beta included."""
    return F.pad(m.beta1, (0, 0, 0, 1)), F.pad(m.beta0, (0, 1)), m.a, m.b, m.nu
