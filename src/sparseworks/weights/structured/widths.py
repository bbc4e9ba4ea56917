"""Learned widths: which units matter, and how many of each layer are worth their cost.

See `sparseworks.weights.structured.ofb`, whose parts these are.
"""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import Tensor, nn

from sparseworks.models.coupling import Coupling, Family

__all__ = ["LearnedWidth", "cost_table", "entries", "expected_flops", "one_hot", "staircase"]


def staircase(p: Tensor, widths: Tensor, units: int) -> Tensor:
    """u at ranks 1..units, `[units]`, from probabilities and integer widths `[K]`."""
    ranks = torch.arange(1, units + 1, device=p.device)
    return (p[:, None] * (ranks[None] <= widths[:, None])).sum(0)


def one_hot(p: Tensor, edge: float = 0.05) -> Tensor:
    """H(p) + cot(pi s) / n, s clamped to [edge, 1 - edge] where the cotangent has its poles."""
    n = len(p)
    if n < 2:
        return p.sum() * 0
    entropy = -(p * p.clamp_min(1e-12).log()).sum()
    s = ((p - 1 / n).square().sum() / (1 - 1 / n)).clamp(edge, 1 - edge)
    return entropy + torch.tan(math.pi / 2 - math.pi * s) / n


Costs = list[tuple[float, list[dict[int, float]]]]


def cost_table(coupling: Coupling, families: list[Family]) -> Costs:
    """(FLOPs, per width the share of it that each family pays for; -1 for what stays)."""
    of = {int(r): i for i, f in enumerate(families) for r in f.roots}
    table: Costs = []
    for cost in coupling.costs:
        parts = []
        for labels in cost.labels:
            owners = Counter(of.get(int(r), -1) for r in labels)
            parts.append({i: n / len(labels) for i, n in owners.items()})
        table.append((2.0 * cost.macs, [p for p in parts if set(p) != {-1}]))
    return table


def expected_flops(table: Costs, shares: list[Tensor]) -> Tensor:
    """FLOPs when shares (0-d tensors) of the families stay; differentiable, fp64."""
    wide = [s.double() for s in shares]
    total = torch.zeros((), dtype=torch.float64, device=shares[0].device)
    for macs, parts in table:
        product = torch.full_like(total, macs)
        for part in parts:
            terms = [n * wide[i] for i, n in part.items() if i >= 0]
            product = product * (part.get(-1, 0.0) + torch.stack(terms).sum())
        total = total + product
    return total


class LearnedWidth:
    """Scores, width logits and what is still alive of one family."""

    def __init__(
        self,
        family: Family,
        candidates: int,
        floor: float,
        z: float,
        price: float,
        device: torch.device,
        generator: torch.Generator | None = None,
    ) -> None:
        """z at `z` and equal logits; with a generator z ~ N(z, 0.2) and logits ~ U(0, 1)."""
        d = len(family)
        steps = {max(1, round(d * k / candidates)) for k in range(1, candidates + 1)}
        self.family, self.units, self.price = family, d, price
        self.widths = torch.tensor(sorted(s for s in steps if s >= floor * d), device=device)
        scores, logits = torch.full((d,), z), torch.zeros(len(self.widths))
        if generator is not None:
            scores += 0.2 * torch.randn(d, generator=generator)
            logits += torch.rand(len(logits), generator=generator)
        self.z, self.a = nn.Parameter(scores.to(device)), nn.Parameter(logits.to(device))
        self.free: nn.Parameter | None = None
        self.living = torch.ones_like(self.widths, dtype=torch.bool)
        self.kept = torch.ones(d, dtype=torch.bool, device=device)

    def p(self) -> Tensor:
        return torch.softmax(self.a[self.living], 0)

    def order(self) -> Tensor:
        return self.z.detach().masked_fill(~self.kept, -torch.inf).argsort(descending=True)

    def mask(self, w: float) -> Tensor:
        """The bi-mask, or the freed gate, `[units]`; 0 for units that are dead."""
        if self.free is not None:
            return self.free * self.kept
        stairs = staircase(self.p(), self.widths[self.living], self.units)
        u = stairs[self.order().argsort()]
        return (w * torch.sigmoid(self.z) + (1 - w) * u) * self.kept

    def share(self) -> Tensor:
        return (self.p() * self.widths[self.living]).sum() / self.units

    @torch.no_grad()
    def kill(self, threshold: float) -> None:
        p = torch.zeros_like(self.a)
        p[self.living] = self.p()
        n = int(self.living.sum())
        self.living &= (p > threshold / n) | (p == p.max())
        self._close()

    @torch.no_grad()
    def decide(self) -> float:
        """Only the most likely width lives on; returns its probability."""
        p = torch.zeros_like(self.a)
        p[self.living] = self.p()
        self.living[:] = False
        self.living[int(p.argmax())] = True
        self._close()
        return float(p.max())

    @torch.no_grad()
    def release(self, w: float) -> nn.Parameter:
        """With one width left: the gate trains by itself, from where it is."""
        self.free = nn.Parameter(self.mask(w).clone())
        return self.free

    def _close(self) -> None:
        self.kept[self.order()[int(self.widths[self.living].max()) :]] = False


def entries(coupling: Coupling, family: Family) -> int:
    """Channels in one group: those of a head, or 1."""
    return int((coupling.axes[family.axes[-1]] == family.roots[0]).sum())
