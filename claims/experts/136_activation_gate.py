"""How fast a gate's parameters are found with more data: with a temperature alone, and with an
activation function under it, by simulation.

Fits start at the truth times (1 + 0.2 normal), a spread that does not shrink with n: along a flat
direction they stay where they started. Slopes are of the median of log errors on log n.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median

import torch

from sparseworks.diagnostics.claims import Claim, Promise, Setting
from sparseworks.experts.gaussian_mixtures import GaussianMixture, fit, total_variation, voronoi

D = torch.float64
SIZES = (1000, 4000, 16000)


def _truth(gate: str) -> GaussianMixture:
    return GaussianMixture(
        torch.tensor([[2.0]], dtype=D), torch.tensor([-0.5], dtype=D), torch.tensor(0.5, dtype=D),
        torch.tensor([[1.0], [-1.0]], dtype=D), torch.tensor([1.0, -1.0], dtype=D),
        torch.tensor([0.25, 0.25], dtype=D), gate,
    )  # fmt: skip


def _slope(errors: list[list[float]]) -> float:
    """Of log median error on log n."""
    x = [math.log(n) for n in SIZES]
    y = [math.log(median(e)) for e in errors]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    top = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y))
    return top / sum((a - mean_x) ** 2 for a in x)


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    repeats = 24 if setting == "full" else 12
    found: dict[str, float] = {}
    for gate in ("identity", "relu", "tanh"):
        true = _truth(gate)
        errors: dict[str, list[list[float]]] = {
            k: [[] for _ in SIZES] for k in ("gate", "ratio", "density", "voronoi")
        }
        for place, n in enumerate(SIZES):
            for repeat in range(repeats):
                g = torch.Generator().manual_seed((seed * 100 + repeat) * 10 + place)
                x = 1.5 * torch.randn(n, 1, generator=g, dtype=D)
                y = true.sample(x, g)
                shift = 1 + 0.2 * torch.randn(9, generator=g, dtype=D)
                m = fit(true.with_vector(true.vector() * shift), x, y)
                errors["gate"][place].append(
                    float((m.tau - true.tau).abs() + (m.beta1 - true.beta1).abs())
                )
                ratio = m.beta1 / m.tau - true.beta1 / true.tau
                errors["ratio"][place].append(float(ratio.abs()))
                errors["density"][place].append(total_variation(m, true, x[:100], 201))
                errors["voronoi"][place].append(voronoi(m, true))
        for name, seen in errors.items():
            found[f"{gate} {name} slope"] = _slope(seen)
            found[f"{gate} {name} at {SIZES[-1]}"] = median(seen[-1])
    found["tanh learns"] = -0.35 - found["tanh gate slope"]
    found["plain does not"] = found["identity gate slope"] + 0.15
    found["relu does not"] = found["relu gate slope"] + 0.15
    found["ratio of plain"] = -0.3 - found["identity ratio slope"]
    found["ratio of tanh"] = -0.3 - found["tanh ratio slope"]
    found["density of plain"] = -0.3 - found["identity density slope"]
    found["density of tanh"] = -0.3 - found["tanh density slope"]
    return found


CLAIM = Claim(
    card="136",
    method="activation-gate",
    title="a temperature cannot be learned beside a linear gate, and can beside a tanh",
    model="two Gaussian linear experts of one input: beta1 2, beta0 -0.5, tau 0.5, experts (1, 1) "
    "and (-1, -1), variances 0.25; maximum likelihood by L-BFGS",
    data="x normal with deviation 1.5, n = 1,000, 4,000, 16,000; 12 repetitions for a seed (full: "
    "24)",
    baseline="the gate without an activation function, and with ReLU",
    metric="slope of log median |d tau| + |d beta1| on log n; the same of beta1 / tau and of the "
    "total variation of densities",
    promises=(
        Promise("tanh learns", "tanh: slope of tau and beta1 at most -0.35"),
        Promise("plain does not", "plain: slope of tau and beta1 at least -0.15"),
        Promise("relu does not", "ReLU: slope of tau and beta1 at least -0.15"),
        Promise("ratio of plain", "plain: slope of beta1 / tau at most -0.3"),
        Promise("ratio of tanh", "tanh: slope of beta1 / tau at most -0.3"),
        Promise("density of plain", "plain: slope of the density error at most -0.3"),
        Promise("density of tanh", "tanh: slope of the density error at most -0.3"),
    ),
    measure=measure,
    looks=(3, 5, 8, 12, 20, 32),
)
